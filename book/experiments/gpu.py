"""Ten minutes of a GPU, used at once: step times, bfloat16, and the longest training that fits.

    python book/experiments/gpu.py --data-dir DIR [--minutes 9]

DIR holds the NIH images; without it, everything runs on phantoms of the same size. First the time of a training step of
three presets, in float32 and bfloat16, at their own batch and at eight times that. Then `pixel-large` in bfloat16 or
float32, whichever was faster, with batches of 16 and for as many steps as the rest of the time holds, less what the
evaluation takes. Its bound is measured on validation images at eight looks, and on test images once, at the end.
Writes book/results/gpu.json, whose environment names the device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
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
from medvdm.runs.store import EVALUATIONS, read_lines
from medvdm.training.step import jit_step, new_state

PRESETS = ("paper", "pixel", "pixel-large")
DTYPES = ("float32", "bfloat16")
REPEATS, BATCH, EVALUATION = 20, 16, 60.0  # seconds kept for the end
begin = time.perf_counter()


def step_seconds(config: RunConfig, images: data.ImageData) -> float:
    """Median time of a training step, after the first ones, which compile."""
    config = fill_in(config, images)
    rows = images.indices("train")[: config.training.batch_size]
    integers = config.model.integers
    x = jax.device_put(images.levels(rows) if integers else images.read(rows))
    state, step = new_state(config.model, config.training), jit_step(config.model, config.training)
    times = []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        state, _ = step(state, x, None)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the folder of the NIH images")
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything together")
    return parser


def main() -> None:
    options = parser().parse_args()
    where = {"data": "nih", "data_dir": options.data_dir} if options.data_dir else {"num_images": 400}
    rows: list[dict[str, Any]] = []
    for name in PRESETS:
        asked = medvdm.preset(name, **({**where, "image_size": 28} if name == "pixel" else where))
        images = data.load(asked.data)
        for dtype in DTYPES:
            for times in (1, 8):
                batch = asked.training.batch_size * times
                seconds = step_seconds(change(asked, dtype=dtype, batch_size=batch), images)
                rows.append({"preset": name, "dtype": dtype, "batch": batch, "seconds": seconds})
                print(f"{time.perf_counter() - begin:5.0f} s", rows[-1], file=sys.stderr, flush=True)

    asked = medvdm.preset("pixel-large", batch_size=BATCH, **where)
    images = data.load(asked.data)
    seconds = {dtype: step_seconds(change(asked, dtype=dtype), images) for dtype in DTYPES}
    dtype = min(seconds, key=seconds.__getitem__)
    left = 60.0 * options.minutes - (time.perf_counter() - begin) - EVALUATION
    steps = max(8, int(0.9 * left / seconds[dtype]))
    asked = change(asked, dtype=dtype, steps=steps, evaluate_every=max(1, steps // 8))
    with tempfile.TemporaryDirectory() as folder:
        run = medvdm.fit(asked, Path(folder) / "run")
        looks = read_lines(run.path / EVALUATIONS)
        averaged = medvdm.load(run.path, ema=True)
        found = {split: medvdm.evaluate(averaged, split=split, draws=4) for split in ("val", "test")}
    table = [
        {"split": split} | {k: result[k] for k in ("vlb_bpd", "vlb_bpd_stderr", "num_images", "seconds")}
        for split, result in found.items()
    ]
    trained = [{"dtype": dtype, "batch": BATCH, "steps": steps, "step_seconds": seconds[dtype]}]
    curve = [{k: v for k, v in look.items() if isinstance(v, int | float) and np.isfinite(v)} for look in looks]
    record.experiment(
        "gpu",
        config=asked,
        seconds=time.perf_counter() - begin,
        results={"steps": rows, "training": trained, "validation": curve, "evaluation": table},
    )


if __name__ == "__main__":
    main()
