"""Evaluations of a run: what is read, what is written under which name, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import STEPS, tree

import medvdm
from medvdm.cli.tables import evaluation_table
from medvdm.data import ImageData, from_arrays
from medvdm.errors import InputError, MissingPackageError, RunError
from medvdm.evaluation import codecs, gaussian_images
from medvdm.evaluation.held_out import TERMS
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.runs import config as config_
from medvdm.runs import fit
from medvdm.runs.run import Run, load_data
from medvdm.runs.store import safe_name


@pytest.fixture
def path(run: Path) -> Path:
    """The folder of the copied run; ``run`` is what the tests below load from it."""
    return run


def other_images(class_names: list[str], n: int = 6) -> ImageData:
    pixels = np.random.default_rng(0).uniform(size=(n, 16, 16)).astype(np.float32)
    return from_arrays(pixels, np.arange(n) % 2, class_names=class_names, splits=["test"] * n, name="elsewhere")


def test_the_result_names_the_run_the_weights_and_the_step(path: Path) -> None:
    raw, ema = (medvdm.evaluate(medvdm.load(path, ema=e), split="val", draws=1, save=False) for e in (False, True))
    for found, weights in ((raw, "raw"), (ema, "ema")):
        assert (found["run"], found["step"], found["weights"]) == ("run", STEPS, weights)
        assert found["version"] == medvdm.__version__ and found["own_data"] is True
    assert raw["vlb_bpd"] != ema["vlb_bpd"]


def test_evaluating_writes_the_result_and_the_card_and_nothing_else(path: Path) -> None:
    before = tree(path)
    stamp = (path / "baselines.npz").stat().st_mtime_ns
    run = medvdm.load(path)
    medvdm.evaluate(run, split="val", draws=1, save=False)
    assert tree(path) == before
    found = medvdm.evaluate(run, split="val", draws=1)
    after = tree(path)
    written = {name for name in after if after[name] != before.get(name)}
    (name,) = written - {"results", "MODEL_CARD.md"}
    assert name.startswith("results/") and set(before) <= set(after)
    assert json.loads((path / name).read_text()) == found
    assert (path / "baselines.npz").stat().st_mtime_ns == stamp


def test_the_card_tells_the_result_of_this_run_on_this_data(path: Path) -> None:
    record = json.loads((path / "config.json").read_text())
    assert "has not been evaluated" in (path / "MODEL_CARD.md").read_text()
    found = medvdm.evaluate(medvdm.load(path), split="test", draws=2)
    card = (path / "MODEL_CARD.md").read_text()
    for text in (record["data"]["origin"], record["data"]["fingerprint"], "phantom", "No Finding", "Pneumonia"):
        assert text in card, text
    for name in ("vlb_bpd", "floor_bpd", "excess_bpd"):
        assert f"{found[name]:.4f}" in card, name
    counts = record["data"]["counts"]
    for split in ("train", "val", "test"):
        assert f"| {split} | {counts[split]['images']} | {counts[split]['patients']} |" in card
    assert "not for clinical use" in card.casefold()
    assert "has not been evaluated" not in card
    for foreign in ("NIH", "MedMNIST", "given by the user", "text-mined", "elsewhere"):
        assert foreign not in card, foreign


def test_other_data_need_the_same_classes_or_null(path: Path) -> None:
    run = medvdm.load(path)
    before = tree(path)
    with pytest.raises(InputError, match="elsewhere: classes x, y; expected No Finding, Pneumonia, or --null"):
        medvdm.evaluate(run, other_images(["x", "y"]), draws=1)
    with pytest.raises(InputError, match="classes"):  # the same names in another order are other labels
        medvdm.evaluate(run, other_images(["Pneumonia", "No Finding"]), draws=1)
    assert tree(path) == before
    found = medvdm.evaluate(run, other_images(["x", "y"]), draws=1, null=True)
    assert found["own_data"] is False and found["labels"] == "null" and found["data"] == "elsewhere"
    same = medvdm.evaluate(run, other_images(["No Finding", "Pneumonia"]), draws=1)
    assert same["own_data"] is False and same["labels"] == "true"
    assert found["mean_image_bpd"] == same["mean_image_bpd"]
    assert tree(path)["baselines.npz"] == before["baselines.npz"], "never fitted on what is evaluated"
    assert "of other data: elsewhere" in (path / "MODEL_CARD.md").read_text()


def test_data_that_changed_since_training_are_refused(path: Path) -> None:
    record = json.loads((path / "config.json").read_text())
    record["data"]["fingerprint"] = "0" * 16
    (path / "config.json").write_text(json.dumps(record))
    before = tree(path)
    with pytest.raises(RunError, match="no longer what the run was trained on"):
        medvdm.evaluate(medvdm.load(path), draws=1)
    assert tree(path) == before


def test_a_run_without_its_baselines_is_refused(path: Path) -> None:
    (path / "baselines.npz").write_bytes((path / "baselines.npz").read_bytes()[:100])
    with pytest.raises(RunError, match=r"baselines\.npz"):
        medvdm.evaluate(medvdm.load(path), draws=1)


def test_data_given_from_python_must_be_given_again(path: Path) -> None:
    """And the line says with which call."""
    run = medvdm.load(path)
    run = dataclasses.replace(run, config=config_.change(run.config, data="arrays"))
    with pytest.raises(InputError, match="'arrays', given from Python.*the command line") as caught:
        load_data(run)
    assert f"medvdm.evaluate(medvdm.load({str(path)!r}), data)" in str(caught.value)


def test_each_evaluation_has_a_file_of_its_own_and_the_same_one_again_has_the_same(path: Path) -> None:
    run = medvdm.load(path)
    asked = [{}, {"draws": 3}, {"seed": 5}, {"batch_size": 5}, {"null": True}, {"split": "val"}]
    found = [medvdm.evaluate(run, **{"draws": 2, **one}) for one in asked]
    files = {name: json.loads((path / "results" / name).read_text()) for name in os.listdir(path / "results")}
    assert len(files) == len(asked) and all(one in files.values() for one in found)
    again = medvdm.evaluate(run, draws=2)
    assert len(os.listdir(path / "results")) == len(asked)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found[0].items() if k != "seconds"}
    assert (found[2]["seed"], found[3]["batch_size"], found[1]["draws"]) == (5, 5, 3)


@pytest.mark.parametrize("name", ["../../outside", ".hidden", "a/b", "x" * 300, "über daten", "..", "C:\\x"])
def test_the_name_of_the_data_leads_nowhere_else(name: str, path: Path) -> None:
    safe = safe_name(name)
    assert not safe.startswith(".") and len(safe) < 100 and Path(safe).name == safe and safe.isascii()
    assert safe_name(name + "1") != safe
    medvdm.evaluate(medvdm.load(path), dataclasses.replace(other_images(["a", "b"]), name=name), draws=1, null=True)
    (file,) = (path / "results").iterdir()
    assert json.loads(file.read_text())["data"] == name and file.name.startswith(f"{safe}-test-")


def test_a_run_given_as_the_current_folder_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path)
    run = medvdm.load(".")
    assert medvdm.evaluate(run, draws=1, save=False)["run"] == "run"
    assert medvdm.sample(run, 1, steps=1).provenance["run"] == "run"


def test_a_place_for_the_result_that_cannot_be_written_to_is_refused_before_the_work(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medvdm.evaluation.held_out.evaluate_weights", lambda *_, **__: pytest.fail("worked"))
    (path / "results").write_text("")
    with pytest.raises(RunError, match=r"results: is a file; expected a folder"):
        medvdm.evaluate(medvdm.load(path))
    (path / "results").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunError, match="cannot be written to.*save=False"):
        medvdm.evaluate(medvdm.load(path))


def pictures(folder: Path, height: int, width: int) -> Path:
    """A folder of two classes with bright left and right thirds, as files."""
    from PIL import Image

    for number in range(12):
        pixels = np.full((height, width), 100 + number, np.uint8)
        pixels[:, : width // 3] = pixels[:, -(width // 3) :] = 255
        place = folder / "test" / ("No Finding" if number % 2 else "Pneumonia")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_other_data_are_brought_to_the_runs_size_with_its_own_fit(fit: str, path: Path, tmp_path: Path) -> None:
    """Images of 20 x 60 pixels: 'crop' keeps the gray middle third, 'pad' also has white and black."""
    run = medvdm.load(path)
    run = dataclasses.replace(run, config=config_.change(run.config, fit=fit))
    data = load_data(run, "folder", str(pictures(tmp_path / "wide", 20, 60)))
    assert data.image_shape == run.config.model.image_shape
    x = data.read(np.arange(12))
    if fit == "crop":
        assert 95 / 255 < x.min() and x.max() < 120 / 255
    else:
        assert x.min() == 0 and x.max() > 0.9
    assert data.notes[-1] == f"brought to the run's 16x16 pixels, fit '{fit}'"
    found = medvdm.evaluate(run, data, draws=1)
    assert found["notes"][-1] == data.notes[-1] and found["own_data"] is False
    assert data.notes[-1] in evaluation_table(found)


def test_the_runs_own_source_at_another_size_is_resized_like_any_other(path: Path, tmp_path: Path) -> None:
    """A run on a folder of 16 x 16 images meets the same folder's images of 32 x 32."""
    small, large = pictures(tmp_path / "small", 16, 16), pictures(tmp_path / "large", 32, 32)
    run = medvdm.load(path)
    run = dataclasses.replace(run, config=config_.change(run.config, data="folder", data_dir=str(small)))
    own = load_data(run)
    assert own.image_shape == (16, 16, 1) and own.notes == medvdm.data.load(run.config.data).notes
    moved = load_data(run, data_dir=str(small))
    assert moved.fingerprint() == own.fingerprint(), "the same data elsewhere are still the run's own"
    resized = load_data(run, data_dir=str(large))
    assert resized.image_shape == (16, 16, 1) and resized.fingerprint() != own.fingerprint()
    assert medvdm.evaluate(run, resized, draws=1, save=False)["own_data"] is False


