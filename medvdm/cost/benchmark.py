"""Time the library's training step against a plain JAX step with the same arithmetic, interleaved in one process.

The plain step is written by hand below: a dict of arrays, ``jnp`` and the same optax chain; no modules, no configs.
Both start from the same weights and draw the same noise, so their first losses must agree, which is checked. Times on
a shared machine drift, so the two take turns and the *ratio* of paired times is what counts.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medvdm import data as data_
from medvdm.cost import roofline as roofline_
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


def run(config: RunConfig, how: BenchmarkConfig = DEFAULTS, **changes: Any) -> dict[str, Any]:
    """Benchmark a config on phantoms.

    Args:
        config: what to time.
        how: how it is timed.
        changes: settings of :class:`medvdm.runs.config.BenchmarkConfig` by name: ``repeats``, ``roofline``.

    Returns:
        ``step_ms`` and ``plain_step_ms`` (medians), ``ratio`` (median of paired ratios), ``loop_over_step`` (time of
        a step fed by the input pipeline over the same step on a batch that lies ready), ``peak_memory_gib``, and what
        it was measured on. With ``roofline``, its table under that name, see :func:`medvdm.cost.roofline.report`, and
        ``over_roofline``, the fastest step over the least time.

    Raises:
        InputError: repeats below 3; a schedule, T or term that the plain step does not have; or losses that differ.
    """
    how = settings(how, changes)
    m, t, repeats, roofline = config.model, config.training, how.repeats, how.roofline
    if repeats < 3:
        raise InputError(f"repeats: {repeats}; expected at least 3")
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
    model = dataclasses.replace(
        m, image_shape=images.image_shape, classes=len(images.class_names) if config.conditional else 0
    )
    config = dataclasses.replace(config, model=model)
    train = np.flatnonzero(images.splits == "train")
    rows = np.resize(train, t.batch_size)
    x = jnp.asarray(images.read(rows))
    labels = jnp.asarray(images.labels[rows], jnp.float32) if model.classes else None

    step = jit_step(model, t)
    state = new_state(model, t)
    parameters = vdm.count(state.params)
    plain, start = plain_step(config)
    plain_state = start(state.params)
    state, metrics = step(state, x, labels)
    plain_state, terms = plain(plain_state, x, labels)
    ours, theirs = float(metrics.vlb_bpd), float(sum(terms))
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        raise InputError(f"benchmark: the plain step's loss is {theirs}; expected {ours}, the library's")

    times: list[float] = []
    plain_times: list[float] = []
    for i in range(repeats):
        for which in ((0, 1), (1, 0))[i % 2]:
            begin = time.perf_counter()
            if which == 0:
                state, metrics = step(state, x, labels)
                jax.block_until_ready(state)
                times.append(time.perf_counter() - begin)
            else:
                plain_state, terms = plain(plain_state, x, labels)
                jax.block_until_ready(plain_state)
                plain_times.append(time.perf_counter() - begin)
    del plain_state

    # The loop as `fit` runs it: batches from the pipeline, metrics read one step late. In turns with ready batches.
    batches = batches_.training_batches(images, batch_size=min(t.batch_size, len(train)), seed=0)
    layout = Layout(1)
    fed: list[float] = []
    ready: list[float] = []
    for i in range(2 * max(repeats // 4, 3)):
        begin = time.perf_counter()
        for _ in range(4):
            if i % 2:
                xs, ys = next(batches)
                state, metrics = step(state, layout.put(xs), layout.put(ys) if model.classes else None)
            else:
                state, metrics = step(state, x, labels)
        jax.block_until_ready(state)
        (fed if i % 2 else ready).append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    extra: dict[str, Any] = {}
    if roofline:  # after the peak was read: the ceilings need memory of their own
        compiled = step.lower(state, x, labels).compile()
        del state
        extra["roofline"] = roofline_.report(model, t, roofline_.ceilings(dtype=model.dtype), compiled)
        extra["over_roofline"] = round(min(times) * 1e3 / extra["roofline"]["roofline_ms"], 3)
    return {
        "preset": config.preset,
        "image_shape": list(model.image_shape),
        "batch_size": t.batch_size,
        "parameters": parameters,
        "repeats": repeats,
        "step_ms": round(statistics.median(times) * 1e3, 3),
        "plain_step_ms": round(statistics.median(plain_times) * 1e3, 3),
        "ratio": round(statistics.median(a / b for a, b in zip(times, plain_times, strict=True)), 4),
        "loop_over_step": round(statistics.median(a / b for a, b in zip(fed, ready, strict=True)), 4),
        "peak_memory_gib": round(peak / 2**30, 3),
        "first_loss_bpd": ours,
        "plain_first_loss_bpd": theirs,
        "version": version(),
        "environment": environment(),
        **extra,
    }
