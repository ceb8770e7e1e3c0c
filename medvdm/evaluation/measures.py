r"""Measures of one set of images, each of which says one thing about it.

* :func:`ms_ssim`: likeness of pairs. Its mean over pairs *within* a set (:func:`pair_similarity`) falls as the set
  becomes more varied.
* :func:`power_spectrum`: how much of an image's variance sits at each scale; what a blur removes.
* :func:`gray_distance`: distance between two histograms of gray values.

Everything is numpy and scipy on the processor; images are (n, h, w, c) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medvdm.errors import InputError
from medvdm.evaluation.statistics import clustered_stderr

#: Weights of the scales, finest first (Wang, Simoncelli and Bovik, 2003).
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11  #: side of SSIM's Gaussian window, whose deviation is 1.5 pixels
PAIRS = 512  #: pairs that :func:`pair_similarity` looks at


# --- Likeness -----------------------------------------------------------------------------------------------------


def num_scales(height: int, width: int) -> int:
    """How many of the five scales of MS-SSIM an image has room for: the coarsest must hold one window of 11 pixels."""
    return sum(min(height, width) >> j >= WINDOW for j in range(len(SCALES)))


def ms_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    r"""Multi-scale structural similarity of pairs of images, (n,); 1 for equal images.

    With M scales, each half as large as the one before (2x2 means), and weights :math:`w_j` that sum to 1,

    .. math:: \text{MS-SSIM} = l_M^{\,w_M} \prod_{j=1}^{M} cs_j^{\,w_j},

    where cs is the mean of (2 cov + C_2) / (var_a + var_b + C_2) over the image, and l, at the coarsest scale only, the
    mean of the luminance term multiplied into it, as in single-scale SSIM. Negative means count as 0. Images with no
    room for five scales use fewer, with the weights scaled to sum to 1: **compare values at one image size only**.

    Raises:
        InputError: shapes that differ, or images smaller than 11 pixels a side.

    Source: Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment" (2003).
    """
    a, b = as_finite_images(a, "a"), as_finite_images(b, "b")
    if a.shape != b.shape:
        raise InputError(f"b: shape {b.shape}; expected that of a, {a.shape}")
    scales = num_scales(*a.shape[1:3])
    if not scales:
        raise InputError(f"a: images of {a.shape[1]}x{a.shape[2]} pixels; expected at least {WINDOW}x{WINDOW}")
    weights = np.array(SCALES[:scales]) / sum(SCALES[:scales])
    total = np.ones(len(a))
    for j, weight in enumerate(weights):
        structure, ssim = ssim_terms(a, b)
        total *= np.maximum(ssim if j == scales - 1 else structure, 0.0) ** weight
        a, b = _halve(a), _halve(b)
    return total


def ssim_terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over each image of cs and of l cs, (n,) each; data range 1."""
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    axes = (1, 2, 3)
    return structure.mean(axes, dtype=np.float64), (luminance * structure).mean(axes, dtype=np.float64)


def _blur(x: np.ndarray) -> np.ndarray:
    """Weighted means under SSIM's window, where it fits entirely."""
    from scipy.ndimage import correlate1d

    half = WINDOW // 2
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / 1.5) ** 2)
    weights /= weights.sum()
    x = correlate1d(x, weights, axis=1)[:, half:-half]
    return correlate1d(x, weights, axis=2)[:, :, half:-half]