def test_another_image_size_than_the_runs_is_refused(path: Path, tmp_path: Path) -> None:
    run = medvdm.load(path)
    assert load_data(run, image_size=16).image_shape == (16, 16, 1)
    with pytest.raises(InputError, match="image_size: 32; expected that of the run's images, 16x16"):
        load_data(run, image_size=32)
    model = dataclasses.replace(run.config.model, image_shape=(16, 20, 1))
    folder = pictures(tmp_path / "own", 16, 20)
    wide = config_.change(dataclasses.replace(run.config, model=model), data="folder", image_size=None)
    run = dataclasses.replace(run, config=config_.change(wide, data_dir=str(folder)))
    assert load_data(run, data_dir=str(folder)).image_shape == (16, 20, 1)
    with pytest.raises(InputError, match=r"images of 32x32 pixels; expected those of the run, 16x20"):
        load_data(run, data_dir=str(pictures(tmp_path / "large", 32, 32)))
    with pytest.raises(InputError, match="image_size: 16; expected that of the run's images, 16x20"):
        load_data(run, image_size=16)


# A model of gray values


@pytest.fixture(scope="module")
def pixels(trained_pixels: Path) -> Run:
    return medvdm.load(trained_pixels)


@pytest.fixture(scope="module")
def measured(pixels: Run) -> dict[str, Any]:
    return medvdm.evaluate(pixels, split="val", draws=2, codecs=True, save=False)


