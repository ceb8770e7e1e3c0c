"""A run for release: it draws the same images, and holds nothing that need not leave."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from helpers import STEPS, Trained, refused, said, tree
from PIL import Image

import medvdm
from medvdm.errors import InputError, MissingFileError, RunError
from medvdm.runs import export as export_
from medvdm.runs.export import export
from medvdm.runs.store import CARD, CONFIG, RESULTS, write_json

SECRETS = {
    "folder": "st_mary_2024",
    "class": "Pseudonymitis",
    "pattern": "(PAT[0-9]+)_",
    "seed": 918273,
}


@pytest.fixture(scope="module")
def of_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional run without averages, on image files, in whose names are patients."""
    place = tmp_path_factory.mktemp("private")
    images = place / SECRETS["folder"]
    rng = np.random.default_rng(0)
    for number in range(24):
        name = SECRETS["class"] if number % 2 else "healthy"
        (images / name).mkdir(parents=True, exist_ok=True)
        gray = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(gray).save(images / name / f"PAT{number}_{number}.png")
    settings = {"data": "folder", "data_dir": str(images), "patient_pattern": SECRETS["pattern"]}
    more = {"conditional": False, "steps": 2, "batch_size": 4, "seed": SECRETS["seed"], "ema_decay": 0.0}
    medvdm.fit(tiny.config(**settings, **more), place / "secret-name", progress=False)
    return place / "secret-name"


