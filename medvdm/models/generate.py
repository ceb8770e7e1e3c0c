"""Draw images from a model: batches of ancestral chains, then the decoder."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medvdm.errors import DivergedError, InputError
from medvdm.models import vdm
from medvdm.models.likelihoods import bernoulli_mean
from medvdm.theory import gaussian
from medvdm.theory.sampling import chain, segment_ends

MAX_STEPS = 1_000_000


class Generated(NamedTuple):
    """What :func:`generate` returns; k is ``num_states``.

    Attributes:
        images: (n, h, w, c) Bernoulli means in [0, 1].
        latents: ``(k, n, *latent_shape)`` latents at the times below, the last of them z_0.
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
) -> Generated:
    """Draw ``num`` images with ``steps`` ancestral steps.

    Sample i of a seed is the same (up to rounding) whatever ``num`` and ``batch_size`` are.

    Args:
        graph, params: the model, from :func:`medvdm.models.vdm.split`.
        labels: (num, k) multi-hot; None draws from the null.
        guidance: w; 0 is the model itself.
        z: ``(num, *latent_shape)`` latents to start from instead of N(0, I), at t = ``first / steps``.
        first: the step to start from; ``steps`` if None.
        num_states: how many evenly spaced states to return.
        batch_size: samples drawn at once.

    Raises:
        InputError: a count below 1, guidance without labels, or shapes that do not fit.
        DivergedError: the chain left the finite numbers, as with weights that are not finite.
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
    if z is not None and z.shape != (num, *model.latent_shape):
        raise InputError(f"z: shape {z.shape}; expected {(num, *model.latent_shape)}")

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
    if not (np.isfinite(latents).all() and np.isfinite(states).all()):
        raise DivergedError(
            f"sampling: a latent or pixel is not finite, with {steps} steps and guidance {guidance:g}; "
            "expected finite numbers (is a weight not finite, or the guidance far too large?)"
        )
    return Generated(states[-1], latents, states, parts[0][2])


@partial(jax.jit, static_argnames=("graph", "size", "guided", "num_states"))
def _generate(
    params: vdm.Params,
    seed: Array | int,
    offset: Array | int,
    z: Float[Array, "n *latent"] | None,
    labels: Float[Array, "m classes"] | None,
    steps: Array | int,
    first: Array | int,
    guidance: Array | float,
    *,
    graph: nnx.GraphDef,
    size: int,
    guided: bool,
    num_states: int,
) -> tuple[Float[Array, "k n *latent"], Float[Array, "k n h w c"], Float[Array, " k"]]:
    model = vdm.merge(graph, params)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(offset + jnp.arange(size))
    if z is None:  # steps are numbered from 1, so 0 is free for the start
        z = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), model.latent_shape))(keys)
    label = model.embed(labels, n=1)
    null = model.embed(None, n=1) if guided else None
    latents = chain(
        model, z, label, null, keys=keys, steps=steps, first=first, guidance=guidance, num_states=num_states
    )
    times = (first - segment_ends(first, num_states)[1:]) / steps  # the last is exactly 0
    scale = gaussian.align(gaussian.alpha(model.gamma(times)), latents)
    states = jax.lax.map(lambda latent: bernoulli_mean(model.decode(latent)), latents / scale)
    return latents, states, times