def test_an_eight_bit_run_has_true_bits_and_its_own_yardsticks(pixels: Run, measured: dict[str, Any]) -> None:
    data = load_data(pixels)
    levels = data.levels(data.indices("val"))
    patients = data.patients[data.indices("val")]
    bits = levels[0].size * math.log(2)
    assert measured["likelihood"] == "8-bit"
    assert measured["vlb_bpd"] == pytest.approx(sum(measured[name] for name in TERMS), rel=1e-9)
    gaussian = pixels.gaussian.nats(levels) / bits
    assert measured["gaussian_bpd"] == pytest.approx(gaussian.mean(), rel=1e-9)
    expected = codecs.codec_bits(levels, patients)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert measured["jxl_sheet_bpd"] < measured["jxl_bpd"], "images of 16 x 16 pixels are mostly headers"

    ours = medvdm.bound(pixels, levels, data.labels[data.indices("val")], draws=2).bits_per_dim
    assert ours.mean() == pytest.approx(measured["vlb_bpd"], rel=1e-6)
    jxl = codecs.file_bytes(levels)["jxl"] * 8 / levels[0].size
    for name, theirs in {"gaussian": gaussian, "jxl": jxl}.items():
        assert measured[f"over_{name}_bpd"] == pytest.approx((ours - theirs).mean(), rel=1e-4)
        stderr = clustered_stderr(ours - theirs, patients)
        assert measured[f"over_{name}_bpd_stderr"] == pytest.approx(stderr, rel=1e-4)


