"""Audit samples: each number says one thing about a set of images held against another; none says "good".

Every number here needs the same number for *real* images beside it, since none has a scale of its own. The feature
spaces are named, and simple on purpose: pixels, principal components of the run's training images, radial power
spectra. None of them is a network's, so nothing here is an FID.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


class Closest:
    """The reference row closest to each of a set of rows, found while the reference goes by in parts.

    The distance is the root mean squared difference over the row's entries; for pixels, in gray levels.

    Args:
        features: (n, ...) rows of any shape, such as images.
        groups: where given, a row is never matched with a reference of its own group (patient).
    """

    def __init__(self, features: np.ndarray, groups: Sequence[str] | np.ndarray | None = None):
        self._rows = np.asarray(features, np.float32).reshape(len(features), -1)
        self._groups = None if groups is None else _texts(groups)
        self.distance = np.full(len(self._rows), np.inf)  #: (n,) to the closest so far; infinite before the first
        self.where = np.full(len(self._rows), -1)  #: (n,) its position in the reference; -1 before the first
        self.seen = 0  #: reference rows looked at

    def look(self, part: np.ndarray, groups: Sequence[str] | np.ndarray | None = None) -> None:
        """Compare with the next rows (m, ...) of the reference, and their groups.

        Raises:
            InputError: rows of another size.
        """
        from sklearn.metrics.pairwise import euclidean_distances

        other = np.asarray(part, np.float32).reshape(len(part), -1)
        if other.shape[1] != self._rows.shape[1]:
            raise InputError(f"reference: {other.shape[1]} entries per row; expected {self._rows.shape[1]}")
        squared = euclidean_distances(self._rows, other, squared=True)  # in float64, a block at a time
        if self._groups is not None and groups is not None:
            squared[self._groups[:, None] == _texts(groups)] = np.inf
        found = squared.argmin(axis=1)
        for i, j in enumerate(found):  # a difference of large numbers is only nearly 0 for equal rows: once more
            exact = math.sqrt(np.mean(np.square(self._rows[i] - other[j]), dtype=np.float64))
            if math.isfinite(squared[i, j]) and exact < self.distance[i]:
                self.distance[i], self.where[i] = exact, self.seen + j
        self.seen += len(other)


def nearest(
    features: np.ndarray,
    reference: np.ndarray | Iterable[np.ndarray],
    groups: Sequence[str] | np.ndarray | None = None,
    reference_groups: Sequence[str] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and position of, the reference nearest to each row: (n,) float64 and (n,) int, see :class:`Closest`.

    Args:
        features: (n, ...) rows of any shape, such as images.
        reference: (m, ...) the training set in the same space, or its parts one after the other.
        groups, reference_groups: where given, a row is never matched with one of its own group (patient).

    Raises:
        InputError: rows of different sizes, or a row with nothing to be matched with.
    """
    closest = Closest(features, groups)
    for part in [reference] if isinstance(reference, np.ndarray) else reference:
        start = closest.seen
        closest.look(part, None if reference_groups is None else reference_groups[start : start + len(part)])
    _check_matched(closest.distance)
    return closest.distance, closest.where