def _halve(x: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels; an odd last row or column is dropped."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def pair_similarity(
    images: np.ndarray, groups: Sequence[str] | np.ndarray | None = None, *, pairs: int = PAIRS, seed: int = 0
) -> tuple[float, float]:
    r"""Mean MS-SSIM over random pairs within a set, and its standard error. High: the images are alike.

    Pairs join images of different ``groups`` (patients), so that two visits of one patient do not count as alikeness.
    A mean over pairs of N images has about N, not N^2 / 2, independent parts: with :math:`h_i` the mean over the pairs
    that image i is in, the error is twice that of the mean of the :math:`h_i` (the first term of a U-statistic's
    variance; a few pairs an image make it too large rather than too small), clustered by group. NaN with fewer than
    three groups.

    Raises:
        InputError: fewer than two groups, or images too small (:func:`ms_ssim`).
    """
    images = as_finite_images(images, "images")
    n = len(images)
    groups = np.arange(n) if groups is None else np.asarray(groups)
    if len(set(groups.tolist())) < 2:
        raise InputError(f"images: {n} of one patient; expected at least two patients")
    order = np.random.default_rng(seed).permutation(n)
    turns = min(-(-pairs // n), n // 2)  # in turn s, each image meets the one s places on: all take part equally
    turn, place = np.divmod(np.arange(turns * n), n)
    first, second = order[place], order[(place + turn + 1) % n]
    once = (2 * (turn + 1) < n) | (2 * place < n)  # at half a circle, the second half meets whom it has met
    kept = once & (groups[first] != groups[second])
    first, second = first[kept], second[kept]
    size = max(1, 2**22 // images[0].size)
    parts = [ms_ssim(images[first[i : i + size]], images[second[i : i + size]]) for i in range(0, len(first), size)]
    values = np.concatenate(parts)
    sums = np.bincount(first, values, n) + np.bincount(second, values, n)
    count = np.bincount(first, minlength=n) + np.bincount(second, minlength=n)
    means, met = sums[count > 0] / count[count > 0], groups[count > 0]
    error = 2 * clustered_stderr(means, met) if len(set(met.tolist())) > 2 else math.nan
    return float(values.mean()), error


# --- Scales and gray values ---------------------------------------------------------------------------------------


def power_spectrum(images: np.ndarray) -> np.ndarray:
    r"""Radially averaged power of each image at k = 1, 2, ..., K cycles per side: (n, K), K half the shorter side.

    .. math:: P(k) = \frac{1}{|R_k|} \sum_{f \in R_k} \frac{|\hat y(f)|^2}{\sum_p w_p^2}, \qquad y = w\,(x - \bar x_w)

    with a Hann window w (an X-ray's opposite edges do not match, and without it that step would pass for fine detail),
    :math:`\bar x_w` the mean under w, and :math:`R_k` the frequencies whose length is nearest to k. The unit is that of
    a variance: **white noise of variance s^2 has P(k) = s^2 at every k**. Channels are averaged.
    """
    images = as_finite_images(images, "images")
    height, width = images.shape[1:3]
    side = min(height, width)
    if side < 4:
        raise InputError(f"images: {height}x{width} pixels; expected at least 4x4")
    window = (np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]).astype(np.float32)[..., None]
    centred = images - np.sum(window * images, axis=(1, 2), keepdims=True) / window.sum()
    power = np.abs(np.fft.fft2(window * centred, axes=(1, 2))) ** 2 / np.sum(window**2)
    power = power.mean(axis=-1).reshape(len(images), -1)
    rows, columns = np.fft.fftfreq(height)[:, None] * side, np.fft.fftfreq(width) * side
    radius = np.rint(np.hypot(rows, columns)).astype(int).ravel()
    wanted = (radius >= 1) & (radius <= side // 2)
    ring = radius[wanted] - 1
    sums = np.stack([np.bincount(ring, one, side // 2) for one in power[:, wanted]])
    return sums / np.bincount(ring, minlength=side // 2)


def gray_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of the gray values of two sets, in gray levels of [0, 1]: how far the average pixel of one
    set would have to be moved for its histogram to become the other's. It knows nothing of where the pixels are.

    Gray values are rounded to 2^-16 first, so that the memory is that of two histograms. Two sets of one law are the
    further apart the smaller they are: compare distances of sets of one size only.
    """
    from scipy.stats import wasserstein_distance

    steps = 2**16
    (u, u_counts), (v, v_counts) = (np.unique(np.rint(x * steps).astype(np.int32), return_counts=True) for x in (a, b))
    return float(wasserstein_distance(u, v, u_counts, v_counts)) / steps


def bands(num: int) -> tuple[slice, slice, slice]:
    """Coarse, middle and fine scales of a power spectrum of ``num`` entries, as slices of it.

    From 2 cycles per side (1 is the window's own) to ``num``, cut into three of about equal width in log k.
    """
    first, second = (round(2 * (num / 2) ** (part / 3)) for part in (1, 2))
    return slice(1, first), slice(first, second), slice(second, num)


def as_finite_images(x: np.ndarray, name: str) -> np.ndarray:
    """Images as float32 (n, h, w, c), finite and none of the sizes 0; raises InputError."""
    x = np.asarray(x, np.float32)
    if x.ndim != 4 or 0 in x.shape or not np.isfinite(x).all():
        raise InputError(f"{name}: shape {x.shape}; expected finite images (n, h, w, c), none of the sizes 0")
    return x
