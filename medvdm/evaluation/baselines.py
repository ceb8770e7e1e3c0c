r"""What a trained model is held against: predictors with no network, fitted on training images in closed form.

* the **mean image**;
* **PCA-64**: the projection on 64 principal components, clipped to [0.001, 0.999] (no rate is charged);
* the **linear-Gaussian VDM**: a latent diffusion model whose every part is known, so its rate is known too.

For the last (:mod:`medvdm.theory.linear_gaussian`), k and r are chosen on validation images, first k, then r.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvdm.errors import RunError
from medvdm.evaluation.components import exact_components
from medvdm.theory.linear_gaussian import LATENTS, cross_entropy, linear_gaussian_vdm

MAX_IMAGES = 2000  #: training images that the baselines are fitted on, at most
MAX_VALIDATION_IMAGES = 64  #: validation images that k and the noise are chosen on, at most
PCA = 64
NOISES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  #: candidates for its noise, in deviations of the last component


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


def fit(train: np.ndarray, validation: np.ndarray | None) -> Baselines:
    """Fit on training images (n, H, W, C) in [0, 1]; choose the linear-Gaussian VDM on validation images.

    At most :data:`MAX_IMAGES` and :data:`MAX_VALIDATION_IMAGES` are used; the caller picks which. Without validation
    images, or with too few training images for the smallest k, there is no linear-Gaussian VDM.
    """
    train = train[:MAX_IMAGES].reshape(len(train[:MAX_IMAGES]), -1)
    # n images span n - 1 directions; the last few fit the training set and nothing else.
    mean, components, variances = exact_components(train, min(max(LATENTS), len(train) - 1))
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