def _texts(groups: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.array([str(g) for g in groups])  # one set's names may be numbers and the other's text


def _check_matched(distance: np.ndarray) -> None:
    if not np.isfinite(distance).all():
        raise InputError("reference: no image of another patient; expected at least one for each row")


# --- All of it ----------------------------------------------------------------------------------------------------


PCA = 64  #: components of the linear feature space, at most
LEAST_PATIENTS = 4  #: of a set: two folds of two patients
LEAST_IMAGES = 10  #: of a set; with fewer, none of the numbers means much


class Set(NamedTuple):
    """Images with their patients.

    Attributes:
        images: (n, h, w, c) in [0, 1].
        groups: n names of patients; every image is a patient of its own if None.
    """

    images: np.ndarray
    groups: Sequence[str] | np.ndarray | None = None


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


class Distances(NamedTuple):
    """Distance of each image of a set to its nearest training image.

    Attributes:
        pixel: (n,) in the space of pixels, in gray levels.
        pca: (n,) in the space of the components; the root mean square over *pixels* of the projected difference.
    """

    pixel: np.ndarray
    pca: np.ndarray

    def summary(self) -> dict[str, float]:
        """``nearest_pixel`` and ``nearest_pca``, the medians, and ``nearest_pixel_least``, the smallest.

        Raises:
            InputError: an image that was compared with none of another patient.
        """
        _check_matched(self.pixel)
        median = {name: float(np.median(values)) for name, values in self._asdict().items()}
        return {
            "nearest_pixel": median["pixel"],
            "nearest_pixel_least": float(self.pixel.min()),
            "nearest_pca": median["pca"],
        }


def distances(sets: Mapping[str, Set], train: Iterable[Set], space: Space) -> dict[str, Distances]:
    """Distances of several sets to the nearest training images, which are looked at once, in parts.

    Args:
        sets: images and patients by name; see :class:`Set`.
        train: the training images and their patients, part by part. One part is held in memory.
        space: principal components of training images; up to 64 are used.
    """
    k = min(PCA, len(space.components))
    project = lambda x: (x.reshape(len(x), -1) - space.mean) @ space.components[:k].T  # noqa: E731
    pixel = {name: Closest(one.images, one.groups) for name, one in sets.items()}
    pca = {name: Closest(project(one.images), one.groups) for name, one in sets.items()}
    for part in train:
        images = as_finite_images(part.images, "train")
        projected = project(images)
        for name in sets:
            pixel[name].look(images, part.groups)
            pca[name].look(projected, part.groups)
    scale = math.sqrt(k / space.mean.size)
    return {name: Distances(pixel[name].distance, scale * pca[name].distance) for name in sets}


def draw(images: int, n: int, seed: int = 0) -> np.ndarray:
    """Positions of n of a number of images, drawn without replacement, in rising order.

    Raises:
        InputError: n is below 1 or more than there are.
    """
    if not 1 <= n <= images:
        raise InputError(f"n: {n}; expected 1 to {images}, the number of images")
    return np.sort(np.random.default_rng(seed).permutation(images)[:n])


def compare_set(images: Set, real: Set, space: Space, *, seed: int = 0) -> dict[str, Any]:
    """All audits of a set of images against as many real held-out ones, but for the nearest training images.

    Several of the numbers depend on how many images there are: the distance of two histograms of one law falls with
    the number, a classifier finds more with more images. So both sets are of one size, and numbers of two calls can be
    compared where their ``num_images`` are the same; :func:`draw` makes sets smaller.

    Args:
        images: the set to audit, such as samples.
        real: as many held-out images.
        space: principal components of training images; up to 64 are used.
        seed: of the pairs and folds.

    Returns:
        ``num_images``; ``ms_ssim`` and its ``ms_ssim_stderr``; ``power_low``, ``power_middle``, ``power_high``, the
        power in the scales from 2 cycles per side to the finest, cut into three equal parts of the logarithm of k, over
        that of ``real``; ``gray_distance`` from ``real``; ``c2st_coarse`` (8 components),
        ``c2st_pca`` (up to 64) and ``c2st_spectrum``, with ``..._stderr``: the AUC of :func:`two_sample` against
        ``real``.

    Raises:
        InputError: images smaller than 11 pixels a side, sets of different sizes, or of fewer than four patients.
    """
    (x, groups), (y, real_groups) = images, real
    x, y = as_finite_images(x, "images"), as_finite_images(y, "real")
    if len(x) != len(y):
        raise InputError(f"images and real: {len(x)} and {len(y)} images; expected as many of each")
    patients = [len(s.images) if s.groups is None else len(set(np.asarray(s.groups).tolist())) for s in (images, real)]
    if min(patients) < LEAST_PATIENTS:
        found = " and ".join(map(str, patients))
        raise InputError(f"images and real: {found} patients; expected at least {LEAST_PATIENTS} of each")
    out: dict[str, Any] = {"num_images": len(x)}
    out["ms_ssim"], out["ms_ssim_stderr"] = pair_similarity(x, groups, seed=seed)
    powers, real_powers = power_spectrum(x), power_spectrum(y)
    for name, band in zip(("low", "middle", "high"), bands(powers.shape[1]), strict=True):
        out[f"power_{name}"] = float(powers[:, band].mean() / real_powers[:, band].mean())
    out["gray_distance"] = gray_distance(x, y)
    spaces = {
        "coarse": lambda x: pca_features(x, *space, k=8),
        "pca": lambda x: pca_features(x, *space, k=PCA),
        "spectrum": spectrum_features,
    }
    folds = min(FOLDS, *(p // 2 for p in patients))  # an error needs two patients a fold
    for name, features in spaces.items():
        found = two_sample(features(x), features(y), groups, real_groups, folds=folds, seed=seed)
        out[f"c2st_{name}"], out[f"c2st_{name}_stderr"] = found
    return out


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
    """All audits of a set of images against as many real held-out ones.

    For the yardstick, give real images of yet other patients as ``images``: not training images, for the components
    of ``space`` were fitted on them, and a classifier can tell (the scores of training images vary more than others').

    Args:
        images: the set to audit, such as samples.
        real: as many held-out images.
        train: the training images, for the nearest of each.
        space: principal components of training images; up to 64 are used.
        groups, real_groups, train_groups: the patients of each set; every image its own if None.
        seed: of the pairs and folds.

    Returns:
        What :func:`compare_set` returns, and ``nearest_pixel``, ``nearest_pixel_least`` and ``nearest_pca`` as in
        :meth:`Distances.summary`. The unit of distances is a gray level of [0, 1].

    Raises:
        InputError: as :func:`compare_set` and :meth:`Distances.summary`.
    """
    one = Set(as_finite_images(images, "images"), groups)
    found = compare_set(one, Set(real, real_groups), space, seed=seed)
    return found | distances({"": one}, [Set(train, train_groups)], space)[""].summary()