def test_keys_that_make_no_sense_are_null_for_either_kind(path: Path, pixels: Run, measured: dict[str, Any]) -> None:
    bernoulli = medvdm.evaluate(medvdm.load(path), split="val", draws=1, save=False)
    assert bernoulli["likelihood"] == "bernoulli" and list(bernoulli) == list(measured)
    for name in ("floor", "excess", "mean_image", "pca64", "lingauss", "over_lingauss", "over_lingauss_bpd_stderr"):
        assert measured[name if name.endswith("stderr") else f"{name}_bpd"] is None, name
    assert measured["psnr_db"] is measured["ssim"] is measured["lingauss_rate_bits_per_image"] is None
    own = [name for name in bernoulli if name.startswith(("gaussian", "over_gaussian", "over_jxl", *codecs.CODECS))]
    assert len(own) == 1 + 2 + 2 + 3 * 4 and all(bernoulli[name] is None for name in own)
    plain = medvdm.evaluate(pixels, split="val", draws=2, save=False)
    others = ("seconds", "over_jxl_bpd", "over_jxl_bpd_stderr")
    for name, value in plain.items():
        if name.startswith((*codecs.CODECS, "over_jxl")):
            assert value is None, name
        elif name not in others:
            assert value == measured[name], name


def test_the_manual_names_every_number(measured: dict[str, Any]) -> None:
    """And says for which kind of model it is null."""
    text = (Path(__file__).parents[2] / "book" / "cli.md").read_text(encoding="utf-8")
    table = text.split("| key | meaning | Bernoulli | 8-bit |\n")[1].split("\n\n")[0].splitlines()[1:]
    told: dict[str, str] = {}
    for line in table:
        keys, _, _, eight_bit = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`([a-z0-9_]+)`", keys)
        if "_stderr" in names and "each with" in keys:
            names = [name for name in names if name != "_stderr"]
            names += [f"{name}_stderr" for name in names]
        told |= dict.fromkeys(names, eight_bit)
    about = "run version step weights own_data batch_size seed notes data split labels seconds".split()
    assert set(told) == set(measured) - set(about)
    for name, eight_bit in told.items():
        assert (measured[name] is None) == (eight_bit == "null"), name


