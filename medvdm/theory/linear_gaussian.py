r"""The linear-Gaussian VDM: a latent diffusion model known in closed form in every part, its rate included.

Let U (k x P) hold k principal components and :math:`\lambda_k` their variances. The encoding
is the score :math:`f = U (x - \mu)`, whose law is taken to be :math:`N(0, \Lambda)`; one scalar gamma noises all of
it, :math:`z_0 / \alpha_0 = f + r \epsilon` with :math:`r = \sigma_0 / \alpha_0 = e^{\gamma_0 / 2}`. The exact denoiser
of a Gaussian is linear, and with it every later step of the reverse process equals the forward one, so in continuous
time (and with z_1's law as the prior) prior and diffusion loss add up to

.. math::
    R(x) = KL(q(z_0 | x) \,\|\, p(z_0)) = \tfrac12 \sum_k
        \left( \frac{f_k^2 + r^2}{\lambda_k + r^2} - 1 + \log \frac{\lambda_k + r^2}{r^2} \right).

The same r for every component is close to what reverse water-filling asks for; :func:`water_filling` gives exactly
that, a noise for each component. The decoder is the posterior mean,
:math:`\mu + U^T \frac{\lambda}{\lambda + r^2} (f + r \epsilon)`, and the expected cross-entropy over :math:`\epsilon`
is a one-dimensional Gaussian integral per pixel, done by Gauss-Hermite quadrature. :func:`rate_distortion` chooses r
for every k, and so draws the whole trade between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medvdm.errors import InputError

LATENTS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  #: candidates for the linear-Gaussian VDM's k
CLIP = 1e-3
LEVELS = (0.2, 0.28, 0.4, 0.55, 0.75, 1.0, 1.4)  #: candidates for r where k is given; the best is near sqrt(p (1 - p))
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(3)  # 5 or 7 nodes change the total by 1e-5 bits
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def cross_entropy(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Bernoulli cross-entropy of gray targets, nats per image; p is clipped to [0.001, 0.999]."""
    p = np.clip(p, CLIP, 1 - CLIP)
    log_q = np.log1p(-p)
    return -np.sum(log_q + x * (np.log(p) - log_q), axis=-1, dtype=np.float64)


def linear_gaussian_vdm(
    x: np.ndarray, mean: np.ndarray, components: np.ndarray, variances: np.ndarray, noise: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Reconstruction and rate in nats per image, (n,) each, for images x (n, P).

    With :math:`f = U (x - \mu)`, the rate is :math:`\tfrac12 \sum_k ( (f_k^2 + r^2) / (\lambda_k + r^2) - 1 +
    \log ((\lambda_k + r^2) / r^2) )`. The reconstruction is the expected cross-entropy of the posterior mean
    :math:`\mu + U^T \frac{\lambda}{\lambda + r^2} (f + r \epsilon)`.

    ``noise`` is r, one for all components or one for each, (k,). With k = 0 it is the mean image, at no rate.
    """
    f, variances = (x - mean) @ components.T, _floating(variances)
    noise = np.broadcast_to(np.asarray(noise, variances.dtype), variances.shape)
    total = variances + noise**2
    rate = 0.5 * np.sum((f**2 + noise**2) / total - 1.0 + np.log(total / noise**2), axis=-1, dtype=np.float64)
    shrink = variances / total
    centre = mean + (shrink * f) @ components
    spread = np.sqrt((shrink * noise) ** 2 @ components**2)  # deviation of each pixel
    nodes = zip(_NODES, _WEIGHTS, strict=True)
    reconstruction = sum(w * cross_entropy(x, centre + np.float32(node) * spread) for node, w in nodes)
    return reconstruction, rate


def _floating(numbers: np.ndarray) -> np.ndarray:
    """As floats, so that a noise in the same type is not cut to an integer."""
    numbers = np.asarray(numbers)
    return numbers if np.issubdtype(numbers.dtype, np.floating) else numbers.astype(np.float64)


def water_filling(variances: np.ndarray, level: float) -> np.ndarray:
    r"""The noise of each component that reverse water-filling asks for, (m,), for the m components above the level.

    A Gaussian component of variance :math:`\lambda` seen through noise r is known up to an error of
    :math:`D = \lambda r^2 / (\lambda + r^2)`. Of all ways to spend a rate, the least sum of errors has the same D, the
    level, for every component that is sent, and sends those with :math:`\lambda > D`: :math:`1/r^2 = 1/D - 1/\lambda`.
    The result goes into :func:`linear_gaussian_vdm` with the first m components.

    Args:
        variances: (k,) positive and falling, as :func:`principal_components` gives them.
        level: D, in the unit of the variances (gray levels squared times pixels).

    Raises:
        InputError: a level that is not positive and finite, or variances that are not positive and falling.

    Source: Cover and Thomas, Elements of Information Theory, section 10.3.3.
    """
    variances = _floating(variances)
    if not (np.isfinite(level) and level > 0):
        raise InputError(f"level: {level}; expected a positive number")
    if variances.ndim != 1 or not (np.all(variances > 0) and np.all(np.diff(variances) <= 0)):
        raise InputError("variances: expected one axis of positive, falling numbers")
    sent = variances[variances > level].astype(np.float64)
    return (1.0 / np.sqrt(1.0 / level - 1.0 / sent)).astype(variances.dtype)


class Trade(NamedTuple):
    """One linear-Gaussian VDM, a point of the rate-distortion plane (its means over the images)."""

    latent: int  #: k
    noise: float  #: r, in gray levels times the root of the number of pixels
    reconstruction: np.ndarray  #: (n,) nats per image
    rate: np.ndarray  #: (n,) nats per image


def rate_distortion(
    validation: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    components: np.ndarray,
    variances: np.ndarray,
    *,
    latents: Sequence[int] = LATENTS,
    noises: Sequence[float] = LEVELS,
) -> list[Trade]:
    """For every k the linear-Gaussian VDM with the noise that is best on validation images, evaluated on ``x``.

    Best is the least total, reconstruction + rate. A k above the number of components is left out.

    Args:
        validation, x: images (n, H, W, C) or (n, P) in [0, 1], to choose the noise on and to evaluate.
        mean, components, variances: from :func:`principal_components` of the training images.
        latents: the candidates for k, each at least 1.
        noises: the candidates for r, in gray levels times the root of the number of pixels.

    Raises:
        InputError: no validation image, images of another size than the mean, or candidates that cannot be used.
    """
    if not len(validation):
        raise InputError("validation: 0 images; expected at least 1, to choose the noise on")
    validation, x = (images.reshape(len(images), math.prod(images.shape[1:])) for images in (validation, x))
    for name, images in (("validation", validation), ("x", x)):
        if images.shape[1] != len(mean):
            raise InputError(f"{name}: {images.shape[1]} pixels per image; expected {len(mean)}, as the mean has")
    if not latents or min(latents) < 1:
        raise InputError(f"latents: {tuple(latents)}; expected numbers of components, each at least 1")
    if not noises or not all(math.isfinite(r) and r > 0 for r in noises):
        raise InputError(f"noises: {tuple(noises)}; expected positive numbers")
    trades = []
    for k in (k for k in latents if k <= len(components)):
        parts = components[:k], variances[:k]
        totals = [sum(t.mean() for t in linear_gaussian_vdm(validation, mean, *parts, r)) for r in noises]
        noise = float(noises[int(np.argmin(totals))])
        trades.append(Trade(k, noise, *linear_gaussian_vdm(x, mean, *parts, noise)))
    return trades
