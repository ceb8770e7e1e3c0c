"""Bad input: exit code 2, one line on stderr that names what is wrong, no traceback, and nothing half-written."""

from __future__ import annotations

import csv
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import numpy as np
import pytest
import tiny
from helpers import Trained, assert_refused, refused, tree
from PIL import Image

import medvdm
from medvdm.errors import MissingFileError, RunError
from medvdm.models import vdm
from medvdm.runs import config as config_
from medvdm.runs.config import RunConfig
from medvdm.runs.store import read_record
from medvdm.training.checkpoints import Checkpoints
from medvdm.training.step import TrainState, init_state

COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
Usage = namedtuple("Usage", "total used free")


# Settings


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--steps -5", ["steps: -5"]),
        ("--steps 0", ["steps: 0"]),
        ("--steps ten", ["--steps", "'ten'"]),
        ("--steps 2.5", ["--steps", "'2.5'"]),
        ("--steps", ["--steps"]),
        ("--batch-size 0", ["batch_size: 0"]),
        ("--batch-size -8", ["batch_size: -8"]),
        ("--batch-size 500", ["batch_size: 500", "training images"]),
        ("--gamma-min 2 --gamma-max 1", ["gamma_min: 2.0", "gamma_max: 1.0"]),
        ("--gamma-min 1 --gamma-max 1", ["gamma_min: 1.0", "gamma_max: 1.0"]),
        ("--gamma-min nan", ["gamma_min", "nan"]),
        ("--gamma-min -200 --gamma-max 200", ["-200.0, 200.0", "within +-33.3"]),
        ("--dtype float16", ["float16", "float32, bfloat16"]),
        ("--gamma-max inf", ["gamma_max", "inf"]),
        ("--learning-rate nan", ["learning_rate: nan"]),
        ("--weight-decay inf", ["weight_decay: inf"]),
        ("--ema-decay nan", ["ema_decay: nan"]),
        ("--ema-decay 1", ["ema_decay: 1.0"]),
        ("--clip-norm -1", ["clip_norm: -1.0"]),
        ("--label-dropout 1.5", ["label_dropout: 1.5"]),
        ("--gradient-difference-weight nan", ["gradient_difference_weight: nan"]),
        ("--latent 0", ["latent: 0"]),
        ("--embedding-dim 7", ["embedding_dim: 7"]),
        ("--timesteps -1", ["timesteps: -1"]),
        ("--score-layers -1", ["score_layers: -1"]),
        ("--seed -1", ["seed: -1"]),
        ("--crop -1", ["crop: -1"]),
        ("--crop 8", ["crop: 8", "'residual'", "'unet'"]),
        ("--architecture unet --crop 17", ["crop: 17", "at most 16"]),
        ("--architecture unet --crop 2", ["crop: 2", "at least 4"]),
        ("--architecture unet --augment-size 0.1", ["augment_size: 0.1", "8-bit"]),
        ("--architecture unet --scales 5", ["image_shape: (16, 16, 1)", "at least 32"]),
        ("--architecture unet --details contrats", ["details: 'contrats'", "'contrast'"]),
        ("--architecture unet --attention --width 3 --scales 1", ["width: 3", "multiple of 4"]),
        ("--schedule fixed-liner", ["schedule", "'fixed-liner'", "fixed-linear"]),
        ("--dtype float23", ["dtype", "'float23'", "float32"]),
        ("--fit squash", ["fit", "'squash'", "stretch"]),
        ("--image-size 0", ["image_size: 0"]),
        ("--image-size nan", ["--image-size", "'nan'"]),
        ("--num-images 0", ["num_images: 0"]),
        ("--data-seed -1", ["seed: -1"]),
        ("--keep-checkpoints 0", ["keep_checkpoints: 0"]),
        ("--checkpoint-every -1", ["checkpoint_every: -1"]),
        ("--data phantm", ["data: 'phantm'", "did you mean 'phantom'?"]),
        ("--data pneumonia", ["data: 'pneumonia'", "did you mean 'pneumoniamnist'?"]),
        ("--preset papr", ["preset: 'papr'", "did you mean 'paper'?"]),
        ("--preset", ["--preset"]),
        ("--data nih", ["data_dir", "--data-dir"]),
        ("--data folder", ["data_dir", "--data-dir"]),
        ("--data-dir somewhere", ["data_dir: 'somewhere'", "phantom"]),
        ("--patient-pattern (.)", ["patient_pattern"]),
        ("--visits 0", ["visits: 0"]),
        ("--withhold -1", ["withhold: -1"]),
        ("--canaries -1", ["canaries: -1"]),
        ("--canaries 2 --canary-copies 1,0", ["canary_copies: '1,0'"]),
        ("--canary-copies 2", ["canary_copies: '2'", "--canaries"]),
        ("--canaries 2 --image-size 15", ["15 x 15", "16"]),
        ("--lerning-rate 1", ["--lerning-rate"]),
        ("--image-shape 4 4 1", ["--image-shape"]),
        ("surplus", ["surplus"]),
    ],
)
def test_settings(options: str, names: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(capfd, "train", *tiny.options(), "--out", tmp_path / "run", *options.split(), names=names)
    assert len(line) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["9" * 20, str(2**63)])
