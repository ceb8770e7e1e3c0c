r"""What a trained model is held against: predictors with no network, fitted on training images in closed form.

* the **mean image**;
* **PCA-64**: the projection on 64 principal components, clipped to [0.001, 0.999] (no rate is charged);
* the **linear-Gaussian VDM**: a latent diffusion model whose every part is known, so its rate is known too.

The linear-Gaussian VDM. Let U (k x P) hold k principal components and :math:`\lambda_k` their variances. The encoding
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
is a one-dimensional Gaussian integral a pixel, done by Gauss-Hermite quadrature. k and r are chosen on validation
images, first k, then r. :func:`rate_distortion` chooses r for every k, and so draws the whole trade between the two.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medvdm.errors import InputError, RunError

MAX_IMAGES = 2000  #: training images that the baselines are fitted on, at most
MAX_VALIDATION_IMAGES = 64  #: validation images that k and the noise are chosen on, at most
PCA = 64
LATENTS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  #: candidates for the linear-Gaussian VDM's k
NOISES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  #: candidates for its noise, in deviations of the last component
CLIP = 1e-3
LEVELS = (0.2, 0.28, 0.4, 0.55, 0.75, 1.0, 1.4)  #: candidates for r where k is given; the best is near sqrt(p (1 - p))
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(3)  # 5 or 7 nodes change the total by 1e-5 bits
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """The fitted baselines. ``k`` is the number of components kept, P the number of pixels.

    Attributes:
        mean: (P,) mean training image.
        components: (k, P) principal components, rows of unit length, by falling variance.
        variances: (k,) variance along each.
        latent: the chosen k of the linear-Gaussian VDM; 0 where none could be chosen.
        noise: its chosen noise r, in gray levels times the root of the number of pixels.
        num_images: training images used.
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    latent: int
    noise: float
    num_images: int

    def mean_image(self, x: np.ndarray) -> np.ndarray:
        """Cross-entropy of the mean image, nats per image, (n,)."""
        x = x.reshape(len(x), -1)
        return cross_entropy(x, np.broadcast_to(self.mean, x.shape))

    def pca(self, x: np.ndarray, k: int = PCA) -> np.ndarray | None:
        """Cross-entropy of the projection on k components, nats per image, (n,); None with fewer than k."""
        if k > len(self.components):
            return None
        x = x.reshape(len(x), -1)
        basis = self.components[:k]
        return cross_entropy(x, self.mean + (x - self.mean) @ basis.T @ basis)

    def linear_gaussian(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Reconstruction and rate of the chosen linear-Gaussian VDM, nats per image, (n,) each; None without one."""
        if not self.latent:
            return None
        return linear_gaussian_vdm(
            x.reshape(len(x), -1),
            self.mean,
            self.components[: self.latent],
            self.variances[: self.latent],
            self.noise,
        )

    def sample(self, num: int, seed: int = 0) -> np.ndarray | None:
        """Images drawn from the chosen linear-Gaussian VDM, (num, P) in [0, 1]; None without one.

        z_0 has the law N(0, Lambda + r^2), which is where the exact reverse process ends; the image is the decoder's
        mean, clipped.
        """
        if not self.latent:
            return None
        total = self.variances[: self.latent] + self.noise**2
        z = np.random.default_rng(seed).standard_normal((num, self.latent)) * np.sqrt(total)
        decoded = self.mean + (self.variances[: self.latent] / total * z) @ self.components[: self.latent]
        return np.clip(decoded, 0.0, 1.0).astype(np.float32)


def cross_entropy(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Bernoulli cross-entropy of gray targets, nats per image; p is clipped to [0.001, 0.999]."""
    p = np.clip(p, CLIP, 1 - CLIP)
    log_q = np.log1p(-p)
    return -np.sum(log_q + x * (np.log(p) - log_q), axis=-1, dtype=np.float64)


def principal_components(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (P,), components (k, P) and variances (k,) of the rows of x (n, P); n may be far below P.

    From the n x n Gram matrix, whose eigenvectors give the components: n^2 P operations instead of n P^2. Components
    of (numerically) no variance are left out, so fewer than k may come back.
    """
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = x - mean
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    order = np.argsort(values)[::-1][:k]
    values, vectors = values[order], vectors[:, order]
    useful = values > 1e-6 * max(values[0], 1e-30) if len(values) else np.zeros(0, bool)
    values, vectors = values[useful], vectors[:, useful]
    components = (vectors / np.sqrt(values)).T.astype(np.float32) @ centred
    return mean, components, (values / max(len(x) - 1, 1)).astype(np.float32)


def linear_gaussian_vdm(
    x: np.ndarray, mean: np.ndarray, components: np.ndarray, variances: np.ndarray, noise: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruction and rate in nats per image, (n,) each, for images x (n, P); formulas in the module's head.

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
            raise InputError(f"{name}: {images.shape[1]} pixels an image; expected {len(mean)}, as the mean has")
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


def fit(train: np.ndarray, validation: np.ndarray | None) -> Baselines:
    """Fit on training images (n, H, W, C) in [0, 1]; choose the linear-Gaussian VDM on validation images.

    At most :data:`MAX_IMAGES` and :data:`MAX_VALIDATION_IMAGES` are used; the caller picks which. Without validation
    images, or with too few training images for the smallest k, there is no linear-Gaussian VDM.
    """
    train = train[:MAX_IMAGES].reshape(len(train[:MAX_IMAGES]), -1)
    # n images span n - 1 directions; the last few fit the training set and nothing else.
    mean, components, variances = principal_components(train, min(max(LATENTS), len(train) - 1))
    latent, noise = 0, 0.0
    sizes = [k for k in LATENTS if k <= len(components)]
    if validation is not None and len(validation) and sizes:
        validation = validation[:MAX_VALIDATION_IMAGES].reshape(len(validation[:MAX_VALIDATION_IMAGES]), -1)

        def total(k: int, relative_noise: float) -> float:
            r = relative_noise * float(np.sqrt(variances[k - 1]))
            terms = linear_gaussian_vdm(validation, mean, components[:k], variances[:k], r)
            return float(sum(term.mean() for term in terms))

        latent = min(sizes, key=lambda k: total(k, 0.7))
        noise = min(NOISES, key=lambda r: total(latent, r)) * float(np.sqrt(variances[latent - 1]))
    kept = max(latent, min(PCA, len(components)))
    return Baselines(
        mean=mean,
        components=components[:kept],
        variances=variances[:kept],
        latent=latent,
        noise=noise,
        num_images=len(train),
    )


def save(baselines: Baselines, path: Path) -> None:
    """Write as npz."""
    with path.open("wb") as file:
        np.savez(file, **vars(baselines))


def load(path: Path) -> Baselines:
    """Read what :func:`save` wrote; raises RunError naming the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as f:
            return Baselines(
                mean=f["mean"],
                components=f["components"],
                variances=f["variances"],
                latent=int(f["latent"]),
                noise=float(f["noise"]),
                num_images=int(f["num_images"]),
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as problem:
        raise RunError(f"{path}: {problem}; expected the baselines of a run") from None
