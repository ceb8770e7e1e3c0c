r"""Ancestral sampling: from :math:`z_1 \sim N(0, I)` down to z_0, then the decoder.

One step, from t to s < t, draws from :math:`q(z_s \mid z_t, x = \hat x)`:

.. math::
    z_s = \frac{\alpha_s}{\alpha_t} (z_t - c\, \sigma_t \hat\epsilon) + \sigma_s \sqrt{c}\; \epsilon, \qquad
    c = -\mathrm{expm1}(\gamma_s - \gamma_t).

With guidance weight w, :math:`\hat\epsilon = (1 + w)\, \hat\epsilon(z, y) - w\, \hat\epsilon(z, \text{null})`; w = 0 is
the conditional model itself (Ho & Salimans, 2022). The null is the row that label dropout trained.

The whole chain is one compiled loop with a step count that is an argument, so any T runs without a new compilation.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from medvdm import gaussian, vdm
from medvdm.errors import InputError
from medvdm.likelihoods import bernoulli_mean
from medvdm.vlb import Diffusion

MAX_STEPS = 1_000_000


def guided_eps(
    model: Diffusion, z: Float[Array, "n d"], condition: Any, null: Any | None, guidance: Float[Array, ""] | float
) -> Float[Array, "n d"]:
    """The predicted noise, with guidance when the null's condition is given."""
    eps_hat = model.eps_hat(z, condition)
    if null is None:
        return eps_hat
    return (1.0 + guidance) * eps_hat - guidance * model.eps_hat(z, null)


def ancestral_step(
    z_t: Float[Array, "n d"],
    eps_hat: Float[Array, "n d"],
    gamma_s: Float[Array, ""],
    gamma_t: Float[Array, ""],
    noise: Float[Array, "n d"],
) -> Float[Array, "n d"]:
    """One draw of z_s given z_t and the predicted noise, see the module's head."""
    mean, variance = gaussian.posterior_from_eps(eps_hat, z_t, gamma_s, gamma_t)
    return mean + jnp.sqrt(variance) * noise


