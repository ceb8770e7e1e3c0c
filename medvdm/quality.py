r"""How good are samples? Audits of one set of images against another: each says one thing, none says "good".

Every number here needs the same number for *real* images beside it, since none has a scale of its own. The feature
spaces are named, and simple on purpose: pixels, principal components of the run's training images, radial power
spectra. None of them is a network's, so nothing here is an FID.

* :func:`ms_ssim`: likeness of pairs. Its mean over pairs *within* a set (:func:`pair_similarity`) falls as the set
  becomes more varied.
* :func:`power_spectrum`: how much of an image's variance sits at each scale; what a blur removes.
* :func:`gray_distance`: distance between two histograms of gray values.
* :func:`two_sample`: can a linear classifier tell two sets apart? An AUC of 0.5 is what it scores on two halves of one.
* :func:`nearest`: the training image that is closest to each sample.

For classifiers, :func:`logistic` and :func:`auc` (with its error by patient) also serve to ask whether samples of a
class look like their class. Everything is numpy and scipy on the processor; images are (n, h, w, c) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from medvdm.errors import InputError
from medvdm.evaluation import clustered_stderr

#: Weights of the scales, finest first (Wang, Simoncelli and Bovik, 2003).
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11  #: side of SSIM's Gaussian window, whose deviation is 1.5 pixels
PAIRS = 512  #: pairs that :func:`pair_similarity` looks at
PENALTY = 0.01  #: of :func:`logistic`
FOLDS = 5  #: of :func:`two_sample`


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
    a, b = _images(a, "a"), _images(b, "b")
    if a.shape != b.shape:
        raise InputError(f"b: shape {b.shape}; expected that of a, {a.shape}")
    scales = num_scales(*a.shape[1:3])
    if not scales:
        raise InputError(f"a: images of {a.shape[1]}x{a.shape[2]} pixels; expected at least {WINDOW}x{WINDOW}")
    weights = np.array(SCALES[:scales]) / sum(SCALES[:scales])
    total = np.ones(len(a))
    for j, weight in enumerate(weights):
        structure, ssim = _ssim_terms(a, b)
        total *= np.maximum(ssim if j == scales - 1 else structure, 0.0) ** weight
        a, b = _halve(a), _halve(b)
    return total


def _ssim_terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    images = _images(images, "images")
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
    r"""Radially averaged power of each image at k = 1, 2, ..., K cycles a side: (n, K), K half the shorter side.

    .. math:: P(k) = \frac{1}{|R_k|} \sum_{f \in R_k} \frac{|\hat y(f)|^2}{\sum_p w_p^2}, \qquad y = w\,(x - \bar x_w)

    with a Hann window w (an X-ray's opposite edges do not match, and without it that step would pass for fine detail),
    :math:`\bar x_w` the mean under w, and :math:`R_k` the frequencies whose length is nearest to k. The unit is that of
    a variance: **white noise of variance s^2 has P(k) = s^2 at every k**. Channels are averaged.
    """
    images = _images(images, "images")
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
    set would have to be moved for its histogram to become the other's. It knows nothing of where the pixels are."""
    levels = (np.arange(4096) + 0.5) / 4096  # the distance is the area between the two quantile functions
    return float(np.mean(np.abs(np.quantile(a, levels) - np.quantile(b, levels))))


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


def logistic(
    features: np.ndarray, labels: np.ndarray, *, penalty: float = PENALTY
) -> Callable[[np.ndarray], np.ndarray]:
    r"""Fit a logistic regression on (n, d) features and labels 0 or 1; returns a function from features to log odds.

    Features are brought to mean 0 and deviation 1 first. The loss is the mean log loss plus
    ``penalty`` / 2 times the squared length of the weights, which is convex; L-BFGS finds its only minimum.

    Raises:
        InputError: features or labels that do not fit together, or labels of one kind only.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    features, labels = np.asarray(features, np.float64), np.asarray(labels, np.float64)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not np.isfinite(features).all():
        raise InputError(f"features: shape {features.shape}; expected finite (n, d), with {labels.size} labels")
    _two_kinds(labels)
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    x = (features - centre) / scale

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        odds = x @ w[:-1] + w[-1]
        slope = (expit(odds) - labels) / len(labels)
        value = np.mean(np.logaddexp(0.0, odds) - labels * odds) + 0.5 * penalty * w[:-1] @ w[:-1]
        return value, np.append(x.T @ slope + penalty * w[:-1], slope.sum())

    w = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-7}).x
    return lambda new: (np.asarray(new, np.float64) - centre) / scale @ w[:-1] + w[-1]


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    stderr: float


def auc(scores: np.ndarray, labels: np.ndarray, groups: Sequence[str] | np.ndarray | None = None) -> Estimate:
    r"""Area under the ROC curve: the share of (1, 0) pairs that the scores put in the right order, ties one half.

    The error is by ``groups`` (patients). Each image has a *placement*: for a 1, the share of the 0s below it; for a 0,
    the share of the 1s above it. The AUC is the mean placement of either kind, and its variance that of a sum of
    placements minus their mean, each over the number of its kind, with one term a group (DeLong, DeLong and
    Clarke-Pearson, 1988; Obuchowski, 1997). NaN with fewer than two groups.

    Raises:
        InputError: labels of one kind only.
    """
    from scipy.stats import rankdata

    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.ndim != 1 or labels.shape != scores.shape or not np.isfinite(scores).all():
        raise InputError(f"scores: shape {scores.shape}; expected finite (n,), with {labels.size} labels")
    _two_kinds(labels)
    ones = labels == 1
    n_1, n_0 = int(ones.sum()), int((~ones).sum())
    rank, within = rankdata(scores), np.empty(len(scores))
    within[ones], within[~ones] = rankdata(scores[ones]), rankdata(scores[~ones])
    below = rank - within  # images of the other kind that score less, ties one half
    placement = np.where(ones, below / n_0, 1 - below / n_1)
    area = float(placement[ones].mean())
    influence = (placement - area) / np.where(ones, n_1, n_0)
    _, group = np.unique(np.arange(len(scores)) if groups is None else np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    if count < 2:
        return Estimate(area, math.nan)
    sums = np.bincount(group, influence)
    return Estimate(area, math.sqrt(count / (count - 1) * float(np.sum(sums**2))))


def two_sample(
    a: np.ndarray,
    b: np.ndarray,
    groups_a: Sequence[str] | np.ndarray | None = None,
    groups_b: Sequence[str] | np.ndarray | None = None,
    *,
    folds: int = FOLDS,
    penalty: float = PENALTY,
    seed: int = 0,
) -> Estimate:
    """Classifier two-sample test: the cross-validated AUC of a logistic regression that tells features a from b.

    0.5 is chance: the classifier found nothing, which does not prove that there is nothing. 1 means that every image
    was told apart. Images of one group (patient) are in one fold. The AUC is the mean over the folds. Its error treats
    their classifiers as given, and as unrelated although they share training images. That makes it too small: by about
    1.4 times where there is nothing to find (measured on Gaussian features, 60 rows of 16 in each set).

    Args:
        a, b: (n, d) and (m, d) features.
        groups_a, groups_b: the images' patients; each image its own if None. A name in both sets is one patient.
        folds: how many.
        penalty: of :func:`logistic`.
        seed: of the folds.

    Raises:
        InputError: fewer than two folds, or a set with fewer groups than folds.

    Source: Lopez-Paz and Oquab, "Revisiting classifier two-sample tests" (2017).
    """
    if folds < 2:
        raise InputError(f"folds: {folds}; expected at least 2")
    given = (("a", a, groups_a), ("b", b, groups_b))
    names = [[f"{s}/{i}" for i in range(len(x))] if g is None else [str(v) for v in g] for s, x, g in given]
    rng, place = np.random.default_rng(seed), {}
    for (which, _, _), group in zip(given, names, strict=True):
        new = sorted(set(group) - place.keys())
        if len(set(group)) < folds:
            raise InputError(f"{which}: {len(set(group))} patients; expected at least {folds}, one a fold")
        place |= dict(zip(np.array(new)[rng.permutation(len(new))].tolist(), np.arange(len(new)) % folds, strict=True))
    features = np.concatenate([np.asarray(a), np.asarray(b)])
    labels = np.repeat([1.0, 0.0], [len(a), len(b)])
    groups = np.array(names[0] + names[1])
    fold = np.array([place[g] for g in groups])
    parts = []
    for number in range(folds):
        out = fold == number
        if len(set(labels[out])) < 2 or len(set(labels[~out])) < 2:
            raise InputError(f"a and b: fold {number} of {folds} lacks one of them; expected fewer folds")
        scores = logistic(features[~out], labels[~out], penalty=penalty)(features[out])
        parts.append(auc(scores, labels[out], groups[out]))
    error = math.sqrt(sum(p.stderr**2 for p in parts)) / folds
    return Estimate(float(np.mean([p.value for p in parts])), error)


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
            raise InputError(f"reference: {other.shape[1]} entries a row; expected {rows.shape[1]}")
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


def audit(
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
        power in the scales from 2 cycles a side to the finest, cut into three equal parts of the logarithm of k, over
        that of ``real``; ``gray_distance`` from ``real``; ``c2st_coarse`` (8 components),
        ``c2st_pca`` (up to 64) and ``c2st_spectrum``, with ``..._stderr``: the AUC of :func:`two_sample` against
        ``real``; ``nearest_pixel`` and ``nearest_pca``, medians over the images of the distance to the
        nearest training image, and ``nearest_pixel_least``, the smallest. The unit of distances is a gray level of
        [0, 1]: in the space of the components, the root mean square over *pixels* of the projected difference.

    Raises:
        InputError: images smaller than 11 pixels a side, or a set of fewer than four patients.
    """
    images, real, train = _images(images, "images"), _images(real, "real"), _images(train, "train")
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


def bands(num: int) -> tuple[slice, slice, slice]:
    """Coarse, middle and fine scales of a power spectrum of ``num`` entries, as slices of it.

    From 2 cycles a side (1 is the window's own) to ``num``, cut into three of about equal width in log k.
    """
    first, second = (round(2 * (num / 2) ** (part / 3)) for part in (1, 2))
    return slice(1, first), slice(first, second), slice(second, num)


def _images(x: np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(x, np.float32)
    if x.ndim != 4 or 0 in x.shape or not np.isfinite(x).all():
        raise InputError(f"{name}: shape {x.shape}; expected finite images (n, h, w, c), none of the sizes 0")
    return x


def _two_kinds(labels: np.ndarray) -> None:
    if set(np.unique(labels)) != {0.0, 1.0}:
        raise InputError(f"labels: {np.unique(labels)[:4].tolist()}; expected both 0 and 1, and nothing else")
