"""Likelihoods of images by the probability flow, and importance-weighted bounds: the sums over a cascade's stages.

Each image is integrated with steps of its own, so what is found of it does not depend on the images beside it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.nnx as nnx
import jax
import numpy as np
from jaxtyping import Array

from medvdm.errors import DivergedError, InputError, nearest
from medvdm.models import cascade, vdm
from medvdm.models.likelihoods import SPACING
from medvdm.theory import flow, importance
from medvdm.theory.flow import FlowConfig

DEQUANTISATIONS = ("encoder", "uniform")


class FlowDraws(NamedTuple):
    """Draws of -log p(x) by the flow, one z_0 each; a cascade's are sums over its stages.

    Attributes:
        nats: (draws, n) float64, means over the probes.
        probe_variance: (draws, n) variance of that mean due to the probes; 0 for an exact divergence, NaN for one
            probe.
        evaluations: (draws, n) of the network.
    """

    nats: np.ndarray
    probe_variance: np.ndarray
    evaluations: np.ndarray


def flow_draws(
    graph: nnx.GraphDef,
    params: vdm.Params,
    x: np.ndarray | Array,
    labels: np.ndarray | Array | None,
    *,
    draws: int,
    key: jax.Array,
    config: FlowConfig,
    uniform: bool = False,
) -> FlowDraws:
    """Draws of each image of a batch, of a model that :func:`check_flow` lets pass.

    Args:
        graph, params: the model.
        x, labels: images and multi-hot labels, or None.
        draws: of z_0 per image.
        key: folded with the number of the draw, and split into one key per image.
        config: divergence and tolerances.
        uniform: dequantise by :func:`medvdm.theory.flow.uniform_log_weight`, not by
            :func:`medvdm.theory.flow.log_weight`.

    Raises:
        DivergedError: an integration that does not come to its end.
    """
    settings = {"graph": graph, "config": config, "uniform": uniform}
    found = []
    for d in range(draws):  # all of the same compiled program
        keys = jax.random.split(jax.random.fold_in(key, d), len(x))
        *drawn, finished = jax.device_get(_flow(params, x, labels, keys, **settings))
        if not finished.all() or not np.isfinite(drawn[0]).all():
            raise DivergedError(
                f"flow: an image was not integrated within {config.max_steps} steps; expected a model whose predicted "
                "noise is finite, or larger rtol and atol, or more max_steps"
            )
        found.append(drawn)
    return FlowDraws(*(np.stack(one).astype(np.float64) for one in zip(*found, strict=True)))


@partial(jax.jit, static_argnames=("graph", "config", "uniform"))
def _flow(
    params: vdm.Params,
    x: Array,
    labels: Array | None,
    keys: Array,
    *,
    graph: nnx.GraphDef,
    config: FlowConfig,
    uniform: bool,
) -> tuple[Array, Array, Array, Array]:
    """-log p(x), its variance by the probes, evaluations, and whether all is well, (n,) each."""
    model = vdm.merge(graph, params)

    def one(x: Array, label: Array | None, key: Array) -> tuple[Array, Array, Array, Array]:
        nats = variance = 0.0
        evaluations, finished = 0, True
        for i, part in enumerate(cascade.stages(model, x[None])):
            more = {"key": jax.random.fold_in(key, i), "config": config}
            label_of = None if label is None else label[None]
            if uniform:
                found = flow.uniform_log_weight(part.model, part.images, label_of, spacing=SPACING, **more)
            else:
                found = flow.log_weight(part.model, part.images, label_of, **more)
            nats -= found.log_weight[0]
            variance += found.probe_variance[0]
            evaluations += found.evaluations
            finished &= found.finished
        return nats, variance, evaluations, finished

    return jax.vmap(one, in_axes=(0, None if labels is None else 0, 0))(x, labels, keys)


def check_flow(config: vdm.VDMConfig, dequantisation: str) -> None:
    """Refuse a model that has no flow, or that cannot be dequantised so.

    Raises:
        InputError: an unknown dequantisation, a uniform one for images that are no gray values of 8 bits, or a model
            in discrete time.
    """
    if dequantisation not in DEQUANTISATIONS:
        raise InputError(f"dequantisation: '{dequantisation}'; {nearest(dequantisation, DEQUANTISATIONS)}")
    if dequantisation == "uniform" and not config.integers:
        raise InputError(
            f"dequantisation: 'uniform' with architecture '{config.architecture}', whose z_0 is a latent; "
            "expected 'encoder', or a model of 8-bit gray values"
        )
    if config.timesteps:
        raise InputError(
            f"timesteps: {config.timesteps}; expected a model in continuous time (0), whose network knows every noise "
            "level that the flow goes through"
        )


def check_steps(config: vdm.VDMConfig, steps: int) -> None:
    """Raise InputError for steps below 1, or other ones than those of a model in discrete time."""
    if steps < 1 or (config.timesteps and steps != config.timesteps):
        raise InputError(f"steps: {steps}; expected {config.timesteps or 'at least 1'}")


@partial(jax.jit, static_argnames=("graph",))
def _chain(
    params: vdm.Params, x: Array, labels: Array | None, key: Array, steps: Array, *, graph: nnx.GraphDef
) -> tuple[Array, ...]:
    parts = cascade.stages(vdm.merge(graph, params), x)
    return tuple(
        importance.chain_log_weight(part.model, part.images, labels, key=jax.random.fold_in(key, i), steps=steps)
        for i, part in enumerate(parts)
    )


def chain_log_weights(
    graph: nnx.GraphDef,
    params: vdm.Params,
    x: np.ndarray | Array,
    labels: np.ndarray | Array | None,
    *,
    draws: int,
    steps: int,
    key: jax.Array,
) -> np.ndarray:
    """Draws of the log weight of each image of a batch by paths of T steps, (stages, draws, n) float64 in nats.

    See :func:`medvdm.theory.importance.chain_log_weight`. Each stage of a cascade has weights of its own: what is a
    bound for each adds up to a bound of the whole.

    Raises:
        DivergedError: a weight that is not a number.
    """
    drawn = [_chain(params, x, labels, jax.random.fold_in(key, d), steps, graph=graph) for d in range(draws)]
    weights = np.stack(jax.device_get(drawn), axis=1).astype(np.float64)
    if not np.isfinite(weights).all():
        raise DivergedError("importance: a weight is not finite; expected a model whose predicted noise is finite")
    return weights
