"""What models have kept of their training images: book/results/privacy.json.

    python book/experiments/privacy.py [RUN ...] --data-dir DIR [--canary-runs RUN ...] [--seeds N] [--samples N]

Runs are trained on NIH with `--withhold 60`; canary runs with `--canaries 24 --canary-copies 1,4,16`. Everything is
by the headline attacks and the one rule of `medvdm audit --privacy`, which were fixed before; nothing is chosen here,
and no image is written.

* `runs`: of each run, copies among its samples, and the AUC of membership of images and of persons with intervals;
* `attacks`: the same for each attack of :mod:`medvdm.evaluation.privacy.membership`;
* `canaries`: exposure against copies;
* `published`: what mean and components of the runs' folders give away;
* `clean`: audits in which nothing is copied: fresh phantoms against phantoms, unseen X-rays against X-rays, and
  samples of a linear-Gaussian model of other patients. Alarms are false;
* `controls`: of each control the share found, over seeds, on phantoms and X-rays;
* `defences`: a small latent model on phantoms with visits, trained in different ways: its validation bound, and what
  the attacks still see.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from medvdm.data import DataConfig, ImageData, phantom
from medvdm.data import load as load_images
from medvdm.evaluation import baselines
from medvdm.evaluation.privacy import controls
from medvdm.evaluation.privacy.copies import audit_copies
from medvdm.evaluation.privacy.search import Shelf
from medvdm.evaluation.privacy.verdict import headlines
from medvdm.runs.config import RunConfig
from medvdm.runs.evaluate import evaluate
from medvdm.runs.fit import fit
from medvdm.runs.presets import preset
from medvdm.runs.privacy import audit_privacy
from medvdm.runs.run import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

SIZE = 64  #: pixels of the clean audits and the controls
Rows = list[dict[str, Any]]
#: The small model of the defences, as in the chapter; more steps, so that there is something to defend against.
SMALL = {
    "conditional": False,
    "image_size": 32,
    "num_images": 600,
    "withhold": 60,
    "steps": 3000,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "score_layers": 2,
    "ema_decay": 0.0,
}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "a tenth of the steps": {"steps": 300},
    "a third of the steps": {"steps": 1000},
    "three times the images": {"num_images": 1800},
    "a latent of 16": {"latent": 16},
}


def told(result: dict[str, Any]) -> dict[str, Any]:
    """The headline attacks as flat numbers."""
    out: dict[str, Any] = {}
    for name, one in headlines(result).items():
        low, high = one["auc_interval"]
        out |= {name: one["auc"], f"{name}_low": low, f"{name}_high": high, f"{name}_tpr1": one["tpr_at_1pct_fpr"]}
    return out


def of_runs(paths: list[Path], data_dir: str, samples: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Audits of runs: copies and headlines, all attacks, what is published, canaries."""
    runs, attacks, published, exposed = [], [], [], []
    for path in paths:
        run = load(path)
        config = run.config
        steps = 25 if run.eight_bit else 100
        sampler = "dpmpp" if run.eight_bit else "ancestral"
        start = time.perf_counter()
        found = audit_privacy(run, num=samples, steps=steps, sampler=sampler, data_dir=data_dir)
        seconds = time.perf_counter() - start
        record.say(f"{path.name}: {found['alarms']} in {seconds:.0f} s")
        name = {"run": path.name, "preset": config.preset, "steps": config.training.steps}
        sizes = {key: found[key] for key in ("num_samples", "num_train", "num_held_out", "num_copies", "visits")}
        runs.append({**name, **sizes, "false_alarms": found["false_alarm_rate"], **told(found), "seconds": seconds})
        for question, every in found["membership"].items():
            if isinstance(every, dict) and "bound" in every:
                for attack, one in every.items():
                    if one is not None:
                        low, high = one["auc_interval"]
                        row = {**name, "question": question, "attack": attack, "auc": one["auc"]}
                        attacks.append({**row, "low": low, "high": high, "tpr1": one["tpr_at_1pct_fpr"]})
        for file, one in found["published"].items():
            low, high = one["attack"]["auc_interval"]
            row = {**name, "file": file, "components": one["components"], "auc": one["attack"]["auc"]}
            completion = {key: one[f"completion_{key}"] for key in ("train", "held_out")}
            published.append({**row, "low": low, "high": high, **completion})
        if found["canaries"]:
            most = {"most": found["canaries"]["exposure_most"], "chance": found["canaries"]["exposure_chance"]}
            exposed += [{**name, **most, **row} for row in found["canaries"]["by_copies"]]
    return runs, attacks, published, exposed