def test_a_seed_of_too_many_bits(seed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "train", *tiny.options(seed=seed), "--out", tmp_path / "run", names=["seed", seed])
    assert not list(tmp_path.iterdir())


def test_out_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capfd, "train", *tiny.options(), names=["--out"])
    assert not list(tmp_path.iterdir())


def test_out_is_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    refused(capfd, "train", *tiny.options(), "--out", tmp_path / "file", names=[str(tmp_path / "file"), "folder"])
    refused(capfd, "train", *tiny.options(), "--out", tmp_path / "file" / "below", names=[str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


# Data


def noise(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path)
    return path


def folder_of_images(folder: Path, n: int = 40) -> Path:
    for i in range(n):
        noise(folder / "ab"[i % 2] / f"{i:03}.png", seed=i)
    return folder


def nih(folder: Path, columns: tuple[str, ...] = COLUMNS, prefix: str = "", n: int = 40) -> Path:
    rows = [{"Image Index": f"{prefix}{i:03}.png", "Finding Labels": "Mass", "Patient ID": str(i)} for i in range(n)]
    for i in range(n):
        noise(folder / "images" / f"{i:03}.png", seed=i)
    with (folder / "Data_Entry_2017.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def missing(folder: Path) -> list[str]:
    return ["--data", "folder", "--data-dir", str(folder / "nowhere")]


def nih_missing(folder: Path) -> list[str]:
    return ["--data", "nih", "--data-dir", str(folder / "nowhere")]


def medmnist_missing(folder: Path) -> list[str]:
    return ["--data", "pneumoniamnist", "--data-dir", str(folder / "nowhere")]


def medmnist_damaged(folder: Path) -> list[str]:
    (folder / "pneumoniamnist.npz").write_bytes(b"PK\x03\x04 and no more")
    return ["--data", "pneumoniamnist", "--data-dir", str(folder / "pneumoniamnist.npz")]


def empty(folder: Path) -> list[str]:
    return ["--data", "folder", "--data-dir", str(folder)]


def nih_empty(folder: Path) -> list[str]:
    return ["--data", "nih", "--data-dir", str(folder)]


def a_file(folder: Path) -> list[str]:
    return ["--data", "folder", "--data-dir", str(noise(folder / "image.png"))]


def zero_bytes(folder: Path) -> list[str]:
    (folder_of_images(folder) / "a" / "020.png").write_bytes(b"")
    return ["--data", "folder", "--data-dir", str(folder)]


def truncated(folder: Path) -> list[str]:
    image = folder_of_images(folder) / "a" / "020.png"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return ["--data", "folder", "--data-dir", str(folder)]


def nih_truncated(folder: Path) -> list[str]:
    image = nih(folder) / "images" / "020.png"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return ["--data", "nih", "--data-dir", str(folder)]


def text(folder: Path) -> list[str]:
    (folder_of_images(folder) / "a" / "020.png").write_text("I am no image")
    return ["--data", "folder", "--data-dir", str(folder)]


def sizes(folder: Path) -> list[str]:
    noise(folder_of_images(folder) / "a" / "020.png", size=(16, 20))
    return ["--data", "folder", "--data-dir", str(folder), "--image-size", "None"]


def no_label_file(folder: Path) -> list[str]:
    (nih(folder) / "Data_Entry_2017.csv").unlink()
    return ["--data", "nih", "--data-dir", str(folder)]


def other_labels(folder: Path) -> list[str]:
    return ["--data", "nih", "--data-dir", str(nih(folder, prefix="other_"))]


def lacking(column: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        return ["--data", "nih", "--data-dir", str(nih(folder, tuple(c for c in COLUMNS if c != column)))]

    return make


def no_training_images(folder: Path) -> list[str]:
    for i in range(10):
        noise(folder / "test" / "a" / f"{i}.png", seed=i)
    return ["--data", "folder", "--data-dir", str(folder)]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        pytest.param(make, names, id=name)
        for name, make, names in [
            ("missing", missing, ["nowhere"]),
            ("nih missing", nih_missing, ["nowhere"]),
            ("medmnist missing", medmnist_missing, ["nowhere"]),
            ("medmnist damaged", medmnist_damaged, ["pneumoniamnist.npz"]),
            ("empty", empty, ["data", "no images"]),
            ("nih empty", nih_empty, ["data", "Data_Entry_2017.csv"]),
            ("a file", a_file, ["image.png"]),
            ("zero bytes", zero_bytes, ["020.png"]),
            ("truncated", truncated, ["020.png"]),
            ("nih truncated", nih_truncated, ["020.png"]),
            ("text", text, ["020.png"]),
            ("several sizes", sizes, ["020.png", "--image-size", "20 x 16", "16 x 16"]),
            ("no label file", no_label_file, ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"]),
            ("labels of other images", other_labels, ["Data_Entry_2017.csv"]),
            *((f"no column {c}", lacking(c), ["Data_Entry_2017.csv", repr(c)]) for c in COLUMNS),
            ("no training images", no_training_images, ["'train'", "no images"]),
        ]
    ],
)
def test_data(
    make: Callable[[Path], list[str]], names: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    options = make(folder)
    before = tree(tmp_path)
    refused(capfd, "train", *tiny.options(), *options, "--out", tmp_path / "deep" / "run", names=names)
    assert tree(tmp_path) == before


def test_the_data_of_the_cases_above_are_good_without_their_fault(tmp_path: Path) -> None:
    """Otherwise they would be refused for another reason."""
    for name, make in (("folder", folder_of_images), ("nih", nih)):
        data = medvdm.data.load(medvdm.DataConfig(data=name, data_dir=str(make(tmp_path / name))))
        assert len(data.indices("train")) >= 8


def test_an_unreadable_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in, as no folder is unreadable to root."""
    closed = folder_of_images(tmp_path / "data") / "b"
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    options = ["--data", "folder", "--data-dir", tmp_path / "data", "--out", tmp_path / "run"]
    refused(capfd, "train", *tiny.options(), *options, names=[str(closed), "Permission denied"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_truncated_image_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Once with everything a user sees, warnings of libraries included."""
    folder = tmp_path / "data"
    done = tiny.medvdm_command("train", *tiny.options(), *truncated(folder), "--out", tmp_path / "run")
    assert_refused(done.returncode, done.stdout, done.stderr, ["020.png"])
    assert not (tmp_path / "run").exists()


# Runs


def test_out_that_holds_a_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(run)
    refused(capfd, "train", *tiny.options(), "--out", run, names=[str(run), "--resume"])
    assert tree(run) == before


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--learning-rate 0.5", ["learning_rate: 0.5", "expected 0.01"]),
        ("--steps 10", ["steps: 10", "expected 12"]),
        ("--preset paper", ["preset: 'paper'", "'demo'"]),
        ("--no-conditional", ["conditional: False"]),
        ("--latent 5", ["latent: 5", "expected 4"]),
        ("--data-seed 3", ["data_seed: 3"]),
        ("--seed 3", ["seed: 3"]),
    ],
)
def test_resume_with_what_would_change_the_run(
    options: str, names: list[str], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(run)
    refused(capfd, "train", "--out", run, "--resume", *options.split(), names=names)
    assert tree(run) == before


def test_resume_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "train", *tiny.options(), "--out", tmp_path / "run", "--resume", names=[str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--num", "0"], ["num: 0"]),
        (["--num", "-3"], ["num: -3"]),
        (["--steps", "0"], ["steps: 0"]),
        (["--seed", "-1"], ["seed: -1"]),
        (["--seed", str(2**40)], ["seed", str(2**40)]),
        (["--label", "Pneumnia"], ["label: 'Pneumnia'", "did you mean 'Pneumonia'?"]),
        (["--guidance", "2"], ["guidance: 2.0", "label"]),
        (["--guidance", "nan", "--label", "Pneumonia"], ["guidance: nan"]),
        (["--guidance", "strong"], ["--guidance", "'strong'"]),
        (["--out", "{}/images.jpg"], ["images.jpg", ".png"]),
        (["--out", "{}/images.d"], ["images.d", ".npz"]),
        (["--out", "{}/file"], ["file: is a file", "folder"]),
        (["--out", "{}/nowhere/images/"], ["nowhere"]),
        (["--out", "{}/nowhere/images.npz"], ["nowhere"]),
        (["--out", "{}/folder.npz"], ["folder.npz"]),
    ],
)
def test_sample(
    options: list[str], names: list[str], trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    options = [option.format(tmp_path) for option in options]
    refused(capfd, "sample", trained.path, "--out", tmp_path / "images.npz", *options, names=names)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["verify"], ["FILE: none given"]),
        (["verify", "--json"], ["FILE: none given"]),
        (["verify", "a.png", "--jsn"], ["--jsn", "--json"]),
        (["export", "{run}"], ["--out"]),
        (["export", "{run}", "--out", ""], ["out: ''"]),
        (["export", "{run}", "--out", "{here}/full"], ["full", "holds something already"]),
        (["export", "{run}", "--out", "{run}"], ["holds something already"]),
        (["export", "{run}", "--out", "{here}/full/file"], ["file", "is a file"]),
        (["export", "{run}", "--out", "{here}/no/where"], ["no is not there"]),
        (["export", "{here}/no", "--out", "{here}/out"], ["config.json: not found"]),
        (["export", "{run}", "--out", "{here}/out", "--step", "3"], ["no checkpoint of step 3"]),
        (["export", "{run}", "--out", "{here}/out", "--step", "bets"], ["--step", "'bets'"]),
    ],
)
def test_verify_and_export(
    arguments: list[str], names: list[str], trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = tree(tmp_path)
    refused(capfd, *(word.format(run=trained.path, here=tmp_path) for word in arguments), names=names)
    assert tree(tmp_path) == before


def test_sample_without_out(trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "sample", trained.path, names=["--out"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--split", "tets"], ["split: 'tets'", "did you mean 'test'?"]),
        (["--data", "phantm"], ["data: 'phantm'", "did you mean 'phantom'?"]),
        (["--data", "nih"], ["--data-dir"]),
        (["--data-dir", "somewhere"], ["data_dir"]),
        (["--draws", "0"], ["draws: 0"]),
        (["--batch-size", "0"], ["batch_size: 0"]),
        (["--seed", "-1"], ["seed: -1"]),
    ],
)
def test_evaluate(options: list[str], names: list[str], run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(run)
    refused(capfd, "evaluate", run, *options, names=names)
    assert tree(run) == before


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("RUN --samples s", ["--samples: s", "--privacy"]),
        ("RUN --held-out h", ["--held-out: h", "--privacy"]),
        ("RUN --work w", ["--work: w", "--privacy"]),
        ("RUN --alarm 0.1", ["--alarm: 0.1", "--privacy"]),
        ("", ["RUN: missing"]),
        ("--privacy", ["samples: missing"]),
        ("--privacy --samples nowhere", ["nowhere"]),
        ("--privacy --train FILE", ["image.png"]),
        ("--privacy --train FOLDER", ["has no images"]),
        ("--privacy --ema", ["--ema: True", "run"]),
        ("--privacy --data-dir d", ["--data-dir: d", "run"]),
        ("--privacy --steps 5", ["--steps: 5", "drawn"]),
        ("RUN --privacy --work w", ["--work: w", "without a run"]),
        ("RUN --privacy --split val", ["--split: val", "held-out"]),
        ("RUN --privacy --samples s.npz --num 5", ["--num: 5", "drawn"]),
        ("RUN --privacy --patient-pattern (.)", ["--patient-pattern: (.)", "--train"]),
        ("RUN --privacy --image-size 32", ["--image-size: 32", "16x16"]),
        ("RUN --privacy --num-processes 2", ["--num-processes: 2", "one process"]),
        ("RUN --privacy --alarm 1", ["alarm: 1"]),
        ("RUN --privacy --num 0", ["num: 0"]),
        ("RUN --privacy --label Pneumnia", ["label: 'Pneumnia'", "did you mean 'Pneumonia'?"]),
        ("RUN --privacy", ["held_out: ", "at least 20"]),
    ],
)
def test_audit_of_privacy(
    options: str, names: list[str], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    noise(tmp_path / "image.png")
    before = tree(tmp_path)
    places = {"RUN": run, "FILE": tmp_path / "image.png", "FOLDER": tmp_path / "empty"}
    refused(capfd, "audit", *(places.get(word, word) for word in options.split()), names=names)
    assert tree(tmp_path) == before


def test_evaluate_a_split_with_no_images(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        noise(tmp_path / "data" / "train" / "a" / f"{i}.png", seed=i)
    options = ["--data", "folder", "--data-dir", tmp_path / "data", "--null"]
    refused(capfd, "evaluate", run, *options, names=["'test'", "no images"])
    assert not (run / "results").exists()


def test_ema_of_a_run_without(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "config.json").read_text())
    record["config"]["training"]["ema_decay"] = 0.0
    (run / "config.json").write_text(json.dumps(record))
    refused(capfd, "evaluate", run, "--ema", names=[str(run), "ema"])


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_no_run_there(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    more = ["--out", tmp_path / "a.npz"] if command == "sample" else []
    for name in ("nowhere", "folder", "file"):
        refused(capfd, command, tmp_path / name, *more, names=[str(tmp_path / name)])
    assert not (tmp_path / "a.npz").exists() and not (tmp_path / "nowhere").exists()


# Damaged runs


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', '{"config": {}}', "\0\0\0"])
def test_a_damaged_record(content: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text(content)
    refused(capfd, "evaluate", run, names=["config.json"])
    refused(capfd, "train", "--out", run, "--resume", names=["config.json"])


def test_no_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints" / "12")
    refused(capfd, "evaluate", run, names=["checkpoint"])
    shutil.rmtree(run / "checkpoints")
    refused(capfd, "sample", run, "--out", run / "a.npz", names=["checkpoints"])
    assert not (run / "a.npz").exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "latent", 5),
        ("model", "encoder_width", 24),
        ("model", "inner_width", 8),
        ("model", "score_layers", 2),
        ("model", "decoder_layers", 0),
        ("model", "classes", 3),
        ("model", "image_shape", [16, 8, 1]),
        ("model", "schedule", "learned-linear"),
    ],
)
def test_a_checkpoint_of_another_config(
    part: str, name: str, value: Any, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "config.json").read_text())
    assert record["config"][part][name] != value
    record["config"][part][name] = value
    (run / "config.json").write_text(json.dumps(record))
    before = tree(run)
    refused(capfd, "evaluate", run, names=[str(run / "checkpoints" / "12"), "config"])
    assert tree(run) == before


