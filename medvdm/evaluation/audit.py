"""Audit samples: each number says one thing about a set of images held against another; none says "good".

Every number here needs the same number for *real* images beside it, since none has a scale of its own. The feature
spaces are named, and simple on purpose: pixels, principal components of the run's training images, radial power
spectra. None of them is a network's, so nothing here is an FID.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from medvdm.errors import InputError
from medvdm.evaluation.measures import as_finite_images, bands, gray_distance, pair_similarity, power_spectrum
from medvdm.evaluation.statistics import FOLDS, two_sample

# --- Features and classifiers -------------------------------------------------------------------------------------


def pca_features(
    images: np.ndarray, mean: np.ndarray, components: np.ndarray, variances: np.ndarray, k: int = 64
) -> np.ndarray:
    """Scores on the first k principal components in their deviations, then the squares of those: (n, 2 k).

    With the squares, a linear classifier sees a spread that is wrong as well as a mean.
    """
    scores = (np.asarray(images).reshape(len(images), -1) - mean) @ components[:k].T / np.sqrt(variances[:k])
    return np.concatenate([scores, scores**2], axis=1)


def spectrum_features(images: np.ndarray) -> np.ndarray:
    """Logarithm of :func:`power_spectrum`, (n, K): what an image has at each scale, whatever it shows."""
    return np.log(power_spectrum(images) + 1e-12)


# --- Copies -------------------------------------------------------------------------------------------------------


def nearest(
    features: np.ndarray,
    reference: np.ndarray | Iterable[np.ndarray],
    groups: Sequence[str] | np.ndarray | None = None,
    reference_groups: Sequence[str] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and position of, the reference nearest to each row: (n,) float64 and (n,) int.

    The distance is the root mean squared difference over the row's entries; for pixels, in gray levels.

    Args:
        features: (n, ...) rows of any shape, such as images.
        reference: (m, ...) the training set in the same space, or its parts one after the other.
        groups, reference_groups: where given, a row is never matched with one of its own group (patient).

    Raises:
        InputError: rows of different sizes, or a row with nothing to be matched with.
    """
    rows = np.asarray(features, np.float64).reshape(len(features), -1)
    best, where = np.full(len(rows), np.inf), np.full(len(rows), -1)
    offset = 0
    for part in [reference] if isinstance(reference, np.ndarray) else reference:
        other = np.asarray(part, np.float64).reshape(len(part), -1)
        if other.shape[1] != rows.shape[1]:
            raise InputError(f"reference: {other.shape[1]} entries per row; expected {rows.shape[1]}")
        squared = np.sum(rows**2, axis=1)[:, None] + np.sum(other**2, axis=1) - 2 * rows @ other.T
        if groups is not None and reference_groups is not None:
            ours, theirs = (np.array([str(g) for g in names]) for names in (groups, reference_groups))
            squared[ours[:, None] == theirs[offset : offset + len(other)]] = np.inf
        found = squared.argmin(axis=1)
        exact = np.mean((rows - other[found]) ** 2, axis=1)  # the difference of large numbers above is only nearly that
        exact[np.isinf(squared[np.arange(len(rows)), found])] = np.inf
        where = np.where(exact < best, offset + found, where)
        best = np.minimum(best, exact)
        offset += len(other)
    if (where < 0).any():
        raise InputError("reference: no image of another patient; expected at least one for each row")
    return np.sqrt(best), where


# --- All of it ----------------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """Principal components of training images, the linear feature space of an audit.

    Attributes:
        mean: (P,) mean image.
        components: (k, P) unit rows.
        variances: (k,) variance along each.
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray


def audit_set(
    images: np.ndarray,
    real: np.ndarray,
    train: np.ndarray,
    space: Space,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    real_groups: Sequence[str] | np.ndarray | None = None,
    train_groups: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All audits of a set of images against real held-out ones.

    For the yardstick, give real images of yet other patients as ``images``: not training images, for the components
    of ``space`` were fitted on them, and a classifier can tell (the scores of training images vary more than others').

    Args:
        images: the set to audit, such as samples.
        real: held-out images.
        train: the training images, for the nearest of each.
        space: principal components of training images; up to 64 are used.
        groups, real_groups, train_groups: the patients of each set; every image its own if None.
        seed: of the pairs and folds.

    Returns:
        ``num_images``; ``ms_ssim`` and its ``ms_ssim_stderr``; ``power_low``, ``power_middle``, ``power_high``, the
        power in the scales from 2 cycles per side to the finest, cut into three equal parts of the logarithm of k, over
        that of ``real``; ``gray_distance`` from ``real``; ``c2st_coarse`` (8 components),
        ``c2st_pca`` (up to 64) and ``c2st_spectrum``, with ``..._stderr``: the AUC of :func:`two_sample` against
        ``real``; ``nearest_pixel`` and ``nearest_pca``, medians over the images of the distance to the
        nearest training image, and ``nearest_pixel_least``, the smallest. The unit of distances is a gray level of
        [0, 1]: in the space of the components, the root mean square over *pixels* of the projected difference.

    Raises:
        InputError: images smaller than 11 pixels a side, or a set of fewer than four patients.
    """
    images, real, train = (
        as_finite_images(images, "images"),
        as_finite_images(real, "real"),
        as_finite_images(train, "train"),
    )
    k, sets = min(64, len(space.components)), ((images, groups), (real, real_groups))
    out: dict[str, Any] = {"num_images": len(images)}
    out["ms_ssim"], out["ms_ssim_stderr"] = pair_similarity(images, groups, seed=seed)
    powers, real_powers = power_spectrum(images), power_spectrum(real)
    for name, band in zip(("low", "middle", "high"), bands(powers.shape[1]), strict=True):
        out[f"power_{name}"] = float(powers[:, band].mean() / real_powers[:, band].mean())
    out["gray_distance"] = gray_distance(images, real)
    spaces = {
        "coarse": lambda x: pca_features(x, *space, k=8),
        "pca": lambda x: pca_features(x, *space),
        "spectrum": spectrum_features,
    }
    patients = [len(x) if g is None else len(set(np.asarray(g).tolist())) for x, g in sets]
    if min(patients) < 4:
        raise InputError(f"images and real: {patients[0]} and {patients[1]} patients; expected at least 4 of each")
    folds = min(FOLDS, *(p // 2 for p in patients))  # an error needs two patients a fold
    for name, features in spaces.items():
        found = two_sample(features(images), features(real), groups, real_groups, folds=folds, seed=seed)
        out[f"c2st_{name}"], out[f"c2st_{name}_stderr"] = found
    pixel, _ = nearest(images, train, groups, train_groups)
    project = lambda x: (x.reshape(len(x), -1) - space.mean) @ space.components[:k].T  # noqa: E731
    linear, _ = nearest(project(images), project(train), groups, train_groups)
    out["nearest_pixel"], out["nearest_pixel_least"] = float(np.median(pixel)), float(pixel.min())
    out["nearest_pca"] = float(np.median(linear)) * math.sqrt(k / images[0].size)
    return out
