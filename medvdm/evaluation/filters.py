r"""Classical filters against noise: the yardsticks beside a model that denoises.

Each is a function of an image (h, w) on [0, 1], out of which noise may have led, the deviation S of its noise, and one
strength, whose grid is in :data:`FILTERS`. Which strength is best depends on the images: it is chosen on others than
those it is measured on. Lengths are in pixels, gray values in units of S, so one grid serves every noise.

* ``gaussian``, ``median``: means and medians of neighbours.
* ``perona-malik``: diffusion that stops at edges (:func:`perona_malik`).
* ``bilateral``: means of neighbours that are alike (Tomasi and Manduchi, 1998).
* ``total variation``: the image near y with the least sum of gradients (Rudin, Osher and Fatemi, 1992; Chambolle,
  2004).
* ``wavelet``: coefficients shrunk by BayesShrink (Chang, Yu and Vetterli, 2000), the mean over shifts (Coifman and
  Donoho, 1995). Needs PyWavelets.
* ``non-local means``: means of pixels whose surroundings are alike (Buades, Coll and Morel, 2005).
* ``bm3d``: groups of like patches shrunk together (Dabov, Foi, Katkovnik and Egiazarian, 2007; the program is that of
  Mäkinen, Azzari and Foi, 2020). Its licence is for non-commercial use only, so it is no dependency: it is used where
  its user has installed it (``pip install bm3d``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medvdm.errors import InputError, MissingPackageError

_STEP = 0.2  #: of the time of :func:`perona_malik`; above 0.25 the scheme is not stable
_EDGE = 2.0  #: kappa of :func:`perona_malik`, in units of S
_SPATIAL = 2.0  #: pixels, deviation of the bilateral filter's window
_PATCH, _DISTANCE = 7, 8  #: pixels: side of a patch of non-local means, and how far away others are looked for
_SHIFTS = 4  #: of the wavelets on each axis, by one pixel each


def gaussian(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """A Gaussian of this deviation in pixels."""
    return ndimage.gaussian_filter(image, strength)


def median(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """The median of a square of this many pixels on a side."""
    return ndimage.median_filter(image, int(strength))


def perona_malik(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    r"""Diffusion that stops at edges, until time ``strength``.

    .. math::
        \partial_t u = \nabla \cdot \big(g(|\nabla u|) \nabla u\big), \qquad u(0) = y, \qquad
        g(s) = e^{-(s / \kappa)^2}, \qquad \kappa = 2 S.

    Where g is 1, this is the heat equation, whose solution at time t is a Gaussian blur of variance 2 t. By explicit
    steps of 0.2, with the differences to the four neighbours for gradients, and no flow through the border. Each step
    is a mean of a pixel and its neighbours with weights above 0, so that nothing grows, as long as a step is at most
    1/4.

    Source: Perona and Malik, "Scale-space and edge detection using anisotropic diffusion" (1990).
    """
    u = np.array(image, np.float64)
    kappa = _EDGE * noise
    steps = max(1, round(strength / _STEP))
    for _ in range(steps):
        flow = np.zeros_like(u)
        for axis in (0, 1):
            slope = np.diff(u, axis=axis)
            through = np.exp(-((slope / kappa) ** 2)) * slope
            ends = [(1, 1) if axis == i else (0, 0) for i in (0, 1)]  # nothing flows through the border
            flow += np.diff(np.pad(through, ends), axis=axis)
        u += strength / steps * flow
    return u


def bilateral(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """Gray values count as alike within ``strength`` deviations of the noise; a window of deviation 2 pixels.

    Where all are alike it is a Gaussian, which that of scikit-image 0.26 is not: hence the sum of 13 x 13 shifts here.
    """
    far = round(3 * _SPATIAL)
    padded = np.pad(image, far, mode="symmetric")
    total, weights = np.zeros_like(image), np.zeros_like(image)
    for down in range(-far, far + 1):
        for across in range(-far, far + 1):
            other = np.roll(padded, (down, across), (0, 1))[far:-far, far:-far]
            distance = (down**2 + across**2) / _SPATIAL**2
            weight = np.exp(-0.5 * (distance + ((other - image) / (strength * noise)) ** 2))
            total += weight * other
            weights += weight
    return total / weights


def total_variation(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """The weight of the gradients is ``strength`` deviations of the noise."""
    from skimage.restoration import denoise_tv_chambolle

    return denoise_tv_chambolle(image, weight=strength * noise, eps=1e-5, max_num_iter=400)


def wavelet(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """Soft thresholds as of noise ``strength`` times as strong, the mean over 16 shifts.

    Raises:
        MissingPackageError: PyWavelets is not installed.
    """
    from skimage.restoration import denoise_wavelet

    _require("wavelet", "pywt", "PyWavelets")
    levels = max(1, int(np.log2(min(image.shape) / 8)))  # the coarsest has 8 coefficients a side
    settings = {"wavelet": "sym4", "wavelet_levels": levels, "method": "BayesShrink", "rescale_sigma": False}
    shifts = [(i, j) for i in range(_SHIFTS) for j in range(_SHIFTS)]
    total = np.zeros_like(image)
    for shift in shifts:
        moved = np.roll(image, shift, (0, 1))
        total += np.roll(denoise_wavelet(moved, sigma=strength * noise, **settings), np.negative(shift), (0, 1))
    return total / len(shifts)


def non_local_means(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """Patches of 7 x 7 count as alike within ``strength`` deviations of the noise, which their own distance is less.

    All pixels of a patch count the same (``fast_mode``): a window over the patch is slower and no better on X-rays.
    """
    from skimage.restoration import denoise_nl_means

    window = {"patch_size": _PATCH, "patch_distance": _DISTANCE, "fast_mode": True}
    return denoise_nl_means(image, h=strength * noise, sigma=noise, **window)


def bm3d(image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """BM3D, both its stages, told that the noise is ``strength`` times as strong.

    Raises:
        MissingPackageError: bm3d is not installed.
    """
    _require("bm3d", "bm3d", "bm3d")
    import bm3d as package

    return package.bm3d(image, sigma_psd=strength * noise)


@dataclass(frozen=True)
class Filter:
    """A filter, and the strengths to choose from, rising."""

    of: Callable[[np.ndarray, float, float], np.ndarray]
    strengths: tuple[float, ...]

    def __call__(self, image: np.ndarray, noise: float, strength: float) -> np.ndarray:
        """The image (h, w) without noise of this deviation, in [0, 1] and float64.

        Raises:
            InputError: an image that is not (h, w) and finite; noise or a strength that is not above 0.
            MissingPackageError: a package that the filter needs is not installed.
        """
        image = np.asarray(image, np.float64)
        if image.ndim != 2 or 0 in image.shape or not np.isfinite(image).all():
            raise InputError(f"image: shape {image.shape}; expected a finite one (h, w)")
        for name, value in (("noise", noise), ("strength", strength)):
            if not 0 < value < np.inf:
                raise InputError(f"{name}: {value:g}; expected a number above 0")
        return np.clip(self.of(image, noise, strength), 0.0, 1.0)


FILTERS = {
    "gaussian": Filter(gaussian, (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)),
    "median": Filter(median, (3, 5, 7, 9, 11, 13)),
    "perona-malik": Filter(perona_malik, (0.8, 1.2, 1.7, 2.4, 3.4, 4.8, 6.8, 9.6)),
    "bilateral": Filter(bilateral, (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)),
    "total variation": Filter(total_variation, (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)),
    "wavelet": Filter(wavelet, (0.85, 0.92, 1.0, 1.08, 1.16, 1.25)),
    "non-local means": Filter(non_local_means, (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.15)),
    "bm3d": Filter(bm3d, (0.85, 1.0, 1.15, 1.3)),
}


def _require(name: str, module: str, package: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise MissingPackageError(f"{name}: the package {package} is not installed; pip install {package}") from None
