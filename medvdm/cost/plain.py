"""The training step of two architectures in plain JAX: what the library's step is timed and checked against.

Each loss is written by hand: a dict of arrays, ``jnp``, ``lax`` and the same optax chain; no modules, no configs but
for their numbers. It has the fixed linear schedule in continuous time, stratified times and float32 only. The weights
and the keys of the noise are the library's, so that losses and gradients agree to the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medvdm.models.likelihoods import LEVELS, SPACING
from medvdm.models.unet import CONTRAST, PIXEL_VARIANCE, Attention
from medvdm.models.vdm import VDMConfig
from medvdm.runs.config import RunConfig


def _dense(q: dict[str, Any], h: jax.Array) -> jax.Array:
    h = h @ q["kernel"]
    return h + q["bias"] if "bias" in q else h


def _swish(h: jax.Array) -> jax.Array:
    return h * jax.nn.sigmoid(h)


# --- What both losses have in common --------------------------------------------------------------------------------


def _diffuse(m: VDMConfig, f: jax.Array, key_times: jax.Array, key_zt: jax.Array) -> tuple[jax.Array, ...]:
    """gamma (n,) at evenly spread times, the noise, and z_t, both of f's shape."""
    n = f.shape[0]
    t = jnp.mod(jax.random.uniform(key_times, ()) + jnp.arange(n) / n, 1.0)
    gamma = (1.0 - t) * m.gamma_min + t * m.gamma_max
    g = gamma.reshape((n,) + (1,) * (f.ndim - 1))
    eps = jax.random.normal(key_zt, f.shape)
    return gamma, eps, jnp.sqrt(jax.nn.sigmoid(-g)) * f + jnp.sqrt(jax.nn.sigmoid(g)) * eps


def _time_and_label(
    config: RunConfig, p: dict[str, Any], gamma: jax.Array, labels: jax.Array | None, key_drop: jax.Array
) -> jax.Array:
    """The features (n, 2 embedding_dim) that the modulations of the blocks are computed from."""
    m, n = config.model, gamma.shape[0]
    half = m.embedding_dim // 2
    u = 1000.0 * (gamma - m.gamma_min) / (m.gamma_max - m.gamma_min)
    angles = u[:, None] * jnp.exp(-math.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))[None, :]
    label = jnp.broadcast_to(p["labels"]["null"][None, :], (n, m.embedding_dim))
    if m.classes:
        kept = ~jax.random.bernoulli(key_drop, config.training.label_dropout, (n,))
        label = jnp.where(kept[:, None], labels @ p["labels"]["table"], label)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles), label], axis=1)


def _bound(
    m: VDMConfig, reconstruction: jax.Array, f: jax.Array, eps: jax.Array, eps_hat: jax.Array, numbers: int
) -> tuple[jax.Array, list[jax.Array]]:
    """The loss and its terms (reconstruction, diffusion, prior), in bits per each of an image's numbers."""
    n = f.shape[0]
    log_var1 = jax.nn.log_sigmoid(m.gamma_max)
    var1 = jnp.exp(log_var1)
    prior = 0.5 * (var1 + (1.0 - var1) * f * f - 1.0 - log_var1)
    diffusion = 0.5 * (m.gamma_max - m.gamma_min) * (eps - eps_hat) ** 2
    terms = [jnp.sum(term) / (n * numbers * math.log(2.0)) for term in (reconstruction, diffusion, prior)]
    return sum(terms[1:], terms[0]), terms


# --- Residual networks in a latent space ----------------------------------------------------------------------------


def _residual_block(q: dict[str, Any], h: jax.Array, film: jax.Array | None = None) -> jax.Array:
    mean = h.mean(-1, keepdims=True)
    variance = jnp.maximum((h * h).mean(-1, keepdims=True) - mean * mean, 0.0)
    normed = (h - mean) * (jax.lax.rsqrt(variance + 1e-6) * q["norm"]["scale"]) + q["norm"]["bias"]
    inner = _dense(q["expand"], _swish(normed))
    if film is not None:
        inner = (1 + film[:, : inner.shape[1]]) * inner + film[:, inner.shape[1] :]
    return h + _dense(q["contract"], _swish(inner))


def _stack(q: dict[str, Any], h: jax.Array, layers: int) -> jax.Array:
    h = _dense(q["enter"], h)
    for i in range(layers):
        h = _residual_block(q["blocks"][i], h)
    return _dense(q["leave"], h)


