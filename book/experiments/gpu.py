"""A quarter of an hour of a GPU, used at once: step times, bfloat16 and three trainings: book/results/gpu.json.

    python book/experiments/gpu.py --data-dir DIR --out RUNS [--parts PART ...] [--share X]

DIR holds the NIH images. The parts, in this order, each of which may be run on its own into the same RUNS:

* `times`: the time of a training step of each training below, in float32 and bfloat16;
* `denoiser`: a wide U-Net on crops of 256 x 256 X-rays, for `medvdm denoise`;
* `phantom`: a denoiser of phantoms, whose truth is known;
* `large`: `pixel-large` with larger batches, for samples; the weights with the least bound on validation are kept too;
* `record`: what the parts before have found, with the bound on validation images of every look.

On an H100 compiling takes longer than the steps: 10 to 60 s for each step that is timed, and about 100 s for each
training. `--share` takes that part of the steps and of the phantoms, to try the script out. Without `--data-dir`
phantoms stand in for the X-rays. A machine without the history of the repository may name the commit in MEDVDM_COMMIT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import medvdm
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402
from medvdm import data
from medvdm.runs.config import RunConfig, change
from medvdm.runs.fit import fill_in
from medvdm.runs.store import EVALUATIONS, METRICS, read_lines
from medvdm.training.step import jit_step, new_state

PARTS = ("times", "denoiser", "phantom", "large", "record")
REPEATS = 20
Rows = list[dict[str, Any]]


def trainings(data_dir: str | None, share: float) -> dict[str, RunConfig]:
    """The three trainings by name, for a share of their steps."""
    xrays = {"data": "nih", "data_dir": data_dir} if data_dir else {"data": "phantom", "num_images": 100}
    phantoms = {"data": "phantom", "num_images": max(60, round(900 * share))}
    crops = {"image_size": 256, "crop": 64, "noise_weight": 10.0}

    def last(steps: int) -> dict[str, int]:
        steps = max(8, round(steps * share))
        return {"steps": steps, "evaluate_every": -(-steps // 4), "checkpoint_every": steps, "keep_checkpoints": 1}

    return {
        "denoiser": medvdm.preset(
            "pixel", **{**crops, "crop": 128}, width=96, batch_size=16, learning_rate=2e-3, **xrays, **last(8000)
        ),
        "phantom": medvdm.preset("pixel", **crops, batch_size=4, **phantoms, **last(12_000)),
        "large": medvdm.preset("pixel-large", batch_size=16, keep_best=True, **xrays, **last(5000)),
    }


def step_seconds(config: RunConfig, images: data.ImageData) -> float:
    """Median time of a training step, after the first ones, which compile."""
    config = fill_in(config, images)
    rows = np.resize(images.indices("train"), config.training.batch_size)
    integers = config.model.integers
    x = jax.device_put(images.levels(rows) if integers else images.read(rows))
    state, step = new_state(config.model, config.training), jit_step(config.model, config.training)
    times = []
    for _ in range(3 + REPEATS):
        start = time.perf_counter()
        state, _ = step(state, x, None)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measure_times(asked: dict[str, RunConfig], path: Path) -> None:
    """Step times of every training in each type, and of the last at four times its batch; written as they come."""
    rows: Rows = []
    for name, config in asked.items():
        images = data.load(config.data)
        batch = config.training.batch_size
        larger = [("float32", 4 * batch)] if name == "large" else []
        for dtype, size in [("float32", batch), ("bfloat16", batch), *larger]:
            seconds = step_seconds(change(config, dtype=dtype, batch_size=size), images)
            rows.append({"training": name, "dtype": dtype, "batch": size, "seconds": seconds})
            record.say(rows[-1])
            path.write_text(json.dumps(rows))


def found(name: str, run: Path) -> tuple[dict[str, Any], Rows]:
    """A finished training in one row, and its looks at validation images."""
    steps = read_lines(run / METRICS)
    looks = [
        {"training": name} | {k: v for k, v in look.items() if isinstance(v, int | float) and np.isfinite(v)}
        for look in read_lines(run / EVALUATIONS)
    ]
    return {"training": name, "steps": len(steps), "seconds": round(record.training_seconds(steps))}, looks


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the folder of the NIH images")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the trained runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--share", type=float, default=1.0, help="of all steps, to try the script out")
    return parser


def main() -> None:
    options = parser().parse_args()
    asked = trainings(options.data_dir, options.share)
    options.out.mkdir(parents=True, exist_ok=True)
    measured = options.out / "times.json"
    for part in (p for p in PARTS if p in options.parts):
        record.say(part)
        if part == "times":
            measure_times(asked, measured)
        elif part in asked:
            medvdm.fit(asked[part], options.out / part)
        else:
            tables = [found(name, options.out / name) for name in asked]
            results = {
                "times": json.loads(measured.read_text()),
                "trainings": [row for row, _ in tables],
                "validation": [look for _, looks in tables for look in looks],
            }
            seconds = sum(row["seconds"] for row, _ in tables)
            record.experiment("gpu", config=asked["large"], seconds=seconds, results=results)


if __name__ == "__main__":
    main()
