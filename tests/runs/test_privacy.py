"""The audit of a run and of folders: what it gives, what it leaves behind, and what a killed one had done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import tree
from PIL import Image

import medvdm
from medvdm import data as data_
from medvdm.data import DataConfig
from medvdm.errors import DataError, InputError, MissingFileError, RunError
from medvdm.evaluation.privacy import registration
from medvdm.evaluation.privacy.verdict import NO_CERTIFICATE
from medvdm.runs import privacy
from medvdm.runs.config import SampleConfig
from medvdm.runs.privacy import audit_folders, audit_privacy, read_folders
from medvdm.runs.run import Run
from medvdm.runs.sample import sample
from medvdm.runs.store import CARD

#: Little of everything; batches of 8 make three of 20 samples.
FEW: dict[str, Any] = {
    **{"num": 20, "steps": 2, "batch_size": 8},
    **{"draws": 1, "levels": 2, "images": 24, "secrets": 20},
}
TINY = {"steps": 1, "num_images": 120, "visits": 3}
KEYS = {
    *("num_samples", "num_train", "num_held_out", "num_copies", "copies", "false_alarm_rate", "false_alarm_interval"),
    *("threshold", "visits", "spaces", "clusters", "controls", "membership", "canaries", "published"),
    *("version", "settings", "alarms", "verdict", "notes"),
}
SIDE = 48


@pytest.fixture(scope="module", autouse=True)
def few_controls() -> Any:
    """Each control of 10 images instead of 100, and small batches: the last one is filled up."""
    patch = pytest.MonkeyPatch()
    patch.setattr(privacy.controls, "run_controls", partial(privacy.controls.run_controls, num=10))
    patch.setattr(registration, "BATCH", 40)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A latent run with withheld images and canaries."""
    config = tiny.config(**TINY, withhold=8, canaries=4, canary_copies="1,4")
    return medvdm.fit(config, tmp_path_factory.mktemp("latent") / "run", progress=False)


@pytest.fixture(scope="module")
def of_python() -> data_.ImageData:
    """Phantoms as arrays: nothing on disk says where they come from."""
    phantoms = data_.load(DataConfig(num_images=120, image_size=16, visits=3))
    images = np.rint(255 * phantoms.read(np.arange(120))).astype(np.uint8)
    return medvdm.from_arrays(images, phantoms.labels, patients=phantoms.patients)