def residual_loss(config: RunConfig, p: dict[str, Any], x: jax.Array, labels: jax.Array | None, key: jax.Array) -> Any:
    """The loss of a residual model and its terms, bits per dimension; x is (n, h, w, c) in [0, 1]."""
    m, n = config.model, x.shape[0]
    key_bound, key_drop = jax.random.split(key)
    key_z0, key_times, key_zt = jax.random.split(key_bound, 3)
    flat = x.reshape(n, -1)
    f = _stack(p["encoder"], 2.0 * flat - 1.0, m.encoder_layers)
    z0 = f + math.exp(0.5 * m.gamma_min) * jax.random.normal(key_z0, f.shape)
    logits = _stack(p["decoder"], z0, m.decoder_layers)
    reconstruction = jax.nn.softplus(logits) - flat * logits

    gamma, eps, z = _diffuse(m, f, key_times, key_zt)
    s = p["score"]
    c = _time_and_label(config, p, gamma, labels, key_drop)
    c = _dense(s["mix3"], _swish(_dense(s["mix2"], _swish(_dense(s["mix1"], c)))))
    h = _dense(s["enter"], z)
    for i in range(m.score_layers):
        h = _residual_block(s["blocks"][i], h, _dense(s["films"][i]["linear"], c))
    return _bound(m, reconstruction, f, eps, z + _dense(s["leave"], h), flat.shape[1])


# --- A U-Net on pixels ----------------------------------------------------------------------------------------------


def _conv(q: dict[str, Any], h: jax.Array, stride: int = 1) -> jax.Array:
    strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(h, q["kernel"], strides, "SAME", dimension_numbers=layout) + q["bias"]


