"""Small records of long work, which chapters read: book/results/NAME.json.

    python book/_tools/record.py run RUN NAME [--commit HASH]   from the folder of a finished `medvdm train`
    python book/_tools/record.py refresh [NAME ...]             renew the phantom curves, and the settings, of records
    python book/_tools/record.py rows                           print the rows that several pages share

Experiments (book/experiments/*.py) write theirs with :func:`experiment`. Every record follows ``record.schema.json``:
it names the one command that repeats it, version, commit, environment, seed and seconds, and it carries the losses of
20 steps on the phantom with its settings. Those are cheap, so a test takes them again and compares: the long numbers
are history, the short curve is alive. A record holds no image and no path of a machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
from medvdm import data as data_
from medvdm.cli import options
from medvdm.cli.parsing import parse
from medvdm.data import ImageData
from medvdm.notebook import Seeds, over_seeds, table
from medvdm.runs import config as config_
from medvdm.runs import presets, store
from medvdm.runs.config import RunConfig
from medvdm.runs.fit import fill_in, first_state
from medvdm.runs.record import environment, version
from medvdm.runs.store import EVALUATIONS, METRICS, holds_run, read_json, read_lines, read_record, write_text
from medvdm.training import batches as batches_
from medvdm.training.devices import Layout
from medvdm.training.step import TrainState, jit_step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"
SCHEMA = json.loads(Path(__file__).with_name("record.schema.json").read_text("utf8"))
TERMS = ("reconstruction_bpd", "diffusion_bpd", "latent_bpd", "vlb_bpd")
BINS = 200
STEPS = 20
#: The networks on real X-rays whose results stand on several pages: by name, a record of each seed. A row of three
#: records is a mean with its standard deviation, everywhere; a row of one says so.
ROWS = {
    "`linear-start`, 2,400 steps of 8": ("linear-start-nih-long",),
    "`linear-start`, 400 steps of 8": ("linear-start-nih", "linear-start-nih-s1", "linear-start-nih-s2"),
    "`paper`, 3,000 steps of 16": ("paper-nih-b16", "paper-nih-b16-s1", "paper-nih-b16-s2"),
    "`paper`, 20,000 steps of 1": ("paper-nih-b1",),
    "`paper-literal`, 600 steps of 16": ("literal-nih-b16",),
}
#: What the 20 steps on the phantom change in a record's settings: small images, so that each step is cheap.
PHANTOM = {"data": "phantom", "data_dir": None, "image_size": 32, "num_images": 100, "patient_pattern": None}


# --- Commands -----------------------------------------------------------------------------------------------------


def train_command(config: RunConfig) -> str:
    """The line that repeats a run: its preset and each setting that differs from it."""
    preset = config_.flat(presets.preset(config.preset))
    words = ["medvdm", "train", "--preset", config.preset]
    for name, value in config_.flat(config).items():
        if name in ("preset", "data_dir", "image_shape", "classes", *config_.FREE_ON_RESUME) or value == preset[name]:
            continue
        option = name.replace("_", "-")
        words += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    words += ["--data-dir", "DIR"] if config.data.data_dir else []
    return shlex.join([*words, "--out", "RUN"])


def parse_train(command: str) -> RunConfig:
    """The settings that a line of :func:`train_command` gives; raises InputError where it no longer parses."""
    words = shlex.split(command)
    assert words[:3] == ["medvdm", "train", "--preset"], command
    defaults = options.train_defaults(presets.preset(words[3]))
    return options.run_config(parse(options.Train, words[2:], "train", defaults))


def experiment_command() -> str:
    """The running script as one line: the data folder is DIR, and a run's folder its name."""
    words, folder = ["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()], False
    for word in sys.argv[1:]:
        words.append("DIR" if folder else Path(word).name if holds_run(Path(word)) else word)
        folder = word == "--data-dir"
    return shlex.join(words)


# --- Records ------------------------------------------------------------------------------------------------------


def of_run(run: Path, name: str, commit: str) -> dict[str, Any]:
    """The record of a finished run: binned losses and all evaluations."""
    start, config = read_record(run)
    steps = read_lines(run / METRICS)
    evaluations = [read_json(path) for path in sorted((run / store.RESULTS).glob("*.json"))]
    return {
        **_head("run", name, config),
        "command": train_command(config),
        "version": start["version"],
        "commit": commit,
        "environment": start["environment"],
        "seconds": round(training_seconds(steps)),
        "data": start["data"],
        "metrics": _binned(steps),
        "validation": read_lines(run / EVALUATIONS),
        "evaluations": sorted(({**e, "run": name} for e in evaluations), key=lambda e: (e["split"], e["step"])),
    }


class Kept:
    """Numbers by key, appended to a file as they come, so that an experiment that was cut off goes on."""

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text("utf8").splitlines() if path and path.exists() else []
        self.known = {key: value for key, value in map(json.loads, lines)}

    def of(self, key: Sequence[object], make: Callable[[], Any]) -> Any:
        word = "/".join(map(str, key))
        if word not in self.known:
            self.known[word] = make()
            if self.path:
                with self.path.open("a", encoding="utf8") as file:
                    file.write(json.dumps([word, self.known[word]]) + "\n")
        return self.known[word]


def experiment(name: str, *, config: RunConfig, seconds: float, results: dict[str, Any]) -> Path:
    """Write the record of the experiment that is running.

    Args:
        name: of the file in book/results.
        config: the settings that stand for it, those that were trained most; they give the phantom's curve.
        seconds: that it took.
        results: tables, as lists of flat dicts. Numbers are kept to six digits.
    """
    return write(
        {
            **_head("experiment", name, config),
            "command": experiment_command(),
            "version": version(),
            "commit": commit_here(),
            "environment": environment(),
            "seconds": round(seconds),
            "results": _rounded(results),
        }
    )


def evaluations(row: str, split: str = "test") -> list[dict[str, Any]]:
    """The last evaluation on a split of each record of one of the :data:`ROWS`."""
    found = []
    for name in ROWS[row]:
        record = json.loads((RESULTS / f"{name}.json").read_text("utf8"))
        found.append(max((e for e in record["evaluations"] if e["split"] == split), key=lambda e: e["step"]))
    return found


def rows(key: str = "excess_bpd") -> dict[str, Seeds]:
    """One number of all :data:`ROWS` on test patients: its mean, and its standard deviation over seeds."""
    return {row: over_seeds(evaluations(row), key) for row in ROWS}


def baselines() -> dict[str, tuple[float, float]]:
    """Bound and excess on the same patients of what has no network, and the floor, whose excess is zero."""
    e = evaluations("`linear-start`, 400 steps of 8")[0]
    names = {"linear-Gaussian VDM": "lingauss", "PCA-64": "pca64", "mean image": "mean_image", "floor": "floor"}
    return {name: (e[f"{key}_bpd"], e[f"{key}_bpd"] - e["floor_bpd"]) for name, key in names.items()}


def _head(kind: str, name: str, config: RunConfig) -> dict[str, Any]:
    """What the records of runs and of experiments share."""
    return {
        "schema": SCHEMA["properties"]["schema"]["const"],
        "kind": kind,
        "name": name,
        "seed": config.training.seed,
        "config": _settings(config),
        "phantom": phantom_curve(config),
    }


def write(entry: dict[str, Any]) -> Path:
    """Check a record against the schema and write it."""
    jsonschema.validate(entry, SCHEMA)
    path = RESULTS / f"{entry['name']}.json"
    write_text(path, json.dumps(entry, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size:,} bytes", file=sys.stderr)
    return path


def refreshed(entry: dict[str, Any]) -> dict[str, Any]:
    """The same record with settings and command as this version says them, and the phantom's curve of today."""
    config = config_.from_json(entry["config"], where=entry["name"])
    renewed = {**entry, "config": _settings(config), "phantom": phantom_curve(config)}
    if entry["kind"] == "run":
        folder = "DIR" if "--data-dir" in entry["command"] else None
        renewed["command"] = train_command(config_.change(config, data_dir=folder))
    return renewed


def train(config: RunConfig, images: ImageData, steps: int | None = None) -> tuple[RunConfig, TrainState, list[float]]:
    """Train without a folder: the settings filled in, the last state, and the bound at each step (bits per dimension).

    ``steps`` stops early; the learning rate is that of the whole run.
    """
    config = fill_in(config, images)
    state = first_state(config, images, Layout(1))
    step = jit_step(config.model, config.training)
    integers = config.model.integers
    batches = batches_.training_batches(
        images, batch_size=config.training.batch_size, seed=config.training.seed, integers=integers
    )
    losses = []
    for _ in range(steps or config.training.steps):
        x, labels = next(batches)
        state, metrics = step(state, x, labels if config.model.classes else None)
        losses.append(metrics.vlb_bpd)
    return config, state, [float(loss) for loss in jax.device_get(losses)]


def phantom_curve(config: RunConfig) -> dict[str, Any]:
    """The bound of the first 20 training steps with these settings on the phantom, bits per dimension."""
    size = PHANTOM["image_size"] * max(1, config.model.reduce) ** (config.model.stages - 2)  # a copy's copy is small
    small = {**PHANTOM, "image_size": size, "crop": min(config.training.crop, 16)}
    config = config_.change(config, **small, batch_size=min(config.training.batch_size, 8))
    _, _, losses = train(config, data_.load(config.data), STEPS)
    return {
        "image_size": size,
        "batch_size": config.training.batch_size,
        "vlb_bpd": [float(f"{loss:.6g}") for loss in losses],
    }


def say(*words: object) -> None:
    """Tell the progress of an experiment on stderr, with the time of day."""
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def training_seconds(steps: list[dict[str, Any]]) -> float:
    """What the steps of a run took by their own clocks, from the lines of its metrics."""
    return sum(1 / line["steps_per_second"] for line in steps)


def one_per_patient(data: ImageData, split: str, num: int) -> np.ndarray:
    """Indices of at most ``num`` images of a split, the first of each patient, so that their errors are independent;
    spread over the split."""
    indices = data.indices(split)
    _, first = np.unique(data.patients[indices], return_index=True)
    indices = indices[np.sort(first)]
    return indices[np.rint(np.linspace(0, len(indices) - 1, min(num, len(indices)))).astype(int)]


def commit_here() -> str:
    """The commit that is checked out; MEDVDM_COMMIT where the history is not there, as on a lent machine."""
    if commit := os.environ.get("MEDVDM_COMMIT"):
        return commit
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _settings(config: RunConfig) -> dict[str, Any]:
    return config_.to_json(config_.change(config, data_dir=None))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


def _binned(steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Means over equal bins, each at its last step; the first step alone, so that the start is seen."""
    size = math.ceil(len(steps) / BINS)
    parts = [steps[:1]] + [steps[i : i + size] for i in range(1, len(steps), size)]
    return [
        {"step": part[-1]["step"]} | {t: float(f"{sum(s[t] for s in part) / len(part):.6g}") for t in TERMS}
        for part in parts
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    make = commands.add_parser("run")
    make.add_argument("run", type=Path)
    make.add_argument("name")
    make.add_argument("--commit", help="of the code that made the run; the one checked out by default")
    renew = commands.add_parser("refresh")
    renew.add_argument("names", nargs="*")
    commands.add_parser("rows")
    asked = parser.parse_args(arguments)
    if asked.what == "run":
        write(of_run(asked.run, asked.name, asked.commit or commit_here()))
        return 0
    if asked.what == "rows":
        keys = {"bound ↓": "vlb_bpd", "excess ↓": "excess_bpd", "rate": "rate_bits_per_image"}
        found = {row: [over_seeds(evaluations(row), key) for key in keys.values()] for row in ROWS}
        print(table(found, dict.fromkeys(keys), digits=[4, 4, 0]))
        print(*(f"{name}: {bound:.4f}, {excess:.4f}" for name, (bound, excess) in baselines().items()), sep="\n")
        return 0
    for name in asked.names or sorted(path.stem for path in RESULTS.glob("*.json")):
        write(refreshed(json.loads((RESULTS / f"{name}.json").read_text("utf8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
