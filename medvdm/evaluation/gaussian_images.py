r"""The best Gaussian model of 8-bit images, in closed form: the yardstick of a diffusion on pixels.

The images' law is :math:`N(\mu, \Sigma)` with the mean image and, in an orthonormal basis :math:`b_i`,
:math:`\Sigma = \sum_i (v_i + \lambda)\, b_i b_i^T`. The variances :math:`v_i` are those of the training images in

* the eigenbasis of their covariance: for images of up to 2,048 dimensions;
* the discrete cosine transform, channel by channel: for images of any size.

The :math:`\lambda` on the diagonal keeps directions of which the training images know too little from looking
predictable. It, and the basis where both are possible, are chosen on validation images. One gray level is the unit.

A density has no probability of a gray value. The law of a discrete image k is the Gaussian's mass of the cube of side 1
around it, :math:`P(k) = E_u\, p(k + u)` with u uniform on :math:`[-\frac12, \frac12]^D`. Uniform dequantisation gives
an upper bound, which needs no draws:

.. math::
    -\log P(k) \le -E_u \log p(k + u)
        = \frac12 \sum_i \left[ \log 2 \pi (v_i + \lambda)
        + \frac{(b_i^T (k - \mu))^2 + 1/12}{v_i + \lambda} \right].
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvdm.errors import InputError, InputTypeError, RunError

MAX_IMAGES = 5000  #: training images that it is fitted on, at most
MAX_VALIDATION_IMAGES = 256  #: validation images that its diagonal and its basis are chosen on, at most
MAX_DIMENSIONS = 2048  #: of an image, for a full covariance: its eigenvectors take 16 MB
NOISES = 2.0 ** np.arange(-8.0, 14.5, 0.5)  #: candidates for lambda, squared gray levels
ROUNDING = 1.0 / 12.0  #: variance of u, squared gray levels
_PART = 2**22  # values that are transformed at a time, 32 MiB in float64


@dataclass(frozen=True, kw_only=True)
class GaussianImages:
    """A fitted Gaussian of images; D is the number of their dimensions. Unit: gray levels.

    Attributes:
        mean: (h, w, c) mean training image.
        basis: (D, D) orthonormal rows, the eigenvectors of the covariance; None for the discrete cosine transform.
        variances: (D,) of the training images in that basis.
        noise: the chosen lambda, squared gray levels.
        num_images: training images used.
    """

    mean: np.ndarray
    basis: np.ndarray | None
    variances: np.ndarray
    noise: float
    num_images: int

    def nats(self, levels: np.ndarray) -> np.ndarray:
        """The bound of -log P by uniform dequantisation: (n,) nats per image.

        Args:
            levels: (n, h, w, c) uint8.

        Raises:
            InputTypeError: levels that are not uint8.
            InputError: images of another shape.
        """
        _check(levels, self.mean.shape)
        total = self.variances + self.noise
        constant = float(np.log(2.0 * math.pi * total).sum() + (ROUNDING / total).sum())
        squares = [
            (_coordinates(part, self.mean, self.basis) ** 2 / total).sum(axis=1)
            for part in _parts(levels, self.variances.size)
        ]
        return 0.5 * (np.concatenate(squares) + constant)


def fit(train: Iterable[np.ndarray], validation: np.ndarray) -> GaussianImages:
    """Fit on training images, in parts as they are read; choose the diagonal and the basis on validation images.

    The caller picks which images: no more than :data:`MAX_IMAGES` and :data:`MAX_VALIDATION_IMAGES` are of use.

    Args:
        train: arrays (n, h, w, c) uint8, at least one image.
        validation: (m, h, w, c) uint8, at least one image.

    Raises:
        InputTypeError: images that are not uint8.
        InputError: no image, or images of different shapes.
    """
    if not len(validation):
        raise InputError("validation: 0 images; expected at least 1, to choose the diagonal on")
    shape = validation.shape[1:]
    _check(validation, shape)
    moments = _Moments(shape)
    for images in train:
        _check(images, shape)
        for part in _parts(images, math.prod(shape)):
            moments.add(part)
    if not moments.count:
        raise InputError("train: 0 images; expected at least 1")
    found = []
    for basis, variances in moments.bases():
        parts = _parts(validation, len(variances))
        second = sum((_coordinates(x, moments.mean, basis) ** 2).sum(axis=0) for x in parts) / len(validation)
        costs = [float((np.log(variances + r) + (second + ROUNDING) / (variances + r)).sum()) for r in NOISES]
        best = int(np.argmin(costs))
        found.append((costs[best], float(NOISES[best]), basis, variances))
    _, noise, basis, variances = min(found, key=lambda one: one[0])
    return GaussianImages(mean=moments.mean, basis=basis, variances=variances, noise=noise, num_images=moments.count)


class _Moments:
    """Means and second moments of images (h, w, c), of the pixels where there are few and of the DCT."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape, size = shape, math.prod(shape)
        self.count = 0
        self._sum = np.zeros(shape)
        self._dct_squares = np.zeros(size)
        self._products = np.zeros((size, size)) if size <= MAX_DIMENSIONS else None

    def add(self, images: np.ndarray) -> None:
        x = images - 127.5  # near 0, so that moments keep their digits
        self.count += len(x)
        self._sum += x.sum(axis=0)
        self._dct_squares += (_dct(x) ** 2).sum(axis=0)
        if self._products is not None:
            flat = x.reshape(len(x), -1)
            self._products += flat.T @ flat

    @property
    def mean(self) -> np.ndarray:
        return self._sum / self.count + 127.5

    def bases(self) -> list[tuple[np.ndarray | None, np.ndarray]]:
        """Every basis that is possible, with the variances in it."""
        from scipy.linalg import eigh

        mean = self._sum / self.count
        squares = self._dct_squares / self.count - _dct(mean[None])[0] ** 2
        found: list[tuple[np.ndarray | None, np.ndarray]] = [(None, np.maximum(squares, 0.0))]
        if self._products is not None:
            flat = mean.ravel()
            variances, vectors = eigh(self._products / self.count - np.outer(flat, flat))
            found.append((np.ascontiguousarray(vectors.T, np.float32), np.maximum(variances, 0.0)))
        return found