@functools.cache
def state_like(config: RunConfig) -> TrainState:
    """The shapes of a checkpoint's arrays."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(config.model, config.training))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def whole_state(path: Path) -> list[np.ndarray]:
    """All arrays of a run's newest checkpoint: weights, average, optimiser."""
    config = read_record(path)[1]
    like, settings = state_like(config), config_.fingerprint(config)
    with Checkpoints(path / "checkpoints", settings=settings, create=False) as checkpoints:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.restore(like))]


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def blank(file: Path) -> None:
    """As long as it was, but zeros: what a power cut can leave."""
    file.write_bytes(bytes(file.stat().st_size))


def corrupt(file: Path) -> None:
    """Another byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


# Orbax leaves the other reads of a checkpoint to themselves when one has failed.
@pytest.mark.parametrize(
    ("damage", "parts"),
    [(halve, ("params", "ema", "opt_state")), (blank, ("params",)), (Path.unlink, ("params",))],
)
def test_no_damaged_checkpoint_loads_with_wrong_weights(
    damage: Callable[[Path], None], parts: tuple[str, ...], trained: Trained, tmp_path: Path
) -> None:
    """Every file in turn: the checkpoint is refused, or (a file that is not needed) every array is as it was."""
    good = whole_state(trained.path)
    step = trained.path / "checkpoints" / "12"
    files = [
        p
        for p in sorted(step.rglob("*"))
        if p.is_file() and (p.parent == step or p.relative_to(step).parts[0] in parts)
    ]
    refusals = set()
    for file in files:
        copy = Path(shutil.copytree(trained.path, tmp_path / "copy"))
        damage(copy / file.relative_to(trained.path))
        try:
            state = whole_state(copy)
        except RunError as problem:
            assert str(copy / "checkpoints") in str(problem) and len(str(problem).splitlines()) == 1
            refusals.add(file)
        else:
            assert len(state) == len(good)
            for a, b in zip(state, good, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=str(file))
        shutil.rmtree(copy)
    for part in parts:
        here = [file for file in files if file.is_relative_to(step / part)]
        assert max(here, key=lambda file: file.stat().st_size) in refusals, "the arrays themselves are needed"
        assert len(refusals & set(here)) > 2
    gc.collect()


def test_a_flipped_byte_in_the_weights_is_noticed(run: Path) -> None:
    files = [file for file in (run / "checkpoints" / "12" / "params").rglob("*") if file.is_file()]
    corrupt(max(files, key=lambda file: file.stat().st_size))
    with pytest.raises(RunError):
        whole_state(run)


def test_a_checkpoint_of_other_settings_of_the_same_shapes_is_refused(run: Path) -> None:
    config = run / "config.json"
    record = json.loads(config.read_text())
    record["config"]["model"]["gamma_max"] += 1.0
    config.write_text(json.dumps(record))
    with pytest.raises(RunError, match="belongs to settings"):
        medvdm.load(run)


def test_a_truncated_checkpoint_on_the_command_line(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for file in (run / "checkpoints" / "12" / "params").rglob("*"):
        if file.is_file():
            halve(file)
    before = tree(run)
    refused(capfd, "sample", run, "--out", run / "a.npz", names=[str(run / "checkpoints" / "12")])
    assert tree(run) == before
    refused(capfd, "train", "--out", run, "--resume", "--no-progress", names=[str(run / "checkpoints" / "12")])
    assert tree(run) == before
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [blank, Path.unlink])
def test_a_damaged_checkpoint_in_a_process_of_its_own(
    damage: Callable[[Path], None], run: Path, tmp_path: Path
) -> None:
    """Where the threads of TensorStore, and Python's own exit, could print more than the one line."""
    for file in (run / "checkpoints" / "12" / "params").rglob("d/*"):
        damage(file)
    done = tiny.medvdm_command("sample", run, "--out", tmp_path / "a.npz")
    assert_refused(done.returncode, done.stdout, done.stderr, [str(run / "checkpoints" / "12")])
    assert not (tmp_path / "a.npz").exists()