@pytest.fixture(scope="module")
def pixels(of_python: data_.ImageData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A class-conditional run on pixels, of images given from Python."""
    config = tiny.pixels(steps=1, conditional=True)
    return medvdm.fit(config, tmp_path_factory.mktemp("pixels") / "run", data=of_python, progress=False)


@pytest.fixture(scope="module")
def audited(latent: Run) -> dict[str, Any]:
    """The audit of the latent run, killed before its last part, then finished; with how much was computed each time."""
    patch, counts = pytest.MonkeyPatch(), []
    keeper = privacy._keeper

    def counting(folder: Path) -> Any:
        keep = keeper(folder)

        def one(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
            def counted() -> dict[str, np.ndarray]:
                counts[-1].append(name)
                return compute()

            return keep(name, counted)

        return one

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(privacy, "_keeper", counting)
    patch.setattr(privacy, "_published", kill)
    counts.append([])
    with pytest.raises(KeyboardInterrupt):
        audit_privacy(latent, **FEW)
    patch.undo()
    (parts,) = (latent.path / "privacy").iterdir()
    left = {file.stem for file in parts.iterdir()}
    # Of what is left one part is cut short, one blanked, and one has another byte.
    damaged = ["drawn-1", *sorted(name for name in left if name.startswith("losses"))[:2]]
    for name, damage in zip(damaged, (lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), flipped), strict=True):
        file = parts / f"{name}.npz"
        file.write_bytes(damage(file.read_bytes()))
    patch.setattr(privacy, "_keeper", counting)
    counts.append([])
    result = audit_privacy(latent, **FEW)
    patch.undo()
    return {"result": result, "first": counts[0], "second": counts[1], "left": left, "damaged": damaged, "parts": parts}


def flipped(content: bytes) -> bytes:
    """Another byte in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


# Of a run


def check_result(result: dict[str, Any]) -> None:
    """The keys, numbers that JSON has, and words."""
    assert set(result) >= KEYS
    json.dumps(result, allow_nan=False)
    assert result["verdict"][-1] == NO_CERTIFICATE
    assert 0 <= result["false_alarm_rate"] <= 1


@pytest.mark.slow
def test_a_killed_audit_goes_on_where_it_was(audited: dict[str, Any]) -> None:
    assert audited["left"] == set(audited["first"]) and len(audited["first"]) == len(audited["left"])
    assert {"drawn-0", "drawn-1", "drawn-2", "canary-3"} <= audited["left"]
    # Only what was damaged is computed again; and not the samples, whose small copies are kept.
    assert sorted(audited["second"]) == sorted(set(audited["damaged"]) - {"drawn-1"})
    assert not audited["parts"].exists()


def test_the_audit_of_a_latent_run(latent: Run, audited: dict[str, Any]) -> None:
    result = audited["result"]
    check_result(result)
    counts = latent.record["data"]["counts"]
    assert result["num_samples"] == 20 and result["sampling"]["num"] == 20
    assert result["num_train"] == counts["train"]["images"] - (1 + 4 + 1 + 4), "canaries are no training images"
    assert result["num_held_out"] == counts["val"]["images"] + counts["test"]["images"]
    assert result["visits"] is not None, "phantoms of this run have three visits"
    assert [row["copies"] for row in result["canaries"]["by_copies"]] == [1, 4]
    assert result["canaries"]["references"] == FEW["secrets"]
    assert result["membership"]["other_day_vs_held_out"] is not None, "images were withheld"
    assert result["membership"]["gammas"] == pytest.approx(
        [latent.config.model.gamma_min, latent.config.model.gamma_max], abs=1e-4
    )
    assert result["run"] == latent.name and result["settings"]["secrets"] == 20


def test_the_audit_is_written_and_the_card_says_its_words(latent: Run, audited: dict[str, Any]) -> None:
    (file,) = (latent.path / "privacy").iterdir()
    assert file.name.startswith("1-raw-20x2-seed0-")
    assert json.loads(file.read_text()) == json.loads(json.dumps(audited["result"]))
    card = (latent.path / CARD).read_text()
    assert f"20 samples of step 1, raw weights, against {audited['result']['num_train']} training" in card
    assert "Not audited (" not in card
    for line in audited["result"]["verdict"]:
        assert f"- {line}"[:60] in card
    assert max(map(len, card.split("\n\n"))) > 200, "sections, not single letters"


def test_the_same_numbers_again_and_nothing_written(latent: Run, audited: dict[str, Any]) -> None:
    """Also the route without a folder: what is damaged or kept changes no number."""
    before = tree(latent.path)
    again = audit_privacy(latent, **FEW, save=False)
    assert again == audited["result"]
    assert tree(latent.path) == before


def test_samples_come_batch_by_batch_and_are_those_of_sample(latent: Run) -> None:
    drawing = SampleConfig(num=20, steps=2, batch_size=8)
    kept: dict[str, dict[str, np.ndarray]] = {}

    def keep(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    shelf = privacy._drawn(latent, drawing, keep)
    assert len(shelf) == 20 and not kept, "none is drawn before it is asked for"
    expected = sample(latent, config=drawing).images
    np.testing.assert_allclose(shelf.read(np.array([17, 3, 16])), expected[[17, 3, 16]], atol=1e-6)
    assert sorted(kept) == ["drawn-0", "drawn-2"]
    np.testing.assert_allclose(shelf.read(np.arange(20)), expected, atol=1e-6)
    assert [len(kept[f"drawn-{i}"]["images"]) for i in range(3)] == [8, 8, 4]


@pytest.fixture(scope="module")
def of_pixels(pixels: Run, of_python: data_.ImageData) -> dict[str, Any]:
    return audit_privacy(pixels, of_python, **FEW)


@pytest.mark.slow
def test_the_audit_of_a_run_on_pixels_with_data_from_python(pixels: Run, of_pixels: dict[str, Any]) -> None:
    check_result(of_pixels)
    assert of_pixels["canaries"] is None and of_pixels["membership"]["other_day_vs_held_out"] is None
    assert of_pixels["num_train"] + of_pixels["num_held_out"] == 120
    assert set(of_pixels["published"]) >= {"baselines.npz"}
    assert [file.suffix for file in (pixels.path / "privacy").iterdir()] == [".json"]


def test_data_from_python_have_to_be_given_again(pixels: Run, of_python: data_.ImageData) -> None:
    before = tree(pixels.path)
    with pytest.raises(InputError, match="given from Python"):
        audit_privacy(pixels, **FEW)
    other = dataclasses.replace(of_python, patients=of_python.patients[::-1])
    with pytest.raises(RunError, match="no longer what the run was trained on"):
        audit_privacy(pixels, other, **FEW)
    assert tree(pixels.path) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num": 0}, "num: 0"),
        ({"steps": 0}, "steps: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"label": ("Pneumnia",)}, "label: 'Pneumnia'"),
        ({"alarm": 1.0}, "alarm: 1"),
        ({"images": 5}, "images: 5"),
        ({"draw": 3}, "'draw' is unknown"),
    ],
)
def test_wrong_settings_leave_nothing(changes: dict[str, Any], words: str, latent: Run) -> None:
    before = tree(latent.path)
    with pytest.raises(InputError, match=words) as refusal:
        audit_privacy(latent, **{**FEW, **changes})
    assert len(str(refusal.value).splitlines()) == 1
    assert tree(latent.path) == before


def test_a_null_that_was_not_trained_is_refused_at_once(pixels: Run, of_python: data_.ImageData) -> None:
    training = dataclasses.replace(pixels.config.training, label_dropout=0.0)
    run = dataclasses.replace(pixels, config=dataclasses.replace(pixels.config, training=training))
    before = tree(pixels.path)
    with pytest.raises(RunError, match="its null"):
        audit_privacy(run, of_python, **FEW, label="0")
    assert tree(pixels.path) == before


# By folders


def phantoms(number: int, seed: int, visits: int = 1, side: int = SIDE) -> np.ndarray:
    """(n, side, side) gray values, 8 bits."""
    found = data_.load(DataConfig(num_images=number, image_size=side, data_seed=seed, visits=visits))
    return np.rint(255 * found.read(np.arange(number))[..., 0]).astype(np.uint8)


def write(folder: Path, images: np.ndarray, name: str = "{}.png") -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / name.format(i))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train, held_out (the same names, of others) and samples: others, and noisy copies of three."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    train, others = phantoms(100, 1), phantoms(50, 2)
    write(root / "train", train)
    write(root / "held_out", others[:40])
    noisy = np.clip(train[[5, 50, 95]] + rng.normal(0, 2, (3, SIDE, SIDE)), 0, 255).astype(np.uint8)
    write(root / "samples", np.concatenate([noisy, others[40:]]), "s{}.png")
    return root