def clean(data_dir: str | None, seeds: int) -> Rows:
    """Audits in which nothing is copied; ``alarm`` tells whether one was raised."""

    def audits() -> Iterator[tuple[str, int, Shelf, Shelf, Shelf]]:
        for seed in range(seeds):
            data = phantom.load(num_images=900, image_size=SIZE, seed=seed)
            fresh = phantom.load(num_images=200, image_size=SIZE, seed=1000 + seed)
            yield "phantoms", seed, *sides(data), Shelf.from_data(fresh, np.arange(200))
        nih = None if data_dir is None else load_images(DataConfig(data="nih", data_dir=data_dir, image_size=SIZE))
        for seed in range(seeds if nih is not None else 0):
            train, held_out, unseen = thirds(nih, seed)
            yield "X-rays", seed, train, held_out, unseen
            linear = baselines.fit(unseen.read(np.arange(len(unseen))), held_out.read(np.arange(64)))
            drawn = linear.sample(200, seed).reshape(200, SIZE, SIZE, 1)
            yield "linear-Gaussian of other patients", seed, train, held_out, Shelf.from_arrays(drawn)

    rows = []
    for name, seed, train, held_out, samples in audits():
        found = audit_copies(samples, train, held_out, seed=seed)
        keys = ("num_samples", "num_train", "num_held_out", "num_copies", "false_alarm_rate")
        rows.append({"samples": name, "seed": seed, **{key: found[key] for key in keys}})
        record.say("clean", rows[-1])
    return rows


def sides(data: ImageData) -> tuple[Shelf, Shelf]:
    """Training and held-out images of a data set."""
    parts = (data.splits == "train", data.splits != "train")
    train, held_out = (Shelf.from_data(data, np.flatnonzero(part)) for part in parts)
    return train, held_out


def thirds(data: ImageData, seed: int) -> tuple[Shelf, Shelf, Shelf]:
    """Half of the patients as if trained on, a quarter held out, a quarter as samples; anew for each seed."""
    people = np.random.default_rng(seed).permutation(np.unique(data.patients))
    quarter = len(people) // 4
    parts = (people[2 * quarter :], people[:quarter], people[quarter : 2 * quarter])
    return tuple(Shelf.from_data(data, np.flatnonzero(np.isin(data.patients, part))) for part in parts)


def of_controls(data_dir: str | None, seeds: int) -> Rows:
    """The share that is found of each control."""
    rows = []
    for seed in range(seeds):
        sets = {"phantoms": sides(phantom.load(num_images=900, image_size=SIZE, seed=seed))}
        if data_dir is not None:
            nih = load_images(DataConfig(data="nih", data_dir=data_dir, image_size=SIZE))
            sets["X-rays"] = thirds(nih, seed)[:2]
        for name, (train, held_out) in sets.items():
            for control, one in controls.run_controls(train, held_out, seed=seed).items():
                rows.append({"images": name, "seed": seed, "control": control, **one})
        record.say("controls", seed)
    return rows


def defences() -> Rows:
    """The small model, trained in different ways."""
    rows = []
    for name, changes in DEFENCES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = fit(small(**changes), Path(folder) / "run", progress=False)
            bound = evaluate(run, split="val", save=False)
            found = audit_privacy(run, num=100, steps=50, save=False)
        row = {"defence": name, "excess_bpd": bound["excess_bpd"], "excess_stderr": bound["vlb_bpd_stderr"]}
        rows.append({**row, "num_copies": found["num_copies"], **told(found)})
        record.say("defences", rows[-1])
    return rows


def small(**changes: Any) -> RunConfig:
    """The settings of :data:`SMALL` with changes."""
    return preset("demo", **{**SMALL, **changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data-dir")
    parser.add_argument("--canary-runs", nargs="*", type=Path, default=[])
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=256)
    asked = parser.parse_args()
    start = time.perf_counter()
    runs, attacks, published, _ = of_runs(asked.runs, asked.data_dir, asked.samples)
    exposed = of_runs(asked.canary_runs, asked.data_dir, asked.samples)[3]
    results = {
        "runs": runs,
        "attacks": attacks,
        "published": published,
        "canaries": exposed,
        "clean": clean(asked.data_dir, asked.seeds),
        "controls": of_controls(asked.data_dir, min(3, asked.seeds)),
        "defences": defences(),
    }
    record.experiment("privacy", config=small(), seconds=time.perf_counter() - start, results=results)


if __name__ == "__main__":
    main()