# Disks


def test_a_disk_that_cannot_hold_the_checkpoints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    refused(capfd, "train", *tiny.options(), "--out", tmp_path / "deep" / "run", names=[str(tmp_path), "MB free"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size; needs root on Linux."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root on Linux only")
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        point = tmp_path / f"disk-{size}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(point)
        return point

    yield mount
    for point in mounted:
        subprocess.run(["umount", point], check=True)


def test_a_disk_too_small_to_start(
    small_disk: Callable[[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("32k")
    refused(capfd, "train", *tiny.options(), "--out", disk / "run", names=[str(disk), "MB free"])
    assert not list(disk.iterdir())
    # The same where the estimate is wrong: the baselines do not fit.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))
    refused(capfd, "train", *tiny.options(), "--no-progress", "--out", disk / "run", names=[str(disk), "space"])
    assert not list(disk.iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(small_disk: Callable[[str], Path]) -> None:
    """The older checkpoints are intact, and --resume goes on once there is room."""
    disk = small_disk("1000k")  # two checkpoints, but not the third before the first is deleted
    options = tiny.options(checkpoint_every=1, evaluate_every=12, keep_checkpoints=2)
    done = tiny.medvdm_command("train", *options, "--no-progress", "--out", disk / "run")
    assert_refused(done.returncode, done.stdout, done.stderr, [str(disk)])
    assert "full" in done.stderr or "space" in done.stderr
    left = whole_state(disk / "run")
    assert all(np.isfinite(leaf).all() for leaf in left)


def test_samples_on_a_full_disk(
    small_disk: Callable[[str], Path], trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("4k")
    for name in ("a.npz", "a.png"):
        refused(
            capfd, "sample", trained.path, "--num", "64", "--steps", "2", "--out", disk / name, names=["space left"]
        )
    assert not list(disk.iterdir())


# The Python API raises exceptions of a fitting type


@pytest.mark.parametrize(
    "wrong", [np.full((2, 4, 4), 1.001, np.float32), np.full((2, 4, 4), -0.1), np.full((2, 4, 4), np.nan, np.float32)]
)
def test_images_outside_the_unit_interval(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        medvdm.from_arrays(wrong)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint16, bool, np.complex64])
def test_images_of_a_wrong_dtype(dtype: Any, unchecked: None) -> None:
    with pytest.raises(TypeError, match="dtype"):
        medvdm.from_arrays(np.ones((2, 4, 4), dtype))
    sizes = {"latent": 2, "embedding_dim": 4, "encoder_width": 4, "decoder_width": 4, "inner_width": 4}
    model = vdm.VDM(vdm.VDMConfig(image_shape=(4, 4, 1), **sizes), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="dtype"):
        model.encode(np.ones((2, 4, 4, 1), dtype))


def test_a_missing_run_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json"):
        medvdm.load(tmp_path / "nowhere")
    with pytest.raises(MissingFileError):
        medvdm.load(str(tmp_path))