def test_codecs_are_for_gray_values_and_need_their_package(
    path: Path, pixels: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(path)
    with pytest.raises(InputError, match="codecs: a model with a Bernoulli likelihood .*; expected one of 8-bit"):
        medvdm.evaluate(medvdm.load(path), codecs=True)
    assert tree(path) == before
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setattr("medvdm.evaluation.held_out.by_batches", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(MissingPackageError, match=r"pip install 'medvdm\[codecs\]'"):
        medvdm.evaluate(pixels, codecs=True, save=False)


def test_results_with_codecs_and_without_have_files_of_their_own(trained_pixels: Path, tmp_path: Path) -> None:
    """And the card and the table tell both."""
    path = Path(shutil.copytree(trained_pixels, tmp_path / "run"))
    run = medvdm.load(path)
    plain = medvdm.evaluate(run, split="test", draws=2)
    assert "JPEG XL" not in (path / "MODEL_CARD.md").read_text()
    both = medvdm.evaluate(run, split="test", draws=2, codecs=True)
    assert len(list((path / "results").iterdir())) == 2
    card = (path / "MODEL_CARD.md").read_text()
    for name in ("vlb_bpd", "gaussian_bpd", "jxl_bpd", "jxl_sheet_bpd", "over_gaussian_bpd"):
        assert f" {both[name]:.4f} |" in card, name
    assert f"**{both['vlb_bpd']:.2f} bits per pixel**" in card and "gray values from 0 to 255" in card
    for foreign in ("floor", "PCA-64", "mean image", "Bernoulli", "PSNR", "independent given the latent"):
        assert foreign not in card, foreign
    table = evaluation_table(plain)
    assert f"{plain['gaussian_bpd']:.4f} bits/dim" in table and "JPEG XL" not in table


def test_other_gray_values_have_notes_on_their_own_levels(pixels: Run) -> None:
    """Twelve of 256 levels take few bits, and float images were rounded: the result says both."""
    drawn = np.random.default_rng(0).integers(0, 12, (80, 16, 16)) * 20
    data = from_arrays(drawn.astype(np.uint8), splits=["test"] * 80)
    found = medvdm.evaluate(pixels, data, draws=1, null=True, save=False)
    assert any("gray levels between 0 and 220 never occur" in note for note in found["notes"])
    assert "never occur" in evaluation_table(found)
    rounded = from_arrays(np.random.default_rng(0).uniform(size=(8, 16, 16)), splits=["test"] * 8)
    found = medvdm.evaluate(pixels, rounded, draws=1, null=True, save=False)
    assert any("rounded to 256 levels" in note for note in found["notes"])


def test_a_run_without_validation_images_has_no_gaussian(pixels: Run, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    data = from_arrays(drawn, splits=["train"] * 8 + ["test"] * 4)
    fit._prepare(tmp_path, fit.fill_in(pixels.config, data), data, [], None)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "baselines.npz"}
    run = dataclasses.replace(pixels, path=tmp_path, record=json.loads((tmp_path / "config.json").read_text()))
    assert run.gaussian is None
    found = medvdm.evaluate(run, data, draws=1, null=True, save=False)
    assert found["gaussian_bpd"] is found["over_gaussian_bpd"] is None and found["vlb_bpd"] > 0
    assert "Gaussian" not in evaluation_table(found)


def test_the_gaussian_is_that_of_the_training_images_and_is_never_left_alone(
    pixels: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(pixels)
    levels = {split: data.levels(data.indices(split)) for split in ("train", "val")}
    fitted = gaussian_images.fit([levels["train"]], levels["val"])
    assert pixels.gaussian.nats(levels["val"]) == pytest.approx(fitted.nats(levels["val"]), rel=1e-9)
    monkeypatch.setattr(fit, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit._prepare(tmp_path, pixels.config, data, [], None)
    assert not list(tmp_path.iterdir())


def test_a_damaged_gaussian_is_refused(trained_pixels: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(trained_pixels, tmp_path / "run"))
    (path / "gaussian.npz").write_bytes((path / "gaussian.npz").read_bytes()[:100])
    with pytest.raises(RunError, match=r"gaussian\.npz"):
        medvdm.evaluate(medvdm.load(path), draws=1)
    (path / "gaussian.npz").unlink()
    with pytest.raises(RunError, match=r"gaussian\.npz"):
        medvdm.evaluate(medvdm.load(path), draws=1)
