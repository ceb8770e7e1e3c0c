r"""Errors by patient, and classifiers as tests: what every comparison of two sets of numbers here rests on.

Images of one patient are alike, so a standard error counts patients, not images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from medvdm.errors import InputError


def clustered_stderr(values: np.ndarray, groups: Sequence[str] | np.ndarray) -> float:
    r"""Standard error of the mean of ``values`` when those of one group (patient) may be alike.

    .. math:: \frac{1}{N} \sqrt{\frac{G}{G - 1} \sum_g \Big(\sum_{i \in g} (v_i - \bar v)\Big)^2}

    For groups of one it is the usual standard error. NaN with fewer than two groups.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = group.max() + 1
    if count < 2:
        return math.nan
    sums = np.bincount(group, weights=values - values.mean())
    return math.sqrt(count / (count - 1) * float(np.sum(sums**2))) / len(values)


PENALTY = 0.01  #: of :func:`logistic`
FOLDS = 5  #: of :func:`two_sample`


def logistic(
    features: np.ndarray, labels: np.ndarray, *, penalty: float = PENALTY
) -> Callable[[np.ndarray], np.ndarray]:
    r"""Fit a logistic regression on (n, d) features and labels 0 or 1; returns a function from features to log odds.

    Features are brought to mean 0 and deviation 1 first. The loss is the mean log loss plus
    ``penalty`` / 2 times the squared length of the weights, which is convex and has one minimum: scikit-learn's
    ``LogisticRegression``, whose C is 1 / (n ``penalty``).

    Raises:
        InputError: features or labels that do not fit together, or labels of one kind only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = np.asarray(features, np.float64), np.asarray(labels, np.float64)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not np.isfinite(features).all():
        raise InputError(f"features: shape {features.shape}; expected finite (n, d), with {labels.size} labels")
    _two_kinds(labels)
    strength = 1 / (len(labels) * penalty) if penalty else np.inf
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-7, max_iter=10_000))
    return fitted.fit(features, labels).decision_function


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    stderr: float


def auc(scores: np.ndarray, labels: np.ndarray, groups: Sequence[str] | np.ndarray | None = None) -> Estimate:
    r"""Area under the ROC curve: the share of (1, 0) pairs that the scores put in the right order, ties one half.

    The error is by ``groups`` (patients). Each image has a *placement*: for a 1, the share of the 0s below it; for a 0,
    the share of the 1s above it. The AUC is the mean placement of either kind, and its variance that of a sum of
    placements minus their mean, each over the number of its kind, with one term per group (DeLong, DeLong and
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
    # Patients are dealt out one set at a time: each fold has as many of either as it can. A balance of images, as
    # scikit-learn's StratifiedGroupKFold seeks it, can leave a fold one patient with many images, and no error.
    rng, place = np.random.default_rng(seed), {}
    for (which, _, _), group in zip(given, names, strict=True):
        new = sorted(set(group) - place.keys())
        if len(set(group)) < folds:
            raise InputError(f"{which}: {len(set(group))} patients; expected at least {folds}, one per fold")
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


def _two_kinds(labels: np.ndarray) -> None:
    if set(np.unique(labels)) != {0.0, 1.0}:
        raise InputError(f"labels: {np.unique(labels)[:4].tolist()}; expected both 0 and 1, and nothing else")
