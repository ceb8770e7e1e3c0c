"""A diffusion on pixels beside a plain U-Net, and what each of its parts is worth: the same time for every row.

    python book/experiments/pixels.py [--data-dir FILE]

PneumoniaMNIST (28 x 28, FILE is its npz), or phantoms of that size. First the preset `pixel`, for all of its steps, and
a plain U-Net (three scales of 32, 64 and 128 features at full resolution, 0.77 million parameters, AdamW at 2e-3, the
same averaging of weights) with batches of 32 and of 8, in turns of a twentieth of their steps, for the same time. Then
changes of one setting each, and two ways to begin with the best Gaussian model of the images, for the time that `pixel`
takes for STEPS steps.

Before a row's turn, its step and that of `pixel` are timed alternately, which gives the number of its steps. Rows are
judged on validation images; the test images are looked at once, for the first three. In the results, `bpd` is the bound
in bits per pixel, `change` is its difference to the first row's on the same images and draws, with the paired standard
error of that (by patient where patients are known), `spread` is the standard deviation of one image's loss over times
and noise, and `step` the time of a step, as a multiple of the first row's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import medvdm
import numpy as np
from jaxtyping import Array, Float
from scipy.fft import dctn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402
from medvdm import data
from medvdm.evaluation import gaussian_images, held_out
from medvdm.evaluation.gaussian_images import GaussianImages
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.models import unet, vdm
from medvdm.models.blocks import FiLM, Measured, time_embedding
from medvdm.models.likelihoods import SPACING, level_mean
from medvdm.models.unet import UNet
from medvdm.runs.config import RunConfig, change
from medvdm.runs.fit import fill_in
from medvdm.theory import bound, gaussian
from medvdm.training.batches import training_batches
from medvdm.training.step import TrainState, jit_step, new_state

STEPS, TURNS, CHUNK, DRAWS, FINAL_DRAWS = 1500, 20, 10, 8, 32
FIRST = "pixel"
PLAIN = {"architecture": "plain-unet", "batch_size": 32, "learning_rate": 2e-3, "clip_norm": 0.0}
BESIDE: dict[str, dict[str, Any]] = {
    FIRST: {},
    "plain U-Net": PLAIN,
    "plain U-Net, batch 8": {**PLAIN, "batch_size": 8},
}
ROWS: dict[str, dict[str, Any]] = {
    FIRST: {},
    "no rounding": {"rounding": False},
    "no contrast features": {"details": "none"},
    "Fourier features instead": {"details": "fourier"},
    "attention at the coarser scale": {"attention": True},
    "three scales": {"scales": 3},
    "cells of 1 pixel, width 24": {"patch": 1, "width": 24, "scales": 3},
    "twice the width": {"width": 96},
    "batch 32": {"batch_size": 32},
    "times drawn one by one": {"stratified_times": False},
    "ends learned by the bound": {"schedule": "monotonic", "learn_ends": True},
    "interior by the variance": {"schedule": "monotonic", "schedule_objective": "variance", "schedule_rate": 25.0},
    "starts as the Gaussian": {"architecture": "gaussian-start"},
    "the Gaussian's answer as an input": {"architecture": "gaussian-input"},
}
start = time.perf_counter()


# --- Other networks -----------------------------------------------------------------------------------------------


class PlainUNet(nnx.Module):
    """What one would write first: three scales at full resolution, and the noise is what comes out."""

    WIDTHS = (32, 64, 128)

    def __init__(self, config: vdm.VDMConfig, *, rngs: nnx.Rngs):
        self.width, self.range = config.embedding_dim, (config.gamma_min, config.gamma_max)
        shared = {"dtype": jnp.float32, "rngs": rngs}
        widths, channels = self.WIDTHS, config.image_shape[2]
        self.mix1 = nnx.Linear(2 * self.width, 4 * self.width, rngs=rngs)
        self.mix2 = nnx.Linear(4 * self.width, 2 * self.width, rngs=rngs)
        self.enter = nnx.Conv(channels, widths[0], (3, 3), rngs=rngs)
        self.down = nnx.List([unet.Block(w, w, **shared) for w in widths])
        self.shrink = nnx.List([nnx.Conv(w, 2 * w, (2, 2), (2, 2), rngs=rngs) for w in widths[:-1]])
        self.grow = nnx.List([nnx.ConvTranspose(2 * w, w, (2, 2), (2, 2), rngs=rngs) for w in widths[:-1]])
        self.up = nnx.List([unet.Block(2 * w, w, **shared) for w in widths[:-1]])
        self.films = nnx.List([FiLM(2 * self.width, w, **shared) for w in (*widths, *widths[-2::-1])])
        self.leave = nnx.Conv(widths[0], channels, (3, 3), kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def condition(self, gamma: Float[Array, " m"], label: Float[Array, "m c"]) -> Any:
        low, high = self.range
        time_ = time_embedding((gamma - low) / (high - low), self.width)
        mixed = nnx.swish(self.mix2(nnx.swish(self.mix1(jnp.concatenate([time_, label], axis=-1)))))
        return tuple(film(mixed) for film in self.films)

    def __call__(self, z: Float[Array, "n h w c"], condition: Any) -> Float[Array, "n h w c"]:
        films, h, kept = iter(condition), self.enter(z), []
        for scale, block in enumerate(self.down):
            h = block(h, next(films))
            if scale < len(self.shrink):
                kept.append(h)
                h = self.shrink[scale](h)
        for grow, block in zip(reversed(self.grow), reversed(self.up), strict=True):
            h = block(jnp.concatenate([kept.pop(), grow(h)], axis=-1), next(films))
        return self.leave(nnx.swish(unet.normed(h)))


class GaussianUNet(UNet):
    """A U-Net that knows the posterior of the best Gaussian model of the images, in closed form.

    With x = m + B^T y, y independent of variances v: the mean of x given z, and in the basis B the deviation d that
    is left. As a start, the network's answer is a multiple of d, added to that mean; as an input, it is only shown.
    """

    fitted: GaussianImages  #: set before a model is built

    def __init__(self, config: vdm.VDMConfig, *, starts: bool, rngs: nnx.Rngs):
        self.starts = starts
        super().__init__(
            config.image_shape[2], width=config.width, scales=config.scales, blocks=config.blocks, patch=config.patch,
            details=config.details, attention=False, rounding=True, reduce=0 if starts else 1,
            embedding_dim=config.embedding_dim, gamma_range=(config.gamma_min, config.gamma_max), dtype=jnp.float32,
            rngs=rngs,
        )  # fmt: skip
        fitted = self.fitted
        size = fitted.variances.size
        cosines = dctn(np.eye(size).reshape(size, *fitted.mean.shape), axes=(1, 2), norm="ortho").reshape(size, size).T
        self.centre = Measured(jnp.asarray(SPACING * fitted.mean - 1.0, jnp.float32))
        self.basis = Measured(jnp.asarray(cosines if fitted.basis is None else fitted.basis, jnp.float32))
        self.variances = Measured(jnp.asarray(SPACING**2 * (fitted.variances + fitted.noise), jnp.float32))

    def __call__(
        self, z: Float[Array, "n h w c"], condition: Any, shown: Float[Array, "n h w c"] | None = None
    ) -> Float[Array, "n h w c"]:
        gamma = condition[1][:, None]
        alpha, sigma = gaussian.alpha(gamma), jnp.sqrt(gaussian.sigma2(gamma))
        total = alpha**2 * self.variances[...] + sigma**2
        flat, mean = z.reshape(len(z), -1), self.centre[...].ravel()
        scores = (flat - alpha * mean) @ self.basis[...].T * alpha * self.variances[...] / total
        posterior = (mean + scores @ self.basis[...]).reshape(z.shape)
        if not self.starts:
            return self.noise(self.answers(z, condition, posterior), z, condition[1])
        said = self.answers(z, condition)
        answer = said[..., : z.shape[-1]].reshape(len(z), -1) @ self.basis[...].T
        deviation = sigma * jnp.sqrt(self.variances[...] / total)
        centre = posterior + ((answer * deviation) @ self.basis[...]).reshape(z.shape)
        variance = jnp.exp(jnp.clip(2.0 * said[..., z.shape[-1] :] - 5.0, -14.0, 3.0))
        alpha, sigma = alpha[..., None, None], sigma[..., None, None]
        left = sigma**2 * variance / (alpha**2 * variance + sigma**2)
        return (z - alpha * level_mean(centre, jnp.sqrt(left))) / sigma


def _built(score: Any) -> vdm.Architecture:
    def build(config: vdm.VDMConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        parts = {"encoder": unet.LevelEncoder(config.image_shape[2]), "decoder": unet.LevelDecoder()}
        return parts | {"score": score(config, rngs=rngs)}

    return dataclasses.replace(vdm.ARCHITECTURES["unet"], build=build, any_size=False)


vdm.ARCHITECTURES |= {
    "plain-unet": _built(PlainUNet),
    "gaussian-start": _built(functools.partial(GaussianUNet, starts=True)),
    "gaussian-input": _built(functools.partial(GaussianUNet, starts=False)),
}


# --- Training -----------------------------------------------------------------------------------------------------


class Training:
    """A row under way: its state, its step and its images."""

    def __init__(self, config: RunConfig, images: data.ImageData):
        self.config, self.images, self.seconds = config, images, 0.0
        train = config.training
        self.state: TrainState = new_state(config.model, train)
        self.step = jit_step(config.model, train)
        self.batches: Iterator[Any] = training_batches(
            images, batch_size=train.batch_size, seed=train.seed, integers=True
        )

    def go(self, steps: int) -> float:
        """Take steps; the seconds that they took."""
        begin = time.perf_counter()
        for _ in range(steps):
            x, _ = next(self.batches)
            self.state, _ = self.step(self.state, x, None)
        jax.block_until_ready(self.state)
        taken = time.perf_counter() - begin
        self.seconds += taken
        return taken

    def look(self) -> float:
        """The bound of the averaged weights on validation images, one draw each, bits per pixel."""
        rows, graph = self.images.indices("val"), vdm.graph_of(self.config.model)
        return held_out.quick(graph, self.state.ema, self.images, rows, batch_size=64, labelled=False)["vlb_bpd"]


def steps_for(config: RunConfig, first: RunConfig, steps: int, images: data.ImageData) -> tuple[int, float]:
    """How many steps of ``config`` take as long as so many of ``first``, and the ratio of their times a step."""
    both = [Training(first, images), Training(config, images)]
    times = [[row.go(CHUNK) for row in both] for _ in range(8)][2:]  # compiled by then, and warm
    ratio = statistics.median(b for _, b in times) / statistics.median(a for a, _ in times)
    return max(1, round(steps / ratio)), ratio


def bits(row: Training, split: str, draws: int) -> np.ndarray:
    """The bound by each draw and image, bits per pixel (draws, n)."""
    config, images = row.config, row.images
    graph, rows = vdm.graph_of(config.model), images.indices(split)
    parts = []
    for number in range(0, len(rows), 64):
        x = images.levels(rows[number : number + 64])
        terms = held_out.bound_terms(graph, row.state.ema, x, None, draws=draws, key=jax.random.key(number))
        parts.append(bound.bits_per_dim(terms.total, images.image_shape))
    return np.concatenate(parts, axis=1)


def result(row: Training, split: str, draws: int, of_first: np.ndarray | None) -> dict[str, Any]:
    """A row of a table."""
    found = bits(row, split, draws)
    images, patients = found.mean(axis=0), np.asarray(row.images.patients)[row.images.indices(split)]
    of_first = images if of_first is None else of_first
    return {
        "bpd": float(images.mean()),
        "bpd_se": clustered_stderr(images, patients),
        "change": float((images - of_first).mean()),
        "change_se": clustered_stderr(images - of_first, patients),
        "spread": float(np.sqrt(found.var(axis=0, ddof=1).mean())),
    }


def beside(configs: dict[str, RunConfig], images: data.ImageData) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first table, on test images, and the curves, on validation images."""
    first = configs[FIRST]
    rows, ratios = {}, {}
    for name, config in configs.items():
        steps, ratios[name] = steps_for(config, first, first.training.steps, images)
        rows[name] = Training(change(config, steps=first.training.steps if name == FIRST else steps), images)
    curves = []
    for turn in range(TURNS):
        for name, row in rows.items():
            steps = row.config.training.steps
            row.go(steps * (turn + 1) // TURNS - steps * turn // TURNS)
            curves.append({"name": name, "seconds": row.seconds, "bpd": row.look()})
            record.say(curves[-1])
    table, of_first = [], None
    for name, row in rows.items():
        of_first = bits(row, "test", FINAL_DRAWS).mean(axis=0) if of_first is None else of_first
        about = {"name": name, "parameters": vdm.count(row.state.params), "steps": row.config.training.steps}
        trained = {"seconds": row.seconds, "step": ratios[name]}
        table.append({**about, **trained, **result(row, "test", FINAL_DRAWS, of_first)})
        record.say(table[-1])
    return table, curves


def parts(configs: dict[str, RunConfig], images: data.ImageData) -> list[dict[str, Any]]:
    """The second table, on validation images."""
    table, of_first = [], None
    for name, config in configs.items():
        steps, ratio = steps_for(config, configs[FIRST], STEPS, images)
        row = Training(change(config, steps=STEPS if name == FIRST else steps), images)
        row.go(row.config.training.steps)
        of_first = bits(row, "val", DRAWS).mean(axis=0) if of_first is None else of_first
        about = {"name": name, "steps": row.config.training.steps, "seconds": row.seconds, "step": ratio}
        table.append({**about, **result(row, "val", DRAWS, of_first)})
        record.say(table[-1])
    return table


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    return parser


def main() -> None:
    folder = parser().parse_args().data_dir
    where = {"data": "pneumoniamnist", "data_dir": folder} if folder else {"image_size": 28, "num_images": 4000}
    asked = medvdm.preset("pixel", **where)
    images = data.load(asked.data)

    def filled(changes: dict[str, Any]) -> RunConfig:
        return fill_in(change(asked, **changes), images)

    train = [images.levels(images.indices("train"))]
    GaussianUNet.fitted = gaussian_images.fit(train, images.levels(images.indices("val")[:256]))
    test = images.levels(images.indices("test"))
    of_gaussian = bound.bits_per_dim(GaussianUNet.fitted.nats(test), images.image_shape)
    table, curves = beside({name: filled(changes) for name, changes in BESIDE.items()}, images)
    record.experiment(
        "pixels",
        config=asked,
        seconds=time.perf_counter() - start,
        results={
            "data": images.name,
            "gaussian_bpd": float(of_gaussian.mean()),
            "test": table,
            "curves": curves,
            "parts": parts({name: filled(changes) for name, changes in ROWS.items()}, images),
        },
    )


if __name__ == "__main__":
    main()
