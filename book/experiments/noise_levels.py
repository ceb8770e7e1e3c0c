"""At which noise a diffusion on pixels spends its bits: book/results/noise-levels.json.

    python book/experiments/noise_levels.py RUN [RUN ...] --data-dir DIR

For each run and each of its stages (a cascade has several), on validation images: bits per pixel of the whole image and
unit of gamma, M(gamma) / (2 D ln 2), at levels from one end of the schedule to the other, the mean over images and one
draw of noise each, with the standard error over images. No image is written.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402
from medvdm.models import cascade, vdm
from medvdm.models.likelihoods import level_values
from medvdm.runs.run import Run, load, load_data
from medvdm.theory import gaussian

LEVELS, IMAGES, SEED = 37, 16, 0


def levels_of(run: Run) -> np.ndarray:
    """gamma from the least to the most noise."""
    return np.linspace(run.config.model.gamma_min, run.config.model.gamma_max, LEVELS)


def curve(run: Run, x: np.ndarray, number: int) -> np.ndarray:
    """(levels, n): bits per pixel of the whole image and unit of gamma that stage ``number`` spends."""

    @jax.jit
    def at(params: vdm.Params, x: jax.Array, gamma: jax.Array, key: jax.Array) -> jax.Array:
        stage = cascade.stages(vdm.merge(run.graph, params), x)[number]
        f = level_values(stage.images)
        eps = jax.random.normal(key, f.shape)
        condition = stage.model.condition(gamma[None], stage.model.embed(None, n=1))
        wrong = eps - stage.model.eps_hat(gaussian.diffuse(f, eps, gamma), condition)
        return jnp.sum(wrong**2, axis=(1, 2, 3)) / (2.0 * math.log(2.0) * x[0].size)

    keys = jax.random.split(jax.random.key(SEED), LEVELS)
    gammas = jnp.asarray(levels_of(run), jnp.float32)
    return np.stack([np.asarray(at(run.params, x, g, k)) for g, k in zip(gammas, keys, strict=True)])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="the folder of the NIH images")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for path in options.runs:
        run = load(path, ema=True)
        data = load_data(run, data_dir=options.data_dir if run.config.data.data == "nih" else None)
        x = data.levels(data.indices("val")[:IMAGES])
        for number in range(run.config.model.stages if run.config.model.reduce else 1):
            found = curve(run, x, number)
            error = found.std(axis=1, ddof=1) / math.sqrt(len(x))
            rows += [
                {"run": path.name, "stage": number, "gamma": float(g), "bits": float(b), "bits_se": float(e)}
                for g, b, e in zip(levels_of(run), found.mean(axis=1), error, strict=True)
            ]
            record.say(path.name, number, float(np.trapezoid(found.mean(axis=1), levels_of(run))))
    record.experiment("noise-levels", config=run.config, seconds=time.perf_counter() - start, results={"levels": rows})


if __name__ == "__main__":
    main()
