r"""Low dose: noise that grows with the signal, made the same everywhere.

A detector counts photons. With the gain g in gray values per photon, and electronic noise of deviation s,

.. math:: y = g \cdot \mathrm{Poisson}(x / g) + N(0, s^2), \qquad \mathrm{Var}[y \mid x] = g x + s^2 .

The generalised Anscombe transform (Starck, Murtagh & Bijaoui 1998) makes the variance about 1 for all x:

.. math:: f(y) = \frac{2}{g} \sqrt{\max\left(g y + \tfrac38 g^2 + s^2,\ 0\right)} .

What removes normal noise can then be used. Its answer D is about :math:`E[f(y) \mid x]`, which is not f(x), so the
algebraic inverse has a bias, large at low counts. The exact unbiased inverse solves :math:`E[f(y) \mid x] = D` for x.
Its closed form (Mäkitalo & Foi, *Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian
noise*, IEEE Transactions on Image Processing 22, 2013) is

.. math::
    x \approx g \left(\tfrac14 D^2 + \tfrac14 \sqrt{\tfrac32} D^{-1} - \tfrac{11}{8} D^{-2}
        + \tfrac58 \sqrt{\tfrac32} D^{-3} - \tfrac18 - \frac{s^2}{g^2}\right),

where an estimate D below f(0) counts as f(0).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def stabilised(y: Float[np.ndarray, "*shape"], gain: float, deviation: float) -> Float[np.ndarray, "*shape"]:
    """f(y), with noise of deviation 1.

    Args:
        y: gray values in proportion to the counts.
        gain: g, above 0.
        deviation: s, of the electronic noise, in gray values.
    """
    return 2.0 / gain * np.sqrt(np.maximum(gain * y + 0.375 * gain**2 + deviation**2, 0.0))


def unstabilised(d: Float[np.ndarray, "*shape"], gain: float, deviation: float) -> Float[np.ndarray, "*shape"]:
    """x from D, an estimate of E[f(y) | x], by the closed form; at least 0. Arguments as of :func:`stabilised`."""
    least = 2.0 * math.sqrt(0.375 + (deviation / gain) ** 2)  # f(0), which E[f(y) | x = 0] does not exceed
    d = np.maximum(d, least)
    root = math.sqrt(1.5)
    count = d**2 / 4 + root / 4 / d - 11 / 8 / d**2 + 5 * root / 8 / d**3 - 1 / 8 - (deviation / gain) ** 2
    return gain * np.maximum(count, 0.0)
