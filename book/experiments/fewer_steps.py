"""Quality of samples against evaluations of the network, for each solver and grid: book/results/fewer-steps.json.

    python book/experiments/fewer_steps.py RUN --data-dir DIR [--num N] [--reference T]

Averaged weights, the same starts z_1 for all (one seed). The reference is the ancestral chain of many steps.

* `audits`: one row per sampler, grid and number of evaluations (Heun's takes half as many steps): what `medvdm audit`
  says of the samples against held-out (test) images, with the standard errors of the powers over the samples; the
  reference comes first, and once more with other noise, which tells what chance does;
* `distances`: root mean square difference, in gray levels, of the samples of DDIM, Heun and DPM-Solver++ from those of
  the flow itself, Heun's of many steps from the same z_1, and of two sets of the reference.

No image is written. Nothing is chosen here, so the test images are looked at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import medvdm
import numpy as np
from medvdm.evaluation.audit import Set, Space, compare_set, draw
from medvdm.evaluation.measures import bands, power_spectrum
from medvdm.runs.run import load, load_data
from medvdm.theory.solvers import SOLVERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

SEED = 0
EVALUATIONS = (10, 25, 50, 100)
GRIDS = ("time", "error")
Rows = list[dict[str, Any]]


def power_errors(images: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Standard errors of the powers over the images, as fractions of the real powers."""
    powers, of_real = power_spectrum(images), power_spectrum(real)
    out = {}
    for name, band in zip(("low", "middle", "high"), bands(powers.shape[1]), strict=True):
        each = powers[:, band].mean(axis=1) / of_real[:, band].mean()
        out[f"power_{name}_stderr"] = float(each.std(ddof=1) / np.sqrt(len(each)))
    return out


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir", help="the folder of the images")
    parser.add_argument("--num", type=int, default=70, help="samples of each kind")
    parser.add_argument("--reference", type=int, default=1000, help="steps of the reference")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    run = load(options.run, ema=True)
    data = load_data(run, data_dir=options.data_dir)
    rows = data.indices("test")
    rows = rows[draw(len(rows), options.num, SEED)]
    real = data.levels(rows) / np.float32(255) if run.eight_bit else data.read(rows)
    held_out = Set(real, data.patients[rows])
    space = Space(run.baselines.mean, run.baselines.components, run.baselines.variances)
    audits: Rows = []

    def drawn(sampler: str, grid: str, evaluations: int, seed: int = SEED) -> np.ndarray:
        steps = evaluations // SOLVERS[sampler].evaluations
        images = medvdm.sample(
            run, options.num, steps=steps, sampler=sampler, grid=grid, seed=seed, batch_size=64
        ).images
        names = np.array([f"sample {i}" for i in range(len(images))])
        found = compare_set(Set(images, names), held_out, space, seed=SEED)
        audits.append(
            {"sampler": sampler, "grid": grid, "evaluations": evaluations, "seed": seed}
            | found
            | power_errors(images, held_out.images)
        )
        record.say(audits[-1])
        return images

    def far(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(np.mean((one - other) ** 2)))

    reference = drawn("ancestral", "time", options.reference)
    again = drawn("ancestral", "time", options.reference // 4, SEED + 1)
    distances: Rows = [{"sampler": "ancestral", "grid": "time", "evaluations": 0, "distance": far(reference, again)}]
    flow = drawn("heun", "error", 200)
    for evaluations in EVALUATIONS:
        for grid in GRIDS:
            for sampler in SOLVERS:
                images = drawn(sampler, grid, evaluations)
                if sampler != "ancestral":
                    key = {"sampler": sampler, "grid": grid, "evaluations": evaluations}
                    distances.append(key | {"distance": far(images, flow)})
    results = {"audits": audits, "distances": distances}
    record.experiment("fewer-steps", config=run.config, seconds=time.perf_counter() - start, results=results)


if __name__ == "__main__":
    main()
