r"""How near restored images are to the truth, per image: gray values, structure, and edges.

* :func:`psnr` and :func:`ssim`: gray values, and their local pattern.
* :func:`gradient_correlation`: whether the image rises and falls where the truth does.
* :func:`edge_displacement`: how far edges have moved, in pixels. A blur lowers an edge and need not move it; noise
  moves it without lowering it.

Gradients are those of the image under a Gaussian with a deviation of one pixel. Images are (n, h, w, c) in [0, 1].
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medvdm.errors import InputError
from medvdm.evaluation.measures import WINDOW, as_finite_images, ssim_terms

SIGMA = 1.0  #: pixels, of the Gaussian whose derivatives are the gradient
REACH = 3.0  #: pixels to either side of an edge in which it is looked for
SHARE = 0.1  #: of the pixels, those with the steepest gradient, may hold an edge
_LEAST = 0.05  #: of the steepness of the truth's edge: a flatter one is lost
_SPACING = 0.5  #: pixels between the samples of a profile
_PLACES = np.arange(-REACH - _SPACING, REACH + 1.5 * _SPACING, _SPACING)  #: of the samples, one beyond either end


def psnr(restored: np.ndarray, truth: np.ndarray) -> np.ndarray:
    r"""Peak signal-to-noise ratio in decibels, (n,): :math:`-10 \log_{10}` of the mean squared error.

    Infinite for equal images.

    Raises:
        InputError: images that are not finite, or shapes that differ.
    """
    restored, truth = _pair(restored, truth)
    error = np.mean((restored.astype(np.float64) - truth) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(error)


def ssim(restored: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity, (n,); 1 for equal images.

    Gaussian window of 11 pixels with deviation 1.5, no sample covariance, data range 1: Wang, Bovik, Sheikh and
    Simoncelli, "Image quality assessment: from error visibility to structural similarity" (2004).

    Raises:
        InputError: as :func:`psnr`; also images of fewer than 11 pixels a side.
    """
    restored, truth = _pair(restored, truth)
    if min(truth.shape[1:3]) < WINDOW:
        raise InputError(
            f"truth: images of {truth.shape[1]}x{truth.shape[2]} pixels; expected at least {WINDOW}x{WINDOW}"
        )
    return ssim_terms(restored, truth)[1]


def gradient_correlation(restored: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the two gradients over all pixels and both components, (n,); 1 for equal images.

    It does not change where a restored image has more or less contrast as a whole. An image that is constant where the
    truth is not has 0.

    Raises:
        InputError: as :func:`psnr`; also a truth that is constant.
    """
    restored, truth = _pair(restored, truth)
    a, b = (np.stack(_gradient(x)).reshape(2, len(x), -1).swapaxes(0, 1).reshape(len(x), -1) for x in (restored, truth))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    if not norms[1].all():
        raise InputError(f"truth: image {int(np.argmin(norms[1]))} is constant; expected one with a gradient")
    return np.sum(a * b, axis=1) / np.where(norms[0] > 0, norms[0], 1.0) / norms[1]


def edge_displacement(restored: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    r"""Root mean square distance between the edges of the truth and those of restored images, in pixels, (n,).

    A *profile* at a pixel is the derivative along the truth's gradient there, :math:`n \cdot \nabla x(p + s n)`, for s
    from -3 to 3 pixels. Its highest peak is an edge, and the parabola through the peak and its neighbours gives the
    place between samples. A pixel of the truth holds an edge if its gradient is among the steepest tenth, and the peak
    of its profile lies within half a pixel of it. Its displacement is the distance from there to the peak of the
    restored image's profile at the same pixel, along the same n: only what crosses an edge is seen, not what slides
    along it. Where that profile has no peak a twentieth as high as the truth's, the edge is lost: 3 pixels.

    Args:
        restored, truth: (n, h, w, c).
        mask: (n, h, w) bool: only edges at these pixels count, and the steepest tenth is taken of them; all if None.

    Returns:
        0 for equal images; NaN where the truth has no edge.

    Raises:
        InputError: as :func:`psnr`; also a mask of another shape, or with other values than true and false.
    """
    restored, truth = _pair(restored, truth)
    mask = np.ones(truth.shape[:3], bool) if mask is None else np.asarray(mask)
    if mask.shape != truth.shape[:3] or mask.dtype != bool:
        raise InputError(f"mask: {mask.dtype} of shape {mask.shape}; expected bool of shape {truth.shape[:3]}")
    squares = [
        np.concatenate([_displacements(a[..., c], b[..., c], where) ** 2 for c in range(truth.shape[3])])
        for a, b, where in zip(restored, truth, mask, strict=True)
    ]
    return np.array([np.sqrt(s.mean()) if s.size else np.nan for s in squares])


def _displacements(restored: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One number in [0, 3] for each edge of an image (h, w)."""
    slopes = _gradient(truth)
    steepness = np.hypot(*slopes)
    border = int(np.ceil(_PLACES[-1]))
    inside = np.zeros_like(mask)
    inside[border:-border, border:-border] = True
    if not mask.any():
        return np.empty(0)
    steep = mask & inside & (steepness >= np.quantile(steepness[mask], 1.0 - SHARE)) & (steepness > 0)
    rows, columns = np.nonzero(steep)
    pixels = np.stack([rows, columns])
    normals = np.stack([s[rows, columns] for s in slopes]) / steepness[rows, columns]
    true = _peaks(_profiles(slopes, pixels, normals), 0.0)
    found = _peaks(_profiles(_gradient(restored), pixels, normals), _LEAST * steepness[rows, columns])
    moved = np.where(np.isnan(found), REACH, np.minimum(np.abs(found - true), REACH))
    return moved[np.abs(true) <= _SPACING]  # where true is NaN, this is false


def _profiles(slopes: tuple[np.ndarray, np.ndarray], pixels: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """The derivative along the normals (2, k), at places on them through the pixels (2, k): (k, places)."""
    at = pixels[..., None] + _PLACES * normals[..., None]
    along = [
        ndimage.map_coordinates(s, at, order=3, mode="mirror") * n[:, None]
        for s, n in zip(slopes, normals, strict=True)
    ]
    return along[0] + along[1]


def _peaks(profiles: np.ndarray, least: np.ndarray | float) -> np.ndarray:
    """Where the highest local maximum of each profile is, in pixels; NaN where none is above ``least``."""
    left, middle, right = profiles[:, :-2], profiles[:, 1:-1], profiles[:, 2:]
    height = np.where((middle >= left) & (middle >= right), middle, -np.inf)
    k = height.argmax(axis=1)
    rows = np.arange(len(profiles))
    a, b, c = left[rows, k], middle[rows, k], right[rows, k]
    bend = np.maximum(2 * b - a - c, np.finfo(float).tiny)
    place = _PLACES[1:-1][k] + _SPACING * np.clip((c - a) / (2 * bend), -0.5, 0.5)
    return np.where(height.max(axis=1) > least, place, np.nan)


def _gradient(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Down and across, of images (h, w) or (n, h, w, c), in float64."""
    first = 0 if x.ndim == 2 else 1
    x = x.astype(np.float64)
    down, across = (
        ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(x, SIGMA, axis=i, order=1), SIGMA, axis=j)
        for i, j in ((first, first + 1), (first + 1, first))
    )
    return down, across


def _pair(restored: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    restored, truth = as_finite_images(restored, "restored"), as_finite_images(truth, "truth")
    if restored.shape != truth.shape:
        raise InputError(f"restored: shape {restored.shape}; expected that of the truth, {truth.shape}")
    return restored, truth
