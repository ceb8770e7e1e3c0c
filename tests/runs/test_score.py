"""``medvdm score``: files read as training reads them, what is kept, maps, what is told of each file, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Trained, refused, tree
from PIL import Image

import medvdm
from medvdm.cli.main import main
from medvdm.data import convert
from medvdm.errors import InputError, InputTypeError, MedvdmError, MissingPackageError, RunError
from medvdm.images import to_levels
from medvdm.runs import config as config_
from medvdm.runs.provenance import PROVENANCE_CHUNK
from medvdm.runs.run import Run, load_data
from medvdm.runs.score import Scores, read_levels, score_files

ASK: dict[str, Any] = {"draws": 2, "share": 0.4}  # the tiny run has a few validation images only


@pytest.fixture
def path(trained_pixels: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_pixels, tmp_path / "run"))


@pytest.fixture
def levels() -> np.ndarray:
    found = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    found[1] = 0
    return found


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_bits_are_those_of_the_bound_and_places_those_among_the_runs_validation_images(
    path: Path, levels: np.ndarray
) -> None:
    run = medvdm.load(path)
    found = medvdm.score(run, levels, draws=16, share=0.4, maps=True)
    assert isinstance(found, Scores) and found.bits.shape == (3,)
    other = medvdm.bound(run, levels, draws=16)
    error = np.hypot(found.stderr, other.bits_per_dim_stderr)
    assert (np.abs(found.bits - other.bits_per_dim) < 4.5 * error).all()
    np.testing.assert_allclose(found.maps.sum(axis=(1, 2), dtype=np.float64) / 256, found.bits, rtol=1e-5)
    gaussian = run.gaussian.nats(levels) / 256 / math.log(2)
    np.testing.assert_allclose(found.statistics["over_gaussian"].values, found.bits - gaussian, atol=1.1e-5)

    data = load_data(run)
    val = data.indices("val")
    place = found.statistics["bits"]
    assert len(place.held_out) == len(val) and found.num_patients == len(set(data.patients[val]))
    again = medvdm.score(run, data.levels(val), draws=16, share=0.4)
    np.testing.assert_allclose(again.bits, place.held_out, rtol=1e-5)
    assert place.fewer.tolist() == [int(sum(place.held_out < b)) for b in found.bits]
    one = found.image(0)
    assert one["statistics"]["bits"]["fewer"] == place.fewer[0]
    assert one["unusual"] == [name for name, flags in found.unusual.items() if flags[0]]
    assert set(found.unusual) == {"bits_high", "bits", "over_gaussian"}


def test_a_codec_is_a_background_too(path: Path, levels: np.ndarray) -> None:
    pytest.importorskip("imagecodecs")
    from medvdm.evaluation.codecs import file_bytes

    found = medvdm.score(medvdm.load(path), levels, **ASK, codec="png")
    expected = found.bits - file_bytes(levels)["png"] * 8 / 256
    np.testing.assert_allclose(found.statistics["over_png"].values, expected, atol=1.1e-5)


def test_held_out_values_are_kept_and_serve_where_the_data_are_not(
    path: Path, levels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = medvdm.load(path)
    before = tree(path)
    first = medvdm.score(run, levels, **ASK, save=False)
    assert tree(path) == before
    medvdm.score(run, levels, **ASK)
    (file,) = (path / "held_out").iterdir()
    monkeypatch.setattr("medvdm.runs.score.load_data", lambda *_: pytest.fail("read the data"))
    second = medvdm.score(run, levels, **ASK)
    assert second.num_patients == first.num_patients
    for name, one in first.statistics.items():
        np.testing.assert_allclose(second.statistics[name].held_out, one.held_out, rtol=1e-6)
        np.testing.assert_array_equal(second.statistics[name].as_far, one.as_far)

    record = json.loads(file.read_text())
    for damage in ({"values": {"bits": [1.0, "x"]}}, {"values": {}}, {"num_patients": None}):
        file.write_text(json.dumps(record | damage))
        with pytest.raises(RunError, match="holds no values of held-out images") as caught:
            medvdm.score(run, levels, **ASK)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_text(json.dumps(record | {"version": "0.0.1"}))
    with pytest.raises(pytest.fail.Exception, match="read the data"):
        medvdm.score(run, levels, **ASK)


def test_a_run_that_cannot_be_written_to_still_scores(path: Path, levels: np.ndarray) -> None:
    (path / "held_out").write_text("")
    found = medvdm.score(medvdm.load(path), levels, **ASK)
    assert len(found.notes) == 1 and "not kept" in found.notes[0] and "is a file" in found.notes[0]


def test_other_data_than_the_runs_own_are_no_held_out_images(path: Path, levels: np.ndarray) -> None:
    data = medvdm.from_arrays(np.repeat(levels, 10, axis=0), splits=["train", "val", "test"] * 10)
    with pytest.raises(RunError, match="no longer what the run was trained on"):
        medvdm.score(medvdm.load(path), levels, **ASK, data=data)


# Files


def test_a_file_is_read_as_the_folder_source_reads_it(path: Path, tmp_path: Path) -> None:
    run, rng = medvdm.load(path), np.random.default_rng(1)
    as_it_is = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    found, notes = read_levels(picture(tmp_path / "a.png", as_it_is), run)
    np.testing.assert_array_equal(found[..., 0], as_it_is)
    assert notes == ()
    wide = picture(tmp_path / "b.png", rng.integers(0, 65536, (32, 48)).astype(np.uint16))
    found, notes = read_levels(wide, run)
    np.testing.assert_array_equal(found, to_levels(convert.read_image(wide, 16, "pad")))
    text = "; ".join(notes)
    assert "resized from 48 x 32" in text and "padded with black" in text and "rounded to 256 gray levels" in text
    cropped = dataclasses.replace(run, config=config_.change(run.config, fit="crop"))
    np.testing.assert_array_equal(read_levels(wide, cropped)[0], to_levels(convert.read_image(wide, 16, "crop")))
    photo = picture(tmp_path / "c.jpg", as_it_is)
    assert any("lossily compressed" in note for note in read_levels(photo, run)[1])
    (flat, *_) = read_levels(picture(tmp_path / "e.png", np.zeros((16, 16), np.uint8)), run)[1]
    assert flat.endswith("so pictures are flat"), "no window spreads what is all of one value"
    narrow, _ = read_levels(picture(tmp_path / "d.png", np.full((16, 16), 30_000, np.uint16)), run, "20000,40000")
    assert (narrow == 128).all()


def test_one_unreadable_file_among_many_and_json_is_one_object(
    path: Path, tmp_path: Path, levels: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [picture(tmp_path / f"{i}.png", one[..., 0]) for i, one in enumerate(levels)]
    text = tmp_path / "text.png"
    text.write_text("no image")
    words = ["--draws", "2", "--share", "0.4", "--json", "--maps", str(tmp_path / "maps")]
    code = main(["score", str(path), *map(str, [files[0], text, files[1], tmp_path / "nowhere.png"]), *words])
    out, err = capfd.readouterr()
    assert code == 1
    result = json.loads(out)
    assert out.count("\n") == 1
    assert [Path(one["file"]).name for one in result["images"]] == ["0.png", "1.png"]
    assert [Path(one["file"]).name for one in result["failed"]] == ["text.png", "nowhere.png"]
    assert len(err.splitlines()) == 2 and "text.png" in err.splitlines()[0] and "nowhere.png" in err.splitlines()[1]
    assert all(line.startswith("medvdm: ") for line in err.splitlines())
    alone = medvdm.score(medvdm.load(path), levels[:1], **ASK)
    assert result["images"][0]["bits_per_dim"] == pytest.approx(alone.bits[0], rel=1e-5)
    assert result["held_out"]["images"] == len(alone.statistics["bits"].held_out)

    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["0-bits.png", "1-bits.png"]
    for one in result["images"]:
        with Image.open(one["map"]) as image:
            pixels, scale = np.asarray(image), json.loads(image.text[PROVENANCE_CHUNK])["bits_per_gray_value"]
        assert pixels.dtype == np.uint16 and pixels.shape == (16, 16) and pixels.max() == 65535
        rounding = scale / 2 / one["bits_per_dim"]
        assert pixels.mean() * scale == pytest.approx(one["bits_per_dim"], rel=1e-5 + rounding)


def test_the_table_says_what_the_json_holds(
    path: Path, tmp_path: Path, levels: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [str(picture(tmp_path / f"image{i}.png", one[..., 0])) for i, one in enumerate(levels)]
    words = ["score", str(path), *files, "--draws", "2", "--share", "0.4"]
    assert main(words) == 0
    table = capfd.readouterr().out
    assert main([*words, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert all(len(line) <= 88 for line in table.splitlines())
    for one in result["images"]:
        assert Path(one["file"]).name in table and f"{one['bits_per_dim']:.3f}" in table
    held_out = result["held_out"]
    assert f"{held_out['images']} validation images of {held_out['patients']} patients" in table
    assert "no diagnosis" in " ".join(table.split())


# Refusals


def test_what_cannot_be_scored_is_refused_in_one_line(path: Path, levels: np.ndarray) -> None:
    run = medvdm.load(path)
    before = tree(path)
    dropped = dataclasses.replace(run, config=config_.change(run.config, label_dropout=0.0))
    counts = run.record["data"]["counts"]
    no_val = {**run.record, "data": {**run.record["data"], "counts": {**counts, "val": {"images": 0, "patients": 0}}}}
    for given, images, more, kind, words in [
        (run, levels / 255.0, {}, InputTypeError, "expected uint8"),
        (run, levels[:, :8], {}, InputError, r"images: shape \(3, 8, 16, 1\); expected"),
        (run, levels[:0], {}, InputError, "at least 1"),
        (run, levels, {"draws": 1}, InputError, "draws: 1; expected at least 2"),
        (run, levels, {"held_out": 0}, InputError, "held_out: 0; expected at least 1"),
        (run, levels, {"share": 0.001}, InputError, r"share: 0\.001 with 256 held-out images"),
        (run, levels, {"share": 0.05}, InputError, r"share: 0\.05 with \d+ held-out images; expected at least"),
        (run, levels, {"seed": -1}, InputError, "seed: -1"),
        (run, levels, {"drows": 3}, InputError, "setting: 'drows'.*draws"),
        (dropped, levels, {}, RunError, "null .* was not trained"),
        (dataclasses.replace(run, record=no_val), levels, {}, RunError, "no validation images"),
    ]:
        with pytest.raises(kind, match=words) as caught:
            medvdm.score(given, images, save=False, **{"share": 0.4, "draws": 2, **more})
        assert isinstance(caught.value, MedvdmError) and "\n" not in str(caught.value)
    assert tree(path) == before


def test_a_codec_that_is_not_there(path: Path, levels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'medvdm\[codecs\]'"):
        medvdm.score(medvdm.load(path), levels, **ASK, codec="jxl")


def test_a_latent_run_is_refused(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = picture(tmp_path / "a.png", np.zeros((16, 16), np.uint8))
    refused(capfd, "score", trained.path, file, names=["Bernoulli likelihood", "preset pixel"])


def test_bad_options(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before anything is read or written."""
    (tmp_path / "other").mkdir()
    a, b = (picture(tmp_path / name, np.zeros((16, 16), np.uint8)) for name in ("a.png", "other/a.png"))
    before = tree(tmp_path)
    for words, names in [
        ([], []),
        ([a, b, "--maps", tmp_path / "maps"], ["a-bits.png", "files of different names"]),
        ([a, "--maps", a], ["maps", "is a file"]),
        ([a, "--maps", tmp_path / "x" / "y"], ["maps", "is not there"]),
        ([a, "--window", "percentile"], ["window: 'percentile'", "LOW,HIGH"]),
        ([a, "--window", "3"], ["window: '3'"]),
        ([a, "--codec", "gif"], ["codec", "'gif'"]),
        ([a, "--draws", "1"], ["draws: 1"]),
    ]:
        refused(capfd, "score", path, *words, names=names)
    assert tree(tmp_path) == before


def test_a_run_with_a_window_from_its_training_images_asks_for_two_numbers(path: Path, tmp_path: Path) -> None:
    run: Run = medvdm.load(path)
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, window="percentile"))
    )
    file = picture(tmp_path / "a.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(InputError, match="window: 'percentile', the run's, .*; expected LOW,HIGH"):
        score_files(run, [file])
