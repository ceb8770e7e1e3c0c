"""Further spaces in which a copy, or a person, could show: structural similarity, components, a patients' encoder.

Each is reported beside the rule of :mod:`medvdm.evaluation.privacy.copies` and decides nothing: how near samples and
held-out images of other people come to their nearest training image, and how well the space tells pairs of images of
one patient from pairs of different patients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from medvdm.evaluation.components import exact_components
from medvdm.evaluation.privacy import registration
from medvdm.evaluation.privacy.identity import Encoder
from medvdm.evaluation.statistics import auc

if TYPE_CHECKING:
    from medvdm.evaluation.privacy.copies import Keep, Measured, Shelf

COMPONENTS = 64
MOST = 1000  #: training images that components and encoder are fitted on
PAIRS = 400  #: of each kind, for the curves


def summary(
    samples: Shelf,
    train: Shelf,
    held_out: Shelf,
    of_samples: Measured,
    of_held_out: Measured,
    *,
    keep: Keep,
    seed: int,
) -> dict[str, Any]:
    """By space ('pixels', 'ssim', 'components', 'person'): quantiles of the similarity to the nearest training image.

    Each has ``samples`` and ``held_out`` (quantiles 0.5, 0.9, 0.99 and 1 of the similarity; for the rules also of the
    lead), and ``pairs``: AUC, and the share of pairs of one patient above all but 1 % and 0.1 % of the pairs of
    different patients, or None where no held-out patient has two images.
    """
    small = {"train": _some(train, MOST, seed), "samples": samples, "held_out": held_out}

    def compute() -> dict[str, np.ndarray]:
        images = {name: shelf.small(registration.COARSE) for name, shelf in small.items()}
        mean, components, variances = exact_components(_rows(images["train"]), COMPONENTS)
        encoder = Encoder.fit(images["train"], small["train"].patients, seed=seed)
        out = {}
        for name, features in {
            "components": lambda x: (_rows(x) - mean) @ components.T / np.sqrt(variances),
            "person": encoder,
        }.items():
            reference = _unit(features(images["train"]))
            for which in ("samples", "held_out"):
                out[f"{name}-{which}"] = (_unit(features(images[which])) @ reference.T).max(axis=1)
            out |= {f"{name}-{k}": v for k, v in _pairs(_unit(features(images["held_out"])), held_out, seed).items()}
        for which, shelf, found in (("samples", samples, of_samples), ("held_out", held_out, of_held_out)):
            out[f"ssim-{which}"] = _ssim_to(shelf, train, found)
        return out

    found = keep("spaces", compute)
    spaces: dict[str, Any] = {}
    for rule in of_samples.leads:
        nearest = [m.coarse if rule == "pixels" else m.fine.nearest for m in (of_samples, of_held_out)]
        spaces[rule] = {
            "samples": _quantiles(nearest[0].similarity[:, 0]),
            "held_out": _quantiles(nearest[1].similarity[:, 0]),
            "samples_lead": _quantiles(of_samples.leads[rule]),
            "held_out_lead": _quantiles(of_held_out.leads[rule]),
            "dimension": float(1 / of_held_out.leads[rule].mean()),
        }
    same, other = _pair_rows(held_out, seed)
    if len(same):
        images = held_out.small(registration.COARSE)

        def pixels() -> dict[str, np.ndarray]:
            return {
                kind: np.array([registration.coarse(images[[i]], images[[j]]).similarity[0, 0] for i, j in pairs])
                for kind, pairs in (("same", same), ("other", other))
            }

        spaces["pixels"]["pairs"] = _told_apart(**keep("pairs", pixels))
    for name in ("ssim", "components", "person"):
        spaces[name] = {which: _quantiles(found[f"{name}-{which}"]) for which in ("samples", "held_out")}
        if f"{name}-same" in found:
            spaces[name]["pairs"] = _told_apart(found[f"{name}-same"], found[f"{name}-other"])
    return spaces


def _some(shelf: Shelf, most: int, seed: int) -> Shelf:
    """Of a random choice of patients all images, at most so many; patients with several images come first."""
    if len(shelf) <= most:
        return shelf
    people, whose, count = np.unique(shelf.patients, return_inverse=True, return_counts=True)
    order = np.lexsort((np.random.default_rng(seed).random(len(people)), count < 2))
    rank = np.empty(len(people), int)
    rank[order] = np.arange(len(people))
    return shelf.take(np.sort(np.argsort(rank[whose], kind="stable")[:most]))


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _pair_rows(shelf: Shelf, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (k, 2) of images of one patient, and of different patients; at most :data:`PAIRS` and twenty times that."""
    i, j = np.triu_indices(len(shelf), 1)
    same = shelf.patients[i] == shelf.patients[j]
    rng = np.random.default_rng(seed)
    pick = lambda rows, most: rows[np.sort(rng.permutation(len(rows))[:most])]  # noqa: E731
    chosen = pick(np.flatnonzero(same), PAIRS), pick(np.flatnonzero(~same), 20 * PAIRS)
    return tuple(np.stack([i[rows], j[rows]], axis=1) for rows in chosen)


def _pairs(features: np.ndarray, shelf: Shelf, seed: int) -> dict[str, np.ndarray]:
    same, other = _pair_rows(shelf, seed)
    if not len(same):
        return {}
    cosine: Callable[[np.ndarray], np.ndarray] = lambda pairs: (  # noqa: E731
        features[pairs[:, 0]] * features[pairs[:, 1]]
    ).sum(axis=1)
    return {"same": cosine(same), "other": cosine(other)}


def _told_apart(same: np.ndarray, other: np.ndarray) -> dict[str, float]:
    found = auc(np.concatenate([same, other]), np.repeat([1.0, 0.0], [len(same), len(other)]))
    return {
        "auc": found.value,
        "auc_stderr": found.stderr,
        "tpr_at_1pct_fpr": float((same > np.quantile(other, 0.99)).mean()),
        "tpr_at_01pct_fpr": float((same > np.quantile(other, 0.999)).mean()),
    }


def _ssim_to(shelf: Shelf, train: Shelf, found: Measured) -> np.ndarray:
    """(n,) structural similarity of each image and its nearest training image, shifted and mirrored as found.

    scikit-image's, with its window of 7 pixels, on images of 64 pixels.
    """
    from scipy.ndimage import shift
    from skimage.metrics import structural_similarity

    ours = shelf.small(registration.FINE)
    rows, back = np.unique(found.fine.nearest.where[:, 0], return_inverse=True)
    theirs = train.take(rows).small(registration.FINE)[back]
    window = min(7, 2 * ((min(ours.shape[1:]) - 1) // 2) + 1)
    side = max(ours.shape[1:])
    out = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a = a[:, ::-1] if found.fine.flipped[i, 0] else a
        b = shift(b, found.fine.shift[i, 0] * side, order=1, mode="nearest")
        out.append(structural_similarity(a, b, data_range=1.0, win_size=window))
    return np.array(out)


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.5, 0.9, 0.99, 1.0])]