def read(root: Path, **changes: Any) -> privacy.Folders:
    given = {name: str(root / name) for name in ("samples", "train", "held_out")}
    return read_folders(**{**given, **changes})


@pytest.fixture(scope="module")
def by_folders(places: Path) -> dict[str, Any]:
    patch = pytest.MonkeyPatch()
    patch.setattr(privacy.controls, "run_controls", lambda *_, **__: {})  # they have their own tests
    result = audit_folders(read(places), work=places / "work")
    patch.undo()
    assert not (places / "work").exists()
    return result


def test_planted_copies_are_found_and_no_others(by_folders: dict[str, Any]) -> None:
    check_result(by_folders)
    assert (by_folders["num_samples"], by_folders["num_train"], by_folders["num_held_out"]) == (13, 100, 40)
    assert by_folders["num_copies"] == 3 and "copies" in by_folders["alarms"]
    found = {one["sample"]: one["training_image"] for one in by_folders["copies"]}
    assert found == {"s0.png": "5.png", "s1.png": "50.png", "s2.png": "95.png"}
    for one in by_folders["copies"]:
        assert one["score"] > one["threshold"] > 0


def test_what_cannot_be_said_without_a_run(by_folders: dict[str, Any]) -> None:
    assert by_folders["membership"] is by_folders["canaries"] is by_folders["published"] is None
    assert by_folders["visits"] is None, "every image is of a patient of its own"
    notes = " | ".join(by_folders["notes"])
    assert "no run: membership cannot be attacked without the weights" in notes
    assert "no training patient has two images" in notes or "one image of each patient" in notes
    assert "train: patients unknown for 100 of 100 images" in notes


def test_equal_names_in_two_folders_are_no_equal_patients(places: Path) -> None:
    """Nothing says whose the images are; '0.png' is in both folders."""
    folders = read(places)
    assert folders.train is not None and folders.held_out is not None
    assert set(folders.train.names) & set(folders.held_out.names)
    assert not set(folders.train.patients) & set(folders.held_out.patients)


def test_an_archive_of_samples_and_images_of_other_sizes(places: Path, tmp_path: Path) -> None:
    """Samples of 24 pixels are brought to the 48 of the training images, from a folder and from an archive."""
    small = phantoms(4, 3, side=24)
    write(tmp_path / "small", small)
    np.savez(tmp_path / "small.npz", images=small[..., None] / np.float32(255))
    of_folder = read(places, samples=str(tmp_path / "small"))
    of_archive = read(places, samples=str(tmp_path / "small.npz"))
    for folders in (of_folder, of_archive):
        assert folders.samples is not None
        assert folders.samples.read(np.arange(4)).shape == (4, SIDE, SIDE, 1)
        assert any(note.startswith("samples: resized from 24 x 24") for note in folders.notes)
    assert of_folder.samples is not None and of_archive.samples is not None
    np.testing.assert_allclose(of_folder.samples.read(np.arange(4)), of_archive.samples.read(np.arange(4)), atol=1e-6)
    everything = read(places, image_size=16)
    assert everything.train is not None and everything.train.read(np.arange(1)).shape == (1, 16, 16, 1)