def _check(levels: np.ndarray, shape: tuple[int, ...]) -> None:
    if levels.dtype != np.uint8:
        raise InputTypeError(f"levels: dtype {levels.dtype}; expected uint8, gray values from 0 to 255")
    if levels.ndim != 4 or levels.shape[1:] != shape:
        raise InputError(f"levels: shape {levels.shape}; expected (n, {', '.join(map(str, shape))})")


def _parts(images: np.ndarray, size: int) -> list[np.ndarray]:
    """Images of ``size`` values each, in parts that are small in memory."""
    step = max(1, _PART // size)
    return [images[start : start + step] for start in range(0, len(images), step)]


def _coordinates(levels: np.ndarray, mean: np.ndarray, basis: np.ndarray | None) -> np.ndarray:
    """(n, D): images without their mean, in an orthonormal basis."""
    x = levels - mean
    return _dct(x) if basis is None else x.reshape(len(x), -1) @ basis.T.astype(np.float64)


def _dct(x: np.ndarray) -> np.ndarray:
    """(n, D): the orthonormal discrete cosine transform of images (n, h, w, c), channel by channel."""
    from scipy.fft import dctn

    return dctn(x, axes=(1, 2), norm="ortho").reshape(len(x), -1)


def save(fitted: GaussianImages, path: Path) -> None:
    """Write as npz."""
    given = {name: value for name, value in vars(fitted).items() if value is not None}
    with path.open("wb") as file:
        np.savez(file, **given)


def load(path: Path) -> GaussianImages:
    """Read what :func:`save` wrote; raises RunError naming the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as f:
            return GaussianImages(
                mean=f["mean"],
                basis=f["basis"] if "basis" in f.files else None,
                variances=f["variances"],
                noise=float(f["noise"]),
                num_images=int(f["num_images"]),
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as problem:
        raise RunError(f"{path}: {problem}; expected the Gaussian of a run's training images") from None
