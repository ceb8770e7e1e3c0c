"""The likelihood of given images under a run by the probability flow, and importance-weighted bounds of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.nnx as nnx
import numpy as np
from jaxtyping import Array

from medvdm.evaluation import flow as flow_
from medvdm.models import vdm
from medvdm.runs.bound import PerImage, by_batches
from medvdm.runs.run import Run
from medvdm.theory.bound import bits_per_dim
from medvdm.theory.flow import FlowConfig
from medvdm.theory.importance import bound_of

DEFAULTS = FlowConfig()


@dataclass(frozen=True, kw_only=True)
class FlowLikelihood(PerImage):
    """-log p(x) of n images by the probability flow, one value per image, in nats unless said otherwise.

    Attributes:
        nats: (n,) mean over the draws: an upper bound of -log p(x), whose slack is that of the dequantisation, up to
            ``stderr``.
        stderr: (n,) its standard error over the draws of z_0, which have probes of their own: it holds both.
        probe_stderr: (n,) the part of it that more probes would mend; 0 where the divergence is exact, NaN for one
            probe.
        evaluations: (n,) of the network, mean over the draws; of a cascade, of all its networks.
        draws: of z_0 per image.
        image_shape: (height, width, channels).
    """

    probe_stderr: np.ndarray
    evaluations: np.ndarray


def flow_likelihood(
    run: Run,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    draws: int = 4,
    dequantisation: str = "encoder",
    divergence: str = DEFAULTS.divergence,
    probes: int = DEFAULTS.probes,
    rtol: float = DEFAULTS.rtol,
    atol: float = DEFAULTS.atol,
    max_steps: int = DEFAULTS.max_steps,
    batch_size: int = 32,
    seed: int = 0,
) -> FlowLikelihood:
    r"""-log p(x) of given images by the probability flow, each with its standard errors.

    .. math:: E_{q(z_0|x)}\left[-\log p(x | z_0) - \log p(z_0) + \log q(z_0 | x)\right]

    with :math:`\log p(z_0)` exact up to the tolerance, and to the probes of the divergence. Of a cascade it is the sum
    over the stages. The law is that of a sampler along the flow, which is not quite that of the ancestral chain whose
    probability the bound is about: of the two numbers, either may be the lower one.

    Args:
        run: from :func:`load`; a model in continuous time.
        images, labels: as :func:`bound` takes them.
        draws: of z_0 per image; at least 2, for a standard error.
        dequantisation: 'encoder', the formula above, or 'uniform' for a model of 8-bit gray values: u uniform on the
            cell of each gray value, see :func:`medvdm.theory.flow.uniform_log_weight`.
        divergence, probes, rtol, atol, max_steps: see :class:`medvdm.theory.flow.FlowConfig`.
        batch_size: images at a time.
        seed: of the draws.

    Raises:
        InputError: as :func:`bound`; settings that cannot be used; a model in discrete time, or uniform dequantisation
            of one with a latent.
        InputTypeError, RunError: as :func:`bound`.
        DivergedError: an integration that does not come to its end in ``max_steps``.
    """
    config = FlowConfig(divergence=divergence, probes=probes, rtol=rtol, atol=atol, max_steps=max_steps)
    flow_.check_flow(run.config.model, dequantisation)
    more = {"draws": draws, "config": config, "uniform": dequantisation == "uniform"}

    def each(params: vdm.Params, _: np.ndarray, x: Array, hot: Array | None, key: Array, *, graph: nnx.GraphDef) -> Any:
        return flow_.flow_draws(graph, params, x, hot, key=key, **more)

    found = by_batches(run, images, labels, each, draws=draws, batch_size=batch_size, seed=seed)
    return FlowLikelihood(
        nats=found.nats.mean(axis=0),
        stderr=found.nats.std(axis=0, ddof=1) / math.sqrt(draws),
        probe_stderr=np.sqrt(found.probe_variance.sum(axis=0)) / draws,
        evaluations=found.evaluations.mean(axis=0),
        draws=draws,
        image_shape=run.config.model.image_shape,
    )


@dataclass(frozen=True, kw_only=True)
class ImportanceBound:
    """Importance-weighted bounds of n images, in nats unless said otherwise.

    Attributes:
        log_weights: (stages, draws, n) of paths drawn from the forward process; one stage for a model that is no
            cascade.
        steps: of a path.
        image_shape: (height, width, channels).
    """

    log_weights: np.ndarray
    steps: int
    image_shape: tuple[int, int, int]

    def nats(self, k: int = 1) -> np.ndarray:
        """(n,) the bound of -log p(x) by K draws at a time, mean over the groups of K; see :meth:`stderr`.

        Raises:
            InputError: a K below 1, or more than the draws.
        """
        return sum(bound_of(stage, k)[0] for stage in self.log_weights)

    def stderr(self, k: int = 1) -> np.ndarray:
        """(n,) the standard error of :meth:`nats`; NaN where all draws make one group."""
        return np.sqrt(sum(bound_of(stage, k)[1] ** 2 for stage in self.log_weights))

    def bits_per_dim(self, k: int = 1) -> np.ndarray:
        """(n,) :meth:`nats` in bits per pixel and channel."""
        return bits_per_dim(self.nats(k), self.image_shape)

    def bits_per_dim_stderr(self, k: int = 1) -> np.ndarray:
        """(n,) :meth:`stderr` in bits per pixel and channel."""
        return bits_per_dim(self.stderr(k), self.image_shape)


def importance_bound(
    run: Run,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    draws: int = 32,
    steps: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> ImportanceBound:
    r"""Importance-weighted bounds of given images, for any number K of draws at a time.

    .. math:: -\log p(x) \le E\left[-\log \frac1K \sum_k w_k\right]

    with weights of whole paths of T steps (:mod:`medvdm.theory.importance`). The law is that of ancestral sampling with
    T steps; for K = 1 it is the bound with T steps, which lies above that in continuous time.

    Args:
        run: from :func:`load`.
        images, labels: as :func:`bound` takes them.
        draws: of a path per image, each of which costs ``steps`` evaluations of the network; at least 2.
        steps: T; None for the T of a model in discrete time, or 250.
        batch_size: images at a time.
        seed: of the draws.

    Raises:
        InputError: as :func:`bound`; steps below 1, or other ones than those of a model in discrete time.
        InputTypeError, RunError: as :func:`bound`.
        DivergedError: a weight that is not finite.
    """
    steps = (run.config.model.timesteps or 250) if steps is None else steps
    flow_.check_steps(run.config.model, steps)

    def each(params: vdm.Params, _: np.ndarray, x: Array, hot: Array | None, key: Array, *, graph: nnx.GraphDef) -> Any:
        return flow_.chain_log_weights(graph, params, x, hot, draws=draws, steps=steps, key=key)

    weights = by_batches(run, images, labels, each, draws=draws, batch_size=batch_size, seed=seed)
    return ImportanceBound(log_weights=weights, steps=steps, image_shape=run.config.model.image_shape)