def _to_cells(x: jax.Array, p: int) -> jax.Array:
    n, h, w, c = x.shape
    cells = x.reshape(n, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(n, h // p, w // p, p * p * c)


def _from_cells(x: jax.Array, p: int) -> jax.Array:
    n, a, b, c = x.shape
    return x.reshape(n, a, b, p, p, c // p**2).transpose(0, 1, 3, 2, 4, 5).reshape(n, a * p, b * p, c // p**2)


def _rms_normed(h: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6)


def _conv_block(q: dict[str, Any], h: jax.Array, film: jax.Array) -> jax.Array:
    inner = _rms_normed(_conv(q["first"], _swish(_rms_normed(h))))
    width = inner.shape[-1]
    inner = (1 + film[:, None, None, :width]) * inner + film[:, None, None, width:]
    return (_dense(q["skip"], h) if "skip" in q else h) + _conv(q["second"], _swish(inner))


def _attention(q: dict[str, Any], h: jax.Array) -> jax.Array:
    n, a, b, width = h.shape
    each = width // Attention.HEADS
    parts = _dense(q["enter"], _rms_normed(h)).reshape(n, a * b, 3, Attention.HEADS, each)
    query, key, value = _rms_normed(parts[:, :, 0]), _rms_normed(parts[:, :, 1]), parts[:, :, 2]
    weights = jax.nn.softmax(0.5 * math.sqrt(each) * jnp.einsum("nihd,njhd->nhij", query, key), axis=-1)
    return h + _dense(q["leave"], jnp.einsum("nhij,njhd->nihd", weights, value).reshape(n, a, b, width))


def _blur(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = (x[:, :-2] + x[:, 1:-1] + x[:, 2:]) / 3.0
    return (x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]) / 3.0


def _answers(m: VDMConfig, s: dict[str, Any], z: jax.Array, sigma2: jax.Array, c: jax.Array) -> jax.Array:
    """What the network says of each pixel, (n, h, w, channels) or, with rounding, twice as many."""
    _, height, width, _ = z.shape
    given = [z]
    if m.details == "contrast":
        once = _blur(z)
        given += [(z - once) / jnp.sqrt(sigma2 + CONTRAST**2), (once - _blur(once)) / jnp.sqrt(sigma2 + CONTRAST**2)]
    if m.details == "fourier":
        given += [f(2.0**n * math.pi * z) for n in (7, 8) for f in (jnp.sin, jnp.cos)]
    least = m.patch * 2 ** (m.scales - 1)
    filled = ((0, 0), (0, -height % least), (0, -width % least), (0, 0))
    h = _conv(s["enter"], _to_cells(jnp.pad(jnp.concatenate(given, axis=-1), filled, mode="edge"), m.patch))
    films: Iterator[jax.Array] = (_dense(s["films"][i]["linear"], c) for i in range(len(s["films"])))
    kept = []
    for scale in range(m.scales):
        for i in range(m.blocks):
            h = _conv_block(s["down"][scale][i], h, next(films))
            if m.attention and scale == m.scales - 1:
                h = _attention(s["attention"][i], h)
        if scale < m.scales - 1:
            kept.append(h)
            h = _conv(s["shrink"][scale], h, stride=2)
    for scale in reversed(range(m.scales - 1)):
        h = jnp.concatenate([kept[scale], _from_cells(_dense(s["grow"][scale], h), 2)], axis=-1)
        for i in range(m.blocks):
            h = _conv_block(s["up"][scale][i], h, next(films))
    said = _from_cells(_conv(s["leave"], _swish(_rms_normed(h))), m.patch)
    return said[:, :height, :width]


def _level_mean(centre: jax.Array, deviation: jax.Array) -> jax.Array:
    """The mean gray value of the discrete law, from its eleven nearest levels; both on the scale of [-1, 1]."""
    c, d2 = (centre + 1.0) / SPACING, (deviation / SPACING) ** 2
    near = jnp.clip(jnp.round(jax.lax.stop_gradient(c)), 0, LEVELS - 1)[..., None]
    k = near + jnp.arange(-5.0, 6.0)
    exponents = -((k - jnp.clip(c, -3.0, LEVELS + 2.0)[..., None]) ** 2) / (2.0 * jnp.minimum(d2, 1.0)[..., None])
    weights = jax.nn.softmax(jnp.where((k < 0) | (k > LEVELS - 1), -jnp.inf, exponents), axis=-1)
    return jnp.where(d2 < 1.0, SPACING * jnp.sum(k * weights, axis=-1) - 1.0, centre)


def _level_nll(x: jax.Array, centre: jax.Array, deviation: float) -> jax.Array:
    """-log p of each gray value in nats; exponents count from that of the nearest level, which is the largest."""
    c, d2 = (centre + 1.0) / SPACING, (deviation / SPACING) ** 2
    near = jnp.clip(jnp.round(c), 0, LEVELS - 1)

    def exponent(k: jax.Array, c: jax.Array, near: jax.Array) -> jax.Array:
        return 0.5 * (k - near) * (2.0 * c - k - near) / d2

    every = exponent(jnp.arange(float(LEVELS)), c[..., None], near[..., None])
    return jnp.log(jnp.exp(every).sum(-1)) - exponent(x.astype(jnp.float32), c, near)


def unet_loss(config: RunConfig, p: dict[str, Any], x: jax.Array, labels: jax.Array | None, key: jax.Array) -> Any:
    """The loss of a U-Net on pixels and its terms, bits per dimension; x is (n, h, w, c), uint8."""
    m = config.model
    key_bound, key_drop = jax.random.split(key)
    key_z0, key_times, key_zt = jax.random.split(key_bound, 3)
    f = SPACING * x.astype(jnp.float32) - 1.0
    noise = math.exp(0.5 * m.gamma_min)
    reconstruction = _level_nll(x, f + noise * jax.random.normal(key_z0, f.shape), noise)

    gamma, eps, z = _diffuse(m, f, key_times, key_zt)
    s = p["score"]
    c = _time_and_label(config, p, gamma, labels, key_drop)
    c = _swish(_dense(s["mix2"], _swish(_dense(s["mix1"], c))))
    g = gamma[:, None, None, None]
    alpha2, sigma2 = jax.nn.sigmoid(-g), jax.nn.sigmoid(g)
    alpha, sigma = jnp.sqrt(alpha2), jnp.sqrt(sigma2)
    said = _answers(m, s, z, sigma2, c)
    channels = z.shape[-1]
    total = alpha2 * PIXEL_VARIANCE + sigma2
    eps_hat = (sigma * z + jnp.sqrt(alpha2 * PIXEL_VARIANCE * total) * said[..., :channels]) / total
    if m.rounding:
        variance = jnp.exp(jnp.clip(2.0 * said[..., channels:] - 5.0, -14.0, 3.0))
        deviation = jnp.sqrt(sigma2 * variance / (alpha2 * variance + sigma2))
        centre = (z - sigma * eps_hat) / alpha
        eps_hat = eps_hat + alpha * (centre - _level_mean(centre, deviation)) / sigma
    return _bound(m, reconstruction, f, eps, eps_hat, math.prod(x.shape[1:]))


# --- The step -------------------------------------------------------------------------------------------------------

LOSSES = {"residual": residual_loss, "unet": unet_loss}  #: by architecture


def plain_step(config: RunConfig) -> Any:
    """A jitted training step around the architecture's loss, and what makes its first state from weights.

    ``step(state, x, labels)`` gives the next state and the loss's terms; the state is a tuple, donated.
    """
    t, loss = config.training, LOSSES[config.model.architecture]

    def rate(k: jax.Array) -> jax.Array:
        cosine = t.final_fraction + (1 - t.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * k / t.steps))
        return t.learning_rate * cosine * (jnp.minimum(k / t.warmup_steps, 1.0) if t.warmup_steps else 1.0)

    adamw = optax.adamw(rate, b1=t.b1, b2=t.b2, eps=t.adam_eps, weight_decay=t.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(t.clip_norm), adamw) if t.clip_norm else adamw

    def cropped(key: jax.Array, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        first = jax.random.randint(key, (n, 2), 0, jnp.array([h - t.crop + 1, w - t.crop + 1]))
        sizes = (1, t.crop, t.crop, c)
        return jnp.concatenate([jax.lax.dynamic_slice(x, (i, *first[i], 0), sizes) for i in range(n)])

    def step(state: Any, x: jax.Array, labels: jax.Array | None) -> Any:
        k, p, opt, ema = state
        key = jax.random.fold_in(jax.random.key(t.seed), k)
        if t.crop:
            x = cropped(jax.random.fold_in(key, 3), x)
        grads, terms = jax.grad(lambda q: loss(config, q, x, labels, key), has_aux=True)(p)
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
