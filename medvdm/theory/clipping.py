r"""Noise at the ends of a gray scale: what a file holds of it, and what the truth was.

A file holds no value below black or above white, so of noise of deviation s it holds y = clip(x + s eps, 0, 1), whose
mean is not x near the ends: black becomes dark gray, white light gray. With a = -x / s, b = (1 - x) / s and the normal
law's density and distribution function,

.. math:: E[y \mid x] = 1 - \Phi(b) + x\, (\Phi(b) - \Phi(a)) + s\, (\varphi(a) - \varphi(b)) .

What removes normal noise finds about that mean. It rises with x, so there is a way back (Foi, *Clipped noisy images:
heteroskedastic modeling and practical denoising*, Signal Processing 89, 2009).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

_STEPS = 4096  #: of the table that is inverted


def clipped_mean(x: Float[np.ndarray, "*shape"], deviation: float) -> Float[np.ndarray, "*shape"]:
    """E[y | x] for x in [0, 1] and noise of this deviation, above 0."""

    def density(a: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * a * a) / np.sqrt(2.0 * np.pi)

    a, b = -x / deviation, (1.0 - x) / deviation
    return 1.0 - ndtr(b) + x * (ndtr(b) - ndtr(a)) + deviation * (density(a) - density(b))


def unclipped(d: Float[np.ndarray, "*shape"], deviation: float) -> Float[np.ndarray, "*shape"]:
    """x from d, an estimate of E[y | x]; beyond the means of black and of white, these."""
    x = np.linspace(0.0, 1.0, _STEPS + 1)
    return np.interp(d, clipped_mean(x, deviation), x)
