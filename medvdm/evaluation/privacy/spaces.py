"""Further spaces in which a copy, or a person, could show: structural similarity, components, a patients' encoder.

Each is reported beside the rules of :mod:`medvdm.evaluation.privacy.search` and decides nothing: how near samples and
held-out images of other people come to their nearest training image, and how well the space tells pairs of images of
one patient from pairs of different patients.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medvdm.evaluation.components import exact_components
from medvdm.evaluation.privacy import registration
from medvdm.evaluation.privacy.identity import Encoder
from medvdm.evaluation.privacy.search import Keep, Measured, Nearest, Reduced
from medvdm.evaluation.statistics import auc

COMPONENTS = 64
MOST = 1000  #: training images that components and encoder are fitted on
MOST_PAIRED = 300  #: held-out images of which all pairs are looked at


def summary(
    samples: Reduced,
    train: Reduced,
    held_out: Reduced,
    of_samples: Measured,
    of_held_out: Measured,
    *,
    keep: Keep,
    seed: int,
) -> dict[str, Any]:
    """By space: each rule's, 'components' (cosine), 'person' (cosine, see :mod:`.identity`) and 'ssim'.

    Each has ``samples`` and ``held_out``: quantiles 0.5, 0.9, 0.99 and 1 of the similarity to the nearest training
    image (in 'components' and 'person': of at most 1,000 of them), and ``share``: of samples that are above 99 % of
    held-out images, which is 0.01 where nothing is the matter, or where both are alike. A rule has, too,
    ``samples_lead`` and ``held_out_lead`` (the same quantiles) and ``dimension``.

    ``pairs``, of held-out images: the AUC of pairs of one patient against pairs of different patients, with its error,
    and the share of the former that are above all but 1 % and 0.1 % of the latter (None with fewer than 1,000 of
    these). None where no held-out patient has two images.
    """
    fitted, paired = _some(train, MOST, seed), _some(held_out, MOST_PAIRED, seed)

    def compute() -> dict[str, np.ndarray]:
        mean, components, variances = exact_components(_rows(fitted.coarse), COMPONENTS)
        encoder = Encoder.fit(fitted.coarse, fitted.patients, seed=seed)
        out = {"pixels-pairs": registration.coarse(paired.coarse, paired.coarse).similarity}
        for name, features in {
            "components": lambda x: (_rows(x) - mean) @ components.T / np.sqrt(variances),
            "person": encoder,
        }.items():
            reference = _unit(features(fitted.coarse))
            for which, images in (("samples", samples), ("held_out", held_out)):
                out[f"{name}-{which}"] = (_unit(features(images.coarse)) @ reference.T).max(axis=1)
            rows = _unit(features(paired.coarse))
            out[f"{name}-pairs"] = rows @ rows.T
        for which, images, found in (("samples", samples, of_samples), ("held_out", held_out, of_held_out)):
            out[f"ssim-{which}"] = _ssim(images, train, found["registered"])
        return out

    found = keep("spaces", compute)
    spaces: dict[str, Any] = {}
    for rule, null in of_held_out.items():
        one = of_samples[rule]
        spaces[rule] = _compared(one.similarity[:, 0], null.similarity[:, 0])
        spaces[rule] |= {"samples_lead": _quantiles(one.lead), "held_out_lead": _quantiles(null.lead)}
        spaces[rule]["dimension"] = float(1 / null.lead.mean())
    for name in ("ssim", "components", "person"):
        spaces[name] = _compared(found[f"{name}-samples"], found[f"{name}-held_out"])
    for name in ("pixels", "components", "person"):
        spaces[name]["pairs"] = told_apart(found[f"{name}-pairs"], paired.patients)
    return spaces


def told_apart(similarity: np.ndarray, patients: np.ndarray) -> dict[str, float | None] | None:
    """How well similarities (n, n) of all pairs of images tell those of one patient; see :func:`summary`."""
    i, j = np.triu_indices(len(patients), 1)
    values, same = similarity[i, j], patients[i] == patients[j]
    if not same.any() or same.all():
        return None
    found = auc(values, same.astype(float), np.where(same, patients[i], [f"{k}" for k in range(len(same))]))
    enough = (~same).sum() >= 1000
    return {
        "auc": found.value,
        "auc_stderr": found.stderr,
        "tpr_at_1pct_fpr": float((values[same] > np.quantile(values[~same], 0.99)).mean()),
        "tpr_at_01pct_fpr": float((values[same] > np.quantile(values[~same], 0.999)).mean()) if enough else None,
    }


def _some(images: Reduced, most: int, seed: int) -> Reduced:
    """Of a random choice of patients all images, at most so many; patients with several images come first."""
    if len(images) <= most:
        return images
    people, whose, count = np.unique(images.patients, return_inverse=True, return_counts=True)
    order = np.lexsort((np.random.default_rng(seed).random(len(people)), count < 2))
    rank = np.empty(len(people), int)
    rank[order] = np.arange(len(people))
    return images.take(np.sort(np.argsort(rank[whose], kind="stable")[:most]))


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _ssim(images: Reduced, train: Reduced, found: Nearest) -> np.ndarray:
    """(n,) structural similarity of each image and its nearest training image, shifted and mirrored as found.

    scikit-image's, with its window of 7 pixels, on images of 64 pixels.
    """
    from scipy.ndimage import shift
    from skimage.metrics import structural_similarity

    window = min(7, 2 * ((min(images.fine.shape[1:]) - 1) // 2) + 1)
    side = max(images.fine.shape[1:])
    out = []
    for i, image in enumerate(images.fine):
        ours = image[:, ::-1] if found.flipped[i] else image
        theirs = train.fine[found.where[i, 0]].astype(np.float32)
        theirs = shift(theirs, found.shift[i] * side, order=1, mode="nearest")
        out.append(structural_similarity(ours.astype(np.float32), theirs, data_range=1.0, win_size=window))
    return np.array(out)


def _compared(samples: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    share = float((samples > np.quantile(held_out, 0.99)).mean())
    return {"samples": _quantiles(samples), "held_out": _quantiles(held_out), "share": share}


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.5, 0.9, 0.99, 1.0])]
