"""Time the library's training step against a plain JAX step with the same arithmetic, interleaved in one process.

The plain step is written by hand (:mod:`medvdm.cost.plain`). Both start from the same weights and draw the same noise,
so their first losses must agree, which is checked. Times on a shared machine drift, so the two take turns and the
*ratio* of paired times is what counts.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medvdm import data as data_
from medvdm.cost import plain as plain_
from medvdm.cost import roofline as roofline_
from medvdm.data import ImageData
from medvdm.errors import InputError
from medvdm.models import vdm
from medvdm.runs.config import BenchmarkConfig, RunConfig, settings
from medvdm.runs.record import environment, version
from medvdm.training import batches as batches_
from medvdm.training.devices import Layout
from medvdm.training.step import augmentations, jit_step, new_state

DEFAULTS = BenchmarkConfig()


class Problem(NamedTuple):
    """What is timed: a config that is filled in, phantoms, and one batch of them on the device."""

    config: RunConfig
    images: ImageData
    x: jax.Array
    labels: jax.Array | None


class _Stepper:
    """A training step with its state, which each call uses up and replaces; a call ends when the device is done."""

    def __init__(self, step: Callable[..., Any], state: Any):
        self.step, self.state = step, state

    def __call__(self, x: jax.Array, labels: jax.Array | None) -> Any:
        self.state, out = self.step(self.state, x, labels)
        return out

    def wait(self) -> None:
        jax.block_until_ready(self.state)


def run(config: RunConfig, how: BenchmarkConfig = DEFAULTS, **changes: Any) -> dict[str, Any]:
    """Benchmark a config on phantoms.

    Args:
        config: what to time.
        how: how it is timed.
        changes: settings of :class:`medvdm.runs.config.BenchmarkConfig` by name: ``repeats``, ``roofline``.

    Returns:
        ``step_ms`` and ``plain_step_ms``; ``ratio``, of paired times (below 1, the library's step is the faster one);
        ``loop_over_step``, the time of a step fed by the input pipeline over the same step on a batch that lies ready
        (1: the pipeline costs nothing). Each is a median, with its quartiles beside it under ``..._quartiles``. Then
        ``peak_memory_gib``, and what it was measured on. With ``roofline``, its table under that name, see
        :func:`medvdm.cost.roofline.report`, and ``over_roofline``, the fastest step over the least time.

    Raises:
        InputError: repeats below 3; an architecture, schedule, T or term that the plain step does not have; a roofline
            of a network with other layers than dense ones; or losses that differ.
    """
    how = settings(how, changes)
    if how.repeats < 3:
        raise InputError(f"repeats: {how.repeats}; expected at least 3")
    if how.roofline:
        roofline_.dense_layers(config.model)  # refuses what it cannot count before anything is timed
    problem = prepare(config)
    model, training = problem.config.model, problem.config.training
    library = _Stepper(jit_step(model, training), new_state(model, training))
    parameters = vdm.count(library.state.params)
    step, start = plain_.plain_step(problem.config)
    plain = _Stepper(step, start(library.state.params))
    losses = first_losses(problem, library, plain)
    times, plain_times = step_times(problem, library, plain, how.repeats)
    del plain  # and its state
    fed, ready = loop_times(problem, library, how.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "preset": config.preset,
        "image_shape": list(model.image_shape),
        "batch_size": training.batch_size,
        "parameters": parameters,
        "repeats": how.repeats,
        **spread("step_ms", 1e3 * times, 3),
        **spread("plain_step_ms", 1e3 * plain_times, 3),
        **spread("ratio", times / plain_times, 4),
        **spread("loop_over_step", fed / ready, 4),
        "peak_memory_gib": round(peak / 2**30, 3),
        "first_loss_bpd": losses[0],
        "plain_first_loss_bpd": losses[1],
        "version": version(),
        "environment": environment(),
        # After the peak was read: the ceilings need memory of their own.
        **(_roofline(problem, library, float(times.min())) if how.roofline else {}),
    }


def prepare(config: RunConfig) -> Problem:
    """Phantoms for a config that the plain step can take; raises InputError for any other."""
    m, t = config.model, config.training
    plain = m.architecture in plain_.LOSSES and m.schedule == "fixed-linear" and not m.timesteps and t.stratified_times
    weighted = t.gradient_difference_weight or t.noise_weight or t.dp_noise
    if not plain or m.reduce or m.dtype != "float32" or weighted or any(augmentations(t).values()):
        raise InputError(
            "benchmark: the plain step has residual networks and single U-Nets (reduce 0), continuous time, "
            "fixed-linear gamma, stratified times, float32, no weights, no dp_noise and no augmentation but crops only"
        )
    images = data_.load(
        data_.DataConfig(data="phantom", num_images=8 * t.batch_size, image_size=config.data.image_size)
    )
    classes = len(images.class_names) if config.conditional else 0
    config = dataclasses.replace(config, model=dataclasses.replace(m, image_shape=images.image_shape, classes=classes))
    rows = np.resize(images.indices("train"), t.batch_size)
    labels = jnp.asarray(images.labels[rows], jnp.float32) if classes else None
    return Problem(config, images, jnp.asarray((images.levels if config.model.integers else images.read)(rows)), labels)


def first_losses(problem: Problem, library: _Stepper, plain: _Stepper) -> tuple[float, float]:
    """The losses of the first step of both, bits per dimension; raises InputError where they differ."""
    ours = float(library(problem.x, problem.labels).vlb_bpd)
    theirs = float(sum(plain(problem.x, problem.labels)))
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        raise InputError(f"benchmark: the plain step's loss is {theirs}; expected {ours}, the library's")
    return ours, theirs


def in_turns(a: Callable[[], None], b: Callable[[], None], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of two calls, (repeats,) each; they take turns, and who begins changes."""
    seconds = np.empty((repeats, 2))
    for i in range(repeats):
        for which in ((0, 1), (1, 0))[i % 2]:
            begin = time.perf_counter()
            (a, b)[which]()
            seconds[i, which] = time.perf_counter() - begin
    return seconds[:, 0], seconds[:, 1]


def step_times(problem: Problem, library: _Stepper, plain: _Stepper, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the library's step and of the plain one."""

    def once(stepper: _Stepper) -> None:
        stepper(problem.x, problem.labels)
        stepper.wait()

    return in_turns(lambda: once(library), lambda: once(plain), repeats)


def loop_times(problem: Problem, library: _Stepper, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of four steps as `fit` takes them, fed by the input pipeline, and of four on a batch that lies ready."""
    layout, batch_size = Layout(1), problem.config.training.batch_size
    batches = batches_.training_batches(
        problem.images,
        batch_size=min(batch_size, len(problem.images.indices("train"))),
        seed=0,
        integers=problem.config.model.integers,
    )

    def fed() -> None:
        for _ in range(4):
            x, labels = next(batches)
            library(layout.put(x), None if problem.labels is None else layout.put(labels))
        library.wait()

    def ready() -> None:
        for _ in range(4):
            library(problem.x, problem.labels)
        library.wait()

    return in_turns(fed, ready, max(repeats // 4, 3))


def spread(name: str, values: np.ndarray, digits: int) -> dict[str, Any]:
    """The median of some values under a name, and their quartiles beside it."""
    low, middle, high = (round(float(q), digits) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {name: middle, f"{name}_quartiles": [low, high]}


def _roofline(problem: Problem, library: _Stepper, fastest: float) -> dict[str, Any]:
    model, training = problem.config.model, problem.config.training
    compiled = library.step.lower(library.state, problem.x, problem.labels).compile()
    report = roofline_.report(model, training, roofline_.ceilings(dtype=model.dtype), compiled)
    return {"roofline": report, "over_roofline": round(fastest * 1e3 / report["roofline_ms"], 3)}