@pytest.fixture(scope="module")
def released(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The averaged weights of the shared run, which is conditional; for tests that only read it."""
    out = tmp_path_factory.mktemp("released") / "demo"
    export(trained.path, out)
    return out


@pytest.mark.parametrize("ema", [True, False])
def test_it_draws_bit_for_bit_what_the_run_draws(trained: Trained, ema: bool, tmp_path: Path) -> None:
    made = export(trained.path, tmp_path / "out", ema=ema)
    run, again = medvdm.load(trained.path, ema=ema), medvdm.load(tmp_path / "out")
    assert made.path == tmp_path / "out"
    assert (made.weights, made.step) == (again.weights, again.step) == ("ema" if ema else "raw", STEPS)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(run.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    drawn, expected = (medvdm.sample(r, 2, steps=3, label="Pneumonia", seed=5) for r in (again, run))
    np.testing.assert_array_equal(drawn.images, expected.images)
    assert drawn.provenance == expected.provenance | {"run": "out", "data_fingerprint": None}
    assert drawn.class_names == expected.class_names
    if ema:
        assert medvdm.load(tmp_path / "out", ema=True, step=STEPS).weights == "ema"
    else:
        with pytest.raises(RunError, match=r"out: exported for release with its raw weights only; expected no --ema"):
            medvdm.load(tmp_path / "out", ema=True)
    for step in (3, "best"):
        with pytest.raises(RunError, match=f"exported for release at step {STEPS} only"):
            medvdm.load(tmp_path / "out", step=step)


@pytest.mark.slow
def test_a_released_diffusion_on_pixels_fills_in_what_the_run_does(trained_pixels: Path, tmp_path: Path) -> None:
    run = medvdm.load(trained_pixels)
    export(trained_pixels, tmp_path / "out", ema=False)
    images = np.full((1, 16, 16), 128, np.uint8)
    mask = np.eye(16, dtype=bool)
    found, expected = (medvdm.inpaint(r, images, mask, steps=2) for r in (medvdm.load(tmp_path / "out"), run))
    np.testing.assert_array_equal(found, expected)


def test_nothing_of_the_data_leaves_but_what_was_said(of_folder: Path, tmp_path: Path) -> None:
    run = medvdm.load(of_folder)
    record = json.dumps(run.record)
    for secret in (*SECRETS.values(), run.record["data"]["fingerprint"]):
        assert json.dumps(secret).strip('"') in record, "else its absence below would say nothing"
    assert any(SECRETS["pattern"] in note for note in run.record["data"]["notes"])
    assert export(of_folder, tmp_path / "out").weights == "raw"  # it keeps no average
    assert sorted(os.listdir(tmp_path / "out")) == ["MODEL_CARD.md", "config.json", "weights.npz"]
    words = [str(secret).encode() for secret in SECRETS.values()]
    words += [run.record["data"]["fingerprint"].encode(), b"secret-name", str(of_folder.parent).encode(), b"healthy"]
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for word in words:
            assert word not in content, (path.name, word)
    arrays = np.load(tmp_path / "out/weights.npz")
    shapes = jax.tree.map(np.shape, run.params)
    assert sorted(arrays[name].shape for name in arrays) == sorted(
        jax.tree.leaves(shapes, is_leaf=lambda s: isinstance(s, tuple))
    ), "one array per weight: no moment of the optimiser"
    again = medvdm.load(tmp_path / "out")
    assert again.config.training == dataclasses.replace(run.config.training, seed=0)
    assert again.config.model == run.config.model and again.class_names == ()
    drawn, expected = (medvdm.sample(r, 2, steps=2).images for r in (again, run))
    np.testing.assert_array_equal(drawn, expected)


def test_the_card_has_the_results_and_says_what_was_left_out(trained: Trained, run: Path, tmp_path: Path) -> None:
    """Of the released weights, where there are any; of others, it says so."""
    note = "one of 3 files: PAT7431.png is damaged"
    result = {"split": "test", "vlb_bpd": 0.9, "excess_bpd": 0.1234, "num_images": 7, "num_patients": 4}
    (run / RESULTS).mkdir(exist_ok=True)
    common = {"data": "others", "own_data": False, "notes": [note], "step": STEPS}
    write_json(run / RESULTS / "raw.json", result | common | {"weights": "raw"})
    made = export(run, tmp_path / "a")
    assert any("evaluations in the card are of other weights" in one for one in made.notes)
    card = (tmp_path / "a" / CARD).read_text("utf8")
    assert "0.1234" in card and "PAT7431" not in card and "Note: the evaluations in the card" in card
    write_json(run / RESULTS / "ema.json", result | common | {"weights": "ema", "excess_bpd": 0.4321})
    made = export(run, tmp_path / "b")
    card = (tmp_path / "b" / CARD).read_text("utf8")
    assert "0.4321" in card and "0.1234" not in card and not any("evaluations" in one for one in made.notes)
    for words in ("## What was released", "averaged weights of step 12", "Left out:", "Still in:", "not anonymous"):
        assert words in card
    assert '"seed"' not in card.split("## All settings")[1].split('"training"')[1].split("}")[0]
    assert "Terms of the last training step" not in card  # they are of one batch
    original = (trained.path / CARD).read_text("utf8")
    assert "What was released" not in original and '"seed": 0' in original


def test_the_card_and_a_note_tell_of_a_privacy_audit_and_of_canaries(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "a")
    assert any(one.startswith("no privacy audit") for one in made.notes)
    assert "no privacy audit" in (tmp_path / "a" / CARD).read_text("utf8")
    (run / "privacy").mkdir()
    write_json(run / "privacy" / "x.json", {"verdict": ["no leak was found"], "step": STEPS, "losses": [0.123456789]})
    (run / "privacy" / "half.json").write_text('{"verd')
    record = json.loads((run / CONFIG).read_text())
    record["notes"].append("3 canaries were planted: canary-0007")
    (run / CONFIG).write_text(json.dumps(record))
    made = export(run, tmp_path / "b")
    assert [one.split(",")[0] for one in made.notes] == ["canaries were planted into the training images"]
    card = (tmp_path / "b" / CARD).read_text("utf8")
    assert "- no leak was found" in card and f"step {STEPS}" in card and "0.123456789" not in card
    assert "Note: canaries were planted" in card


def test_commands_that_need_what_is_missing_say_why(
    released: Path, trained_pixels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(released)
    for command in (
        ["evaluate", released],
        ["evaluate", released, "--data", "phantom"],
        ["audit", released],
        ["audit", released, "--data-dir", tmp_path],
        ["train", "--out", released, "--resume"],
        ["export", released, "--out", tmp_path / "again"],
    ):
        refused(capfd, *command, names=[str(released), "exported for release"])
    refused(capfd, "train", "--out", released, *tiny.options(), names=["holds a run already"])
    export(trained_pixels, tmp_path / "pixels")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "film.png")
    refused(capfd, "score", tmp_path / "pixels", tmp_path / "film.png", names=["exported for release"])
    assert tree(released) == before and not (tmp_path / "again").exists()
    said(capfd, "sample", released, "--num", "2", "--steps", "2", "--out", tmp_path / "s.dcm")
    out, _ = said(capfd, "verify", tmp_path / "s-1.dcm")
    assert "run demo" in out and "weights ema" in out


def test_the_command(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, err = said(capfd, "export", trained.path, "--out", tmp_path / "out", "--no-ema")
    assert out == f"step {STEPS}, raw weights, for release: {tmp_path / 'out'}\n"
    assert len(err.splitlines()) == 1 and err.startswith("note: no privacy audit of this run")


def test_places_that_cannot_be_are_refused_and_nothing_is_written(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    for name, error, words in (
        ("full", InputError, "holds something already"),
        ("file", InputError, "is a file"),
        ("no/where", MissingFileError, "no is not there"),
    ):
        with pytest.raises(error, match=words):
            export(trained.path, tmp_path / name)
    with pytest.raises(MissingFileError, match="expected the folder of a run"):
        export(tmp_path / "full", tmp_path / "out")
    with pytest.raises(MissingFileError, match="keep-best"):
        export(trained.path, tmp_path / "out", step="best")
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    export(trained.path, tmp_path / "empty")
    assert medvdm.load(tmp_path / "empty").step == STEPS


@pytest.mark.parametrize("where", ["write_weights", "_record", "write_json", "write_card", "os.replace"])
@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    where: str, problem: BaseException, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise problem

    name = where.rpartition(".")[2]
    monkeypatch.setattr(os if where.startswith("os.") else export_, name, fail)
    with pytest.raises(type(problem)):
        export(trained.path, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_those_of_the_record_are_refused(released: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "copy"))
    content = bytearray((folder / "weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.npz").write_bytes(bytes(content))
    with pytest.raises(RunError, match=r"weights\.npz: SHA-256 .*expected"):
        medvdm.load(folder)
    (folder / "weights.npz").unlink()
    with pytest.raises(MissingFileError, match=re.escape(str(folder / "weights.npz"))):
        medvdm.load(folder)
