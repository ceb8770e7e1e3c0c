r"""How much a model trained with noise can tell of one patient: the epsilon and delta of differential privacy.

A training is (epsilon, delta) private if for every two sets of n patients that differ in one person, and for every set
A of models that could come out of it,

.. math:: P(\text{model} \in A \mid D) \le e^\epsilon\, P(\text{model} \in A \mid D') + \delta .

Each step (:mod:`medvdm.training.private`) draws m of the n patients without replacement, clips the gradient of each to
a norm C and publishes the sum with Gaussian noise of deviation z C, z being the *noise multiplier*. One person in the
place of another moves the sum by at most 2C, not C; so without the draw a step would be two Gaussians whose means lie
:math:`\mu = 2 / z` deviations apart, with the profile (Balle & Wang, 2018)

.. math:: \delta_G(\epsilon) = \Phi(\mu/2 - \epsilon/\mu) - e^\epsilon\, \Phi(-\mu/2 - \epsilon/\mu) .

The person is in the batch with probability q = m/n only, which makes it (Balle, Barthe & Gaboardi, 2018)

.. math::
    \delta_q(\epsilon) = q\, \delta_G\!\left(\log\left(1 + (e^\epsilon - 1)/q\right)\right), \quad \epsilon \ge 0,
    \qquad \delta_q(-\epsilon) = 1 - e^{-\epsilon} + e^{-\epsilon} \delta_q(\epsilon).

This profile belongs to a pair of distributions that no pair of neighbours exceeds (Zhu, Dong & Wang, 2022), so k steps
are no worse than k independent copies of that pair. Google's ``dp_accounting`` turns the profile into a distribution
of privacy losses, rounded to the safe side (Doroshenko et al., 2022), and convolves k of them. Its own bound for this
sampling, by Renyi divergences (Wang, Balle & Kasiviswanathan, 2019), is far looser: with z = 2, 64 of 2,000 patients,
2,000 steps and delta = 2.3e-4 it says epsilon = 18.1, this one 10.3.

.. warning:: ``dp_accounting`` counts noise in different units: its Renyi accountant by the distance of neighbours
    (z/2 here), its accountant of loss distributions by the clipping norm (z). The tests hold both against this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from medvdm.errors import InputError, MissingPackageError

_POINTS = 20_000  #: steps of the grid of privacy losses, on each side of 0, at most
_FINEST = 1e-4  #: nats between two of its points, at least


def epsilon(*, noise: float, batch: int, patients: int, steps: int, delta: float) -> float:
    """The epsilon of a training at a given delta, for one patient in the place of another; nats, an upper bound.

    Args:
        noise: noise multiplier z, the deviation of the noise on the sum over the clipping norm; 0 is no privacy.
        batch: patients per step, drawn without replacement.
        patients: how many there are to draw from; this number counts as known to everybody.
        steps: how many steps are taken.
        delta: the chance that the promise is broken; well below one over the number of patients.

    Returns:
        epsilon, or infinity without noise.

    Raises:
        InputError: a number out of range.
        MissingPackageError: dp-accounting is not installed.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"noise: {noise}; expected a finite number, 0 or more")
    if not 1 <= batch <= patients:
        raise InputError(f"batch: {batch}; expected from 1 to {patients}, the number of patients")
    if steps < 1:
        raise InputError(f"steps: {steps}; expected at least 1")
    if not 1e-12 <= delta < 1:
        raise InputError(f"delta: {delta}; expected from 1e-12 to less than 1")
    require()
    if noise == 0:
        return math.inf
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    mu, q = 2.0 / noise, batch / patients
    # Of the larger losses there is less than 1e-18 in a step.
    largest = float(np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + mu * mu / 2 + 9 * mu))
    gap = max(_FINEST, largest / _POINTS)
    most = math.ceil(largest / gap)
    deltas = np.clip(profile(gap * np.arange(-most, most + 1), mu=mu, q=q), 0.0, 1.0)
    losses = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(gap, -most, most, deltas)
    composed = privacy_loss_distribution.PrivacyLossDistribution(losses).self_compose(steps)
    return float(composed.get_epsilon_for_delta(delta))


def profile(epsilon: np.ndarray, *, mu: float, q: float) -> np.ndarray:
    r"""The least delta of one step at each epsilon, :math:`\delta_q(\epsilon)` of the module's docstring.

    Args:
        epsilon: any finite numbers.
        mu: distance of the two means in deviations of the noise.
        q: the chance to be in the batch.
    """
    from scipy.special import log_ndtr, ndtr

    x = np.abs(epsilon)
    unsampled = x + np.log1p(-(1 - q) * np.exp(-x)) - math.log(q)  # log(1 + (e^x - 1) / q), also where e^x overflows
    tail = np.exp(unsampled + log_ndtr(-mu / 2 - unsampled / mu))
    positive = q * np.maximum(ndtr(mu / 2 - unsampled / mu) - tail, 0.0)
    return np.where(epsilon < 0, -np.expm1(-x) + np.exp(-x) * positive, positive)


def noise_for(target: float, *, batch: int, patients: int, steps: int, delta: float) -> float:
    """The noise multiplier that brings epsilon down to ``target``: the setting ``dp_noise``, to one part in a thousand.

    >>> round(noise_for(8.0, batch=64, patients=2_000, steps=1_000, delta=1e-4), 2)
    1.88

    Args:
        target: the epsilon that is asked for.
        batch, patients, steps, delta: as of :func:`epsilon`.

    Raises:
        InputError, MissingPackageError: as of :func:`epsilon`, or a target that no noise from 0.1 to 10,000 gives.
    """
    from scipy.optimize import brentq

    least, most = math.log(0.1), math.log(1e4)

    def above(log_noise: float) -> float:
        return epsilon(noise=math.exp(log_noise), batch=batch, patients=patients, steps=steps, delta=delta) - target

    low, high = above(most), above(least)
    if not low < 0 < high:
        raise InputError(
            f"target: {target}; expected an epsilon between {low + target:.3g} and {high + target:.3g}, which the "
            "noise multipliers 10,000 and 0.1 give"
        )
    return math.exp(brentq(above, least, most, xtol=5e-4) + 5e-4)  # at the side of more noise


def usual_delta(patients: int) -> float:
    r"""The delta that a run reports: :math:`n^{-1.1}`, a little below one patient in n."""
    return patients**-1.1


def sentence(record: Mapping[str, Any]) -> str:
    """A run's promise in words, from its ``privacy`` record: what :func:`epsilon` was given, and what it gave."""
    return (
        f"differential privacy of each {record['unit']}: epsilon {record['epsilon']:.3g} at delta "
        f"{record['delta']:.2g}, for one of {record['patients']:,} in the place of another, after {record['steps']:,} "
        f"steps of {record['batch']:,} drawn without replacement, gradients clipped to {record['clip']:g} and noise of "
        f"{record['noise']:g} times that; for the weights alone, not for losses, baselines and other files of the run"
    )


def require() -> None:
    """Raise MissingPackageError unless dp-accounting is installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "dp_noise: the package dp-accounting is not installed; pip install 'medvdm[privacy]'"
        ) from None
