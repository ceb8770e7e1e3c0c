r"""The objective of a schedule's interior: the variance of the diffusion loss, in the same backward pass as the bound.

The interior of :math:`\gamma(t)` leaves the expected loss of continuous time as it is, and changes its variance
(Kingma et al. 2021, appendix I.2). Write :math:`\ell_i(\gamma_i, \gamma_i')` for the loss of image i at its time
:math:`t_i`. A measure of the spread :math:`C(\ell_1, \dots, \ell_n)` then has, by the parameters :math:`\eta` of the
schedule, the gradient

.. math::
    \frac{dC}{d\eta} = \sum_i \frac{\partial C}{\partial \ell_i} \left[
        \frac{\partial \ell_i}{\partial \gamma_i} \frac{d\gamma(t_i)}{d\eta}
      + \frac{\partial \ell_i}{\partial \gamma_i'} \frac{d\gamma'(t_i)}{d\eta} \right] .

The backward pass of the bound goes through :math:`\partial \ell_i / \partial \gamma_i` and
:math:`\partial \ell_i / \partial \gamma_i'` anyway. All that is left is one more pass through the schedule alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medvdm.theory import bound
from medvdm.theory.schedules import with_slope


def second_moment(losses: Float[Array, " n"]) -> Float[Array, ""]:
    r"""The mean of :math:`\ell_i^2`, for independent times: the variance but for a constant. Unit: nats^2."""
    return jnp.mean(losses**2)


def within_strata(losses: Float[Array, " n"], u: Float[Array, " n"]) -> Float[Array, ""]:
    r"""The variance of :math:`\ell` at its time, for stratified times; nats^2.

    .. math:: \frac{1}{2(n - 1)} \sum_i (\ell_{i+1} - \ell_i)^2

    over the pairs of neighbours in time. Stratified times already average over the times, so what is left of the
    variance of the batch's mean is that of the noise and the images at given times. Neighbours differ by these and
    by a step of 1/n in time, which counts 1/n^2 here. One loss alone has no neighbour: its square stands in.
    """
    n = losses.shape[0]
    if n == 1:
        return second_moment(losses)
    neighbours = jnp.roll(u, -1) > u  # all but the pair that the offset's `mod 1` tore apart
    return 0.5 * jnp.sum(jnp.where(neighbours, (jnp.roll(losses, -1) - losses) ** 2, 0.0)) / (n - 1)


def gradient(
    schedule: Callable[[Any], Callable[[Float[Array, " n"]], Float[Array, " n"]]],
    params: Any,
    u: Float[Array, " n"],
    losses: Float[Array, " n"],
    by: bound.Probe,
    *,
    stratified: bool,
) -> Any:
    r"""The gradient of the spread with respect to the parameters of a schedule; nats^2 per unit of each parameter.

    Args:
        schedule: builds :math:`\gamma` from ``params``.
        params: the schedule's parameters :math:`\eta`.
        u: the times.
        losses: :math:`\ell_i` at these times, nats.
        by: :math:`\partial \ell_i / \partial \gamma_i` and :math:`\partial \ell_i / \partial \gamma_i'`, one per image.
        stratified: which measure of spread: :func:`within_strata`, or :func:`second_moment`.
    """
    spread = (lambda v: within_strata(v, u)) if stratified else second_moment
    weight = jax.grad(spread)(losses)
    _, pull = jax.vjp(lambda p: with_slope(schedule(p), u), params)
    return pull((weight * by.gamma, weight * by.slope))[0]