def chain(
    model: Diffusion,
    z: Float[Array, "n d"],
    label: Float[Array, "m c"],
    null: Float[Array, "1 c"] | None = None,
    *,
    keys: Key[Array, " n"],
    steps: Int[Array, ""] | int,
    first: Int[Array, ""] | int,
    guidance: Float[Array, ""] | float = 0.0,
    num_states: int = 1,
) -> Float[Array, "k n d"]:
    """Run steps ``first``, ``first - 1``, ..., 1 of ``steps``: from z at t = first/steps down to z_0.

    Args:
        model: predicts the noise.
        z: the latent at t = first / steps.
        label: embedded labels, one row an example or one for all.
        null: the embedded null, when guidance is wanted.
        keys: n keys, one an example; an example's noise does not depend on the batch it is in.
        steps: T.
        first: the step to start from; T for t = 1.
        guidance: w.
        num_states: how many evenly spaced latents to return; 1 is z_0 alone.

    Returns:
        The latents at ``num_states`` times, the last of which is z_0.
    """
    steps, first = jnp.asarray(steps, jnp.int32), jnp.asarray(first, jnp.int32)

    def gamma_at(i: Int[Array, "*b"]) -> Float[Array, "*b"]:
        return model.gamma(i.astype(jnp.float32) / steps.astype(jnp.float32))

    # Conditions depend on time and label only. Those of a block of steps are one large matrix product, which is far
    # cheaper than many small ones; the block is sized so that they stay in the processor's cache.
    block = max(1, 64 // label.shape[0])

    def conditions(i: Int[Array, " b"], embedded: Float[Array, "m c"]) -> Any:
        m = embedded.shape[0]
        flat = model.condition(jnp.repeat(gamma_at(i), m), jnp.tile(embedded, (block, 1)))
        return jax.tree.map(lambda leaf: leaf.reshape(block, m, *leaf.shape[1:]), flat)

    def steps_of_block(done: Int[Array, ""], stop: Int[Array, ""], z: Float[Array, "n d"]) -> Float[Array, "n d"]:
        numbers = jnp.maximum(first - done - jnp.arange(block), 1)
        with_label = conditions(numbers, label)
        with_null = None if null is None else conditions(numbers, null)

        def read(j: Int[Array, ""] | int) -> Any:
            return jax.tree.map(lambda leaf: leaf[jnp.minimum(j, block - 1)], (with_label, with_null))

        def one(j: Int[Array, ""], carry: tuple[Array, Any]) -> tuple[Array, Any]:
            z_t, (here, here_null) = carry
            i = numbers[j]
            noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), z.shape[1:]))(keys)
            eps_hat = guided_eps(model, z_t, here, here_null, guidance)
            z_s = ancestral_step(z_t, eps_hat, gamma_at(i - 1), gamma_at(i), noise)
            # Reading the next condition here, into the carry, keeps XLA from fusing the lookup into the network's
            # element-wise loops, which doubled the time of a step on CPUs.
            return z_s, read(j + 1)

        return jax.lax.fori_loop(0, jnp.minimum(block, stop - done), one, (z, read(0)))[0]

    def segment(z: Float[Array, "n d"], ends: Int[Array, " 2"]) -> tuple[Array, Array]:
        start, stop = ends[0], ends[1]
        blocks = -((start - stop) // block)
        z = jax.lax.fori_loop(0, blocks, lambda b, z: steps_of_block(start + b * block, stop, z), z)
        return z, z

    ends = _segment_ends(first, num_states)
    return jax.lax.scan(segment, z, jnp.stack([ends[:-1], ends[1:]], axis=1))[1]


def _segment_ends(first: Int[Array, ""] | int, num_states: int) -> Int[Array, " {num_states}+1"]:
    """Numbers of steps done at the start and after each of ``num_states`` about equal segments of ``first``."""
    parts = jnp.arange(num_states + 1)
    whole, rest = first // num_states, first % num_states
    return parts * whole + parts * rest // num_states  # no product can overflow, and the last is exactly `first`


class Samples(NamedTuple):
    """What :func:`generate` returns; k is ``num_states``.

    Attributes:
        images: (n, h, w, c) Bernoulli means in [0, 1].
        latents: (k, n, d) latents at the times below, the last of them z_0.
        states: (k, n, h, w, c) each latent shown by the decoder as if it were z_0, for figures.
        times: (k,) the time t of each latent, falling to 0.
    """

    images: np.ndarray
    latents: np.ndarray
    states: np.ndarray
    times: np.ndarray


def generate(
    graph: nnx.GraphDef,
    params: vdm.Params,
    *,
    num: int,
    steps: int,
    labels: np.ndarray | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    z: np.ndarray | None = None,
    first: int | None = None,
    num_states: int = 1,
    batch_size: int = 64,
) -> Samples:
    """Draw ``num`` images with ``steps`` ancestral steps.

    Sample i of a seed is the same (up to rounding) whatever ``num`` and ``batch_size`` are.

    Args:
        graph, params: the model, from :func:`medvdm.vdm.split`.
        labels: (num, k) multi-hot; None draws from the null.
        guidance: w; 0 is the model itself.
        z: (num, d) latents to start from instead of N(0, I), at t = ``first / steps``.
        first: the step to start from; ``steps`` if None.
        num_states: how many evenly spaced states to return.
        batch_size: samples drawn at once.

    Raises:
        InputError: a count below 1, guidance without labels, or shapes that do not fit.
    """
    model = vdm.merge(graph, params)
    first = steps if first is None else first
    for name, value in {"num": num, "steps": steps, "num_states": num_states, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")
    if steps > MAX_STEPS:
        raise InputError(f"steps: {steps}; expected at most {MAX_STEPS}")
    if not num_states <= first <= steps:
        raise InputError(f"first: {first}; expected from num_states ({num_states}) to steps ({steps})")
    if not math.isfinite(guidance):
        raise InputError(f"guidance: {guidance}; expected a finite number")
    if guidance and labels is None:
        raise InputError(f"guidance: {guidance} without labels; expected a label (and a class-conditional model)")
    if labels is not None and labels.shape != (num, model.config.classes):
        raise InputError(f"labels: shape {labels.shape}; expected {(num, model.config.classes)}, multi-hot")
    if z is not None and z.shape != (num, model.config.latent):
        raise InputError(f"z: shape {z.shape}; expected {(num, model.config.latent)}")

    if labels is not None and (labels == labels[0]).all():
        labels = labels[:1]  # one row serves all
    size = min(num, batch_size)
    parts = []
    for offset in range(0, num, size):
        rows = np.minimum(np.arange(offset, offset + size), num - 1)  # the last part is filled up: one compilation
        part = _generate(
            params,
            seed,
            offset,
            None if z is None else jnp.asarray(z, jnp.float32)[rows],
            None if labels is None else jnp.asarray(labels, jnp.float32)[rows if len(labels) > 1 else np.array([0])],
            steps,
            first,
            float(guidance),
            graph=graph,
            size=size,
            guided=guidance != 0,
            num_states=num_states,
        )
        parts.append(jax.device_get(part))
    latents, states = (np.concatenate(p, axis=1)[:, :num] for p in list(zip(*parts, strict=True))[:2])
    return Samples(states[-1], latents, states, parts[0][2])


@partial(jax.jit, static_argnames=("graph", "size", "guided", "num_states"))
def _generate(
    params: vdm.Params,
    seed: Array | int,
    offset: Array | int,
    z: Float[Array, "n d"] | None,
    labels: Float[Array, "m classes"] | None,
    steps: Array | int,
    first: Array | int,
    guidance: Array | float,
    *,
    graph: nnx.GraphDef,
    size: int,
    guided: bool,
    num_states: int,
) -> tuple[Float[Array, "k n d"], Float[Array, "k n h w c"], Float[Array, " k"]]:
    model = vdm.merge(graph, params)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(offset + jnp.arange(size))
    if z is None:  # steps are numbered from 1, so 0 is free for the start
        z = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (model.config.latent,)))(keys)
    label = model.embed(labels, n=1)
    null = model.embed(None, n=1) if guided else None
    latents = chain(
        model, z, label, null, keys=keys, steps=steps, first=first, guidance=guidance, num_states=num_states
    )
    times = (first - _segment_ends(first, num_states)[1:]) / steps  # the last is exactly 0
    scale = gaussian.alpha(model.gamma(times))[:, None, None]
    states = jax.lax.map(lambda latent: bernoulli_mean(model.decode(latent)), latents / scale)
    return latents, states, times
