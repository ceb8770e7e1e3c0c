"""Audits of the samples of trained runs against real held-out images: book/results/quality.json, or another name.

    python book/experiments/quality.py RUN [RUN ...] --data-dir DIR [--ema] [--num N] [--steps T] [--name NAME]

For each run: samples (T = 250, or as asked), the held-out (test) images through encoder and decoder where there are
such, samples of the linear-Gaussian VDM, and images of the other held-out split as a yardstick. All sets have one size:
that of the smaller split, and at most 256, or as asked.

* `audits`: what `medvdm audit` prints, one row per run and set;
* `spectra`: mean radial power of each set at each scale, in bins of equal width in log k;
* `grays`: share of the pixels of each set in 32 bins of gray values;
* `nearest`: quantiles of the distance to the nearest training image (of another patient), for each set and for the
  held-out images themselves, and the share of the set that is nearer than the nearest held-out image.

No image is written. Nothing is chosen here, so the test images are looked at once for each run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from medvdm.evaluation.audit import Space, audit_set, nearest
from medvdm.evaluation.measures import power_spectrum
from medvdm.runs.audit import audit_sets
from medvdm.runs.run import load, load_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

SEED = 0
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95)
Rows = list[dict[str, Any]]


def spectra(name: str, sets: dict[str, tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Mean power of each set in at most 24 bins of scales."""
    power = {kind: power_spectrum(images).mean(axis=0) for kind, (images, _) in sets.items()}
    most = len(power["held_out"])
    edges = np.unique(np.rint(np.geomspace(1, most + 1, 25)).astype(int))
    return [
        {"run": name, "k": float(np.mean(np.arange(a, b)))}
        | {kind: float(p[a - 1 : b - 1].mean()) for kind, p in power.items()}
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def grays(name: str, sets: dict[str, tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Share of the pixels in each of 32 bins of gray values."""
    edges = np.linspace(0, 1, 33)
    share = {kind: np.histogram(images, edges)[0] / images.size for kind, (images, _) in sets.items()}
    return [
        {"run": name, "gray": float((a + b) / 2)} | {kind: float(s[i]) for kind, s in share.items()}
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    ]


def nearest_rows(
    name: str,
    sets: dict[str, tuple[np.ndarray, np.ndarray]],
    train: np.ndarray,
    patients: np.ndarray,
    space: Space,
) -> Rows:
    """Quantiles of the distance to the nearest training image, in pixels and in the space of 64 components."""

    def project(x: np.ndarray) -> np.ndarray:
        # Scaled so that the root mean square over the scores is the one over pixels of what they describe.
        basis = space.components[:64]
        return (x.reshape(len(x), -1) - space.mean) @ basis.T * np.sqrt(len(basis) / basis.shape[1])

    rows = []
    for kind, features in {"pixels": lambda x: x, "PCA": project}.items():
        to_train = features(train)
        far = {s: nearest(features(x), to_train, who, patients)[0] for s, (x, who) in sets.items()}
        for s, distance in far.items():
            rows.append(
                {"run": name, "space": kind, "set": s}
                | {f"q{100 * q:.0f}": float(np.quantile(distance, q)) for q in SHARES}
                | {"nearer_than_any_held_out": float(np.mean(distance < far["held_out"].min()))}
            )
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="the folder of the NIH images")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--num", type=int, default=256, help="images of each set, at most")
    parser.add_argument("--steps", type=int, default=250, help="of the samples, T")
    parser.add_argument("--name", default="quality", help="of the record")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    tables: dict[str, Rows] = {"audits": [], "spectra": [], "grays": [], "nearest": []}
    for path in options.runs:
        run = load(path, ema=options.ema)
        nih = run.config.data.data == "nih"
        data = load_data(run, data_dir=options.data_dir if nih else None)
        train = data.indices("train")
        images, patients = data.read(train), data.patients[train]
        space = Space(run.baselines.mean, run.baselines.components, run.baselines.variances)
        sets = audit_sets(run, data, num=options.num, steps=options.steps, seed=SEED)
        record.say(path.name, "drawn")
        held_out, who = sets["held_out"]
        for kind, (x, groups) in sets.items():
            if kind != "held_out":
                found = audit_set(
                    x,
                    held_out,
                    images,
                    space,
                    groups=groups,
                    real_groups=who,
                    train_groups=patients,
                    seed=SEED,
                )
                tables["audits"].append(
                    {"run": path.name, "data": data.name, "size": x.shape[1], "step": run.step, "set": kind} | found
                )
                record.say(path.name, kind, found)
        tables["spectra"] += spectra(path.name, sets)
        tables["grays"] += grays(path.name, sets)
        tables["nearest"] += nearest_rows(path.name, sets, images, patients, space)
    record.experiment(options.name, config=run.config, seconds=time.perf_counter() - start, results=tables)


if __name__ == "__main__":
    main()