@pytest.mark.parametrize("missing", ["samples", "train", "held_out"])
def test_all_three_folders_are_needed(missing: str, places: Path) -> None:
    with pytest.raises(InputError, match=f"{missing}: missing"):
        audit_folders(read(places, **{missing: None}))


def refuse(folders: Callable[[], privacy.Folders], words: str, tmp_path: Path) -> None:
    """One line, and no folder for what would have been kept."""
    before = tree(tmp_path)
    with pytest.raises((InputError, DataError, MissingFileError), match=words) as refusal:
        audit_folders(folders(), work=tmp_path / "work")
    assert len(str(refusal.value).splitlines()) == 1
    assert tree(tmp_path) == before


def test_folders_that_cannot_be_used(places: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 4, 4)))
    write(tmp_path / "one", phantoms(5, 9))
    refuse(lambda: read(places, train=str(tmp_path / "empty")), "no images", tmp_path)
    refuse(lambda: read(places, train=str(tmp_path / "nowhere")), "nowhere", tmp_path)
    refuse(lambda: read(places, held_out=str(places / "train" / "1.png")), r"1\.png", tmp_path)
    refuse(lambda: read(places, samples=str(tmp_path / "wrong.npz")), r"wrong\.npz", tmp_path)
    refuse(lambda: read(places, samples=str(tmp_path / "nowhere.npz")), r"nowhere\.npz", tmp_path)
    refuse(lambda: read(places, samples=str(tmp_path / "other.npz")), "'images'", tmp_path)
    refuse(lambda: read(places, patient_pattern="("), "patient_pattern", tmp_path)
    refuse(lambda: read(places, patient_pattern=r"p(\d+)"), "finds no patient", tmp_path)
    refuse(lambda: read(places, patient_pattern=r"(\d+)"), "patient '0' is in the training images", tmp_path)
    refuse(lambda: read(places, held_out=str(tmp_path / "one")), "5 images; expected at least 20", tmp_path)
    refuse(lambda: read(places, held_out=str(places / "train")), "same picture as the training image", tmp_path)


def test_work_that_is_a_file(places: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    with pytest.raises(InputError, match="work: .* is a file"):
        audit_folders(read(places), work=tmp_path / "work")


def test_the_parts_of_a_killed_audit_are_for_the_same_folders_and_settings_only(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = 0

    def killed(*_: Any, keep: Any, **__: Any) -> None:
        def compute() -> dict[str, np.ndarray]:
            nonlocal computed
            computed += 1
            return {"a": np.zeros(1)}

        keep("part", compute)
        raise KeyboardInterrupt

    monkeypatch.setattr(privacy, "audit_copies", killed)
    audits: list[tuple[privacy.Folders, dict[str, Any]]] = [
        (read(places), {}),
        (read(places, samples=str(places / "held_out")), {}),
        (read(places, patient_pattern=r"(\d)"), {}),  # patients by the first digit
        (read(places), {"alarm": 0.02}),
    ]
    for number, (folders, changes) in enumerate(audits, 1):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                audit_folders(folders, work=tmp_path / "work", **changes)
            assert computed == len(list((tmp_path / "work").iterdir())) == number


# A run and folders


def test_given_samples_are_held_against_the_data_of_the_run(
    latent: Run, audited: dict[str, Any], tmp_path: Path
) -> None:
    data = data_.load(latent.config.data)
    train = np.flatnonzero((data.splits == "train") & ~privacy.planted.is_canary(data))
    np.savez(tmp_path / "copies.npz", images=data.read(train[:6]))
    before = set((latent.path / "privacy").iterdir())
    result = audit_privacy(latent, folders=read_folders(str(tmp_path / "copies.npz"), None, None, image_size=16), **FEW)
    check_result(result)
    assert result["sampling"] is None and result["num_samples"] == result["num_copies"] == 6
    assert {one["training_image"] for one in result["copies"]} == {data.ids[i] for i in train[:6]}
    assert result["membership"] == audited["result"]["membership"], "of the weights, whatever the samples"
    (new,) = set((latent.path / "privacy").iterdir()) - before
    assert "given" in new.name
    card = (latent.path / CARD).read_text()
    assert "6 samples that were given, and the weights of step 1" in card and "20 samples of step 1" in card


def test_folders_that_do_not_fit_the_run(latent: Run, places: Path) -> None:
    before = tree(latent.path)
    with pytest.raises(InputError, match="samples: images of 48x48x1; expected those of the run, 16x16x1"):
        audit_privacy(latent, folders=read(places, train=None, held_out=None), **FEW)
    with pytest.raises(InputError, match="held_out: missing"):
        audit_privacy(latent, folders=read(places, held_out=None, image_size=16), **FEW)
    assert tree(latent.path) == before
