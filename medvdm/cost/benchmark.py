"""Time the library's training step against a plain JAX step with the same arithmetic, interleaved in one process.

The plain step is written by hand below: a dict of arrays, ``jnp`` and the same optax chain; no modules, no configs.
Both start from the same weights and draw the same noise, so their first losses must agree, which is checked. Times on
a shared machine drift, so the two take turns and the *ratio* of paired times is what counts.
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
import optax

from medvdm import data as data_
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


def plain_loss(config: RunConfig, p: dict[str, Any], x: jax.Array, labels: jax.Array | None, key: jax.Array) -> Any:
    """The loss of the presets (fixed linear schedule) in plain JAX, bits per dimension."""
    m, n = config.model, x.shape[0]
    pixels = math.prod(m.image_shape)

    def dense(q: dict[str, Any], h: jax.Array) -> jax.Array:
        return h @ q["kernel"] + q["bias"]

    def swish(h: jax.Array) -> jax.Array:
        return h * jax.nn.sigmoid(h)

    def block(q: dict[str, Any], h: jax.Array, film: jax.Array | None = None) -> jax.Array:
        mean = h.mean(-1, keepdims=True)
        variance = jnp.maximum((h * h).mean(-1, keepdims=True) - mean * mean, 0.0)
        normed = (h - mean) * (jax.lax.rsqrt(variance + 1e-6) * q["norm"]["scale"]) + q["norm"]["bias"]
        inner = dense(q["expand"], swish(normed))
        if film is not None:
            inner = (1 + film[:, : inner.shape[1]]) * inner + film[:, inner.shape[1] :]
        return h + dense(q["contract"], swish(inner))

    def stack(q: dict[str, Any], h: jax.Array, layers: int) -> jax.Array:
        h = dense(q["enter"], h)
        for i in range(layers):
            h = block(q["blocks"][i], h)
        return dense(q["leave"], h)

    key_bound, key_drop = jax.random.split(key)
    key_z0, key_times, key_zt = jax.random.split(key_bound, 3)
    flat = x.reshape(n, pixels)
    f = stack(p["encoder"], 2.0 * flat - 1.0, m.encoder_layers)
    z0 = f + math.exp(0.5 * m.gamma_min) * jax.random.normal(key_z0, f.shape)
    logits = stack(p["decoder"], z0, m.decoder_layers)
    reconstruction = jnp.sum(jax.nn.softplus(logits) - flat * logits, axis=1)

    log_var1 = jax.nn.log_sigmoid(m.gamma_max)
    var1 = jnp.exp(log_var1)
    prior = 0.5 * jnp.sum(var1 + (1.0 - var1) * f * f - 1.0 - log_var1, axis=1)

    t = jnp.mod(jax.random.uniform(key_times, ()) + jnp.arange(n) / n, 1.0)
    gamma = (1.0 - t) * m.gamma_min + t * m.gamma_max
    eps = jax.random.normal(key_zt, f.shape)
    z = jnp.sqrt(jax.nn.sigmoid(-gamma))[:, None] * f + jnp.sqrt(jax.nn.sigmoid(gamma))[:, None] * eps
    half = m.embedding_dim // 2
    u = 1000.0 * (gamma - m.gamma_min) / (m.gamma_max - m.gamma_min)
    angles = u[:, None] * jnp.exp(-math.log(10_000.0) * jnp.arange(half) / (half - 1))[None, :]
    label = jnp.broadcast_to(p["labels"]["null"][None, :], (n, m.embedding_dim))
    if m.classes:
        kept = ~jax.random.bernoulli(key_drop, config.training.label_dropout, (n,))
        label = jnp.where(kept[:, None], labels @ p["labels"]["table"], label)
    s = p["score"]
    c = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), label], axis=1)
    c = dense(s["mix3"], swish(dense(s["mix2"], swish(dense(s["mix1"], c)))))
    h = dense(s["enter"], z)
    for i in range(m.score_layers):
        h = block(s["blocks"][i], h, dense(s["films"][i]["linear"], c))
    eps_hat = z + dense(s["leave"], h)
    diffusion = 0.5 * (m.gamma_max - m.gamma_min) * jnp.sum((eps - eps_hat) ** 2, axis=1)

    terms = [jnp.mean(term) / (pixels * math.log(2.0)) for term in (reconstruction, diffusion, prior)]
    return sum(terms), terms


def plain_step(config: RunConfig) -> Any:
    """A jitted training step around :func:`plain_loss`; the state is a tuple, donated."""
    t = config.training

    def rate(k: jax.Array) -> jax.Array:
        cosine = t.final_fraction + (1 - t.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * k / t.steps))
        return t.learning_rate * jnp.minimum(k / t.warmup_steps, 1.0) * cosine

    adamw = optax.adamw(rate, b1=t.b1, b2=t.b2, eps=t.adam_eps, weight_decay=t.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(t.clip_norm), adamw) if t.clip_norm else adamw

    def step(state: Any, x: jax.Array, labels: jax.Array | None) -> Any:
        k, p, opt, ema = state
        key = jax.random.fold_in(jax.random.key(t.seed), k)
        grads, terms = jax.grad(lambda q: plain_loss(config, q, x, labels, key), has_aux=True)(p)
        updates, opt = chain.update(grads, opt, p)
        p = optax.apply_updates(p, updates)
        if ema is not None:
            decay = jnp.minimum(t.ema_decay, (1.0 + k) / (10.0 + k))
            ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, ema, p)
        return (k + 1, p, opt, ema), terms

    def start(p: Any) -> Any:
        copy = jax.tree.map(jnp.copy, p)
        ema = jax.tree.map(jnp.copy, p) if t.ema_decay else None
        return (jnp.zeros((), jnp.int32), copy, chain.init(copy), ema)

    return jax.jit(step, donate_argnums=0), start


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
        InputError: repeats below 3; a schedule, T or term that the plain step does not have; or losses that differ.
    """
    how = settings(how, changes)
    if how.repeats < 3:
        raise InputError(f"repeats: {how.repeats}; expected at least 3")
    problem = prepare(config)
    model, training = problem.config.model, problem.config.training
    library = _Stepper(jit_step(model, training), new_state(model, training))
    parameters = vdm.count(library.state.params)
    step, start = plain_step(problem.config)
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
    dense = vdm.ARCHITECTURES[m.architecture].dense
    plain = dense and m.schedule == "fixed-linear" and not m.timesteps and t.stratified_times
    if not plain or t.gradient_difference_weight or any(augmentations(t).values()):
        raise InputError(
            "benchmark: the plain step has residual networks, continuous time, fixed-linear gamma, stratified times "
            "and no augmentation only"
        )
    images = data_.load(
        data_.DataConfig(data="phantom", num_images=8 * t.batch_size, image_size=config.data.image_size)
    )
    classes = len(images.class_names) if config.conditional else 0
    config = dataclasses.replace(config, model=dataclasses.replace(m, image_shape=images.image_shape, classes=classes))
    rows = np.resize(images.indices("train"), t.batch_size)
    labels = jnp.asarray(images.labels[rows], jnp.float32) if classes else None
    return Problem(config, images, jnp.asarray(images.read(rows)), labels)


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
        problem.images, batch_size=min(batch_size, len(problem.images.indices("train"))), seed=0
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
