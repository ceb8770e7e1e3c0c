"""An encoder that tells patients apart: linear discriminants of small images, fitted on training patients.

A patient is a class. Copies of each image that are changed as another visit would change them (shift, contrast, noise)
join the class, so that it can be fitted where nobody has two images. Packhaeuser et al. (2022) train a deep network for
this on 112,120 X-rays; a linear one is what a few hundred images bear, and what it misses proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

COMPONENTS = 100  #: of the images, before the discriminants
DISCRIMINANTS = 50
CHANGED = 4  #: changed copies of each image


def another_visit(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (n, h, w) in [0, 1] shifted by a few per cent of the side, with another contrast and a little noise."""
    from scipy.ndimage import shift

    images, side = np.asarray(images, np.float32), max(images.shape[1:])
    moved = np.stack([shift(one, rng.normal(0, 0.03, 2) * side, order=1, mode="nearest") for one in images])
    moved = np.clip(moved, 0, 1) ** np.exp(rng.normal(0, 0.2, (len(images), 1, 1)))
    return np.clip(moved + rng.normal(0, 0.01, images.shape), 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Encoder:
    """Maps small images (n, h, w) to (n, k); the cosine of two says how alike they are."""

    pipeline: Any

    @classmethod
    def fit(cls, images: np.ndarray, patients: np.ndarray, *, seed: int = 0) -> Self:
        """Fit on images (n, h, w) of training patients, at least two of them."""
        from sklearn.decomposition import PCA
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        from sklearn.pipeline import make_pipeline

        rng = np.random.default_rng(seed)
        every = np.concatenate([images, *(another_visit(images, rng) for _ in range(CHANGED))])
        rows, classes = _standardised(every), np.tile(patients, 1 + CHANGED)
        people = len(set(classes.tolist()))
        k = min(COMPONENTS, rows.shape[1], len(images) - 1)
        pipeline = make_pipeline(
            PCA(k, random_state=seed),
            LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1, n_components=min(DISCRIMINANTS, people - 1, k)),
        )
        return cls(pipeline.fit(rows, classes))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.pipeline.transform(_standardised(images))


def _standardised(images: np.ndarray) -> np.ndarray:
    """Each image with mean 0 and deviation 1: exposure is no part of a person."""
    rows = images.reshape(len(images), -1).astype(np.float64)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(rows.std(axis=1, keepdims=True), 1e-6)
