"""Copies of training images among samples, by the rule of :mod:`medvdm.evaluation.privacy.search`: the whole audit."""

from __future__ import annotations

from typing import Any

import numpy as np

from medvdm.errors import InputError
from medvdm.evaluation.privacy import registration, spaces
from medvdm.evaluation.privacy.search import (
    PART,
    Keep,
    Limit,
    Measured,
    Nearest,
    Reduced,
    Shelf,
    beyond,
    calibrate,
    flagged,
    in_parts,
    measure,
    now,
    reduced,
    under,
)

LEAST_HELD_OUT = 20
MOST_QUERIES = 400  #: training images with a second visit that the rule is tried on
FEW = 100  #: samples, or held-out images, below which there is a note
SAME = 0.9999  #: similarity of a picture with itself, after rounding to 8 bits


def audit_copies(
    samples: Shelf, train: Shelf, held_out: Shelf, *, keep: Keep = now, alarm: float = 0.01, seed: int = 0
) -> dict[str, Any]:
    """Look for copies of training images among samples.

    Args:
        samples: what a model has drawn.
        train: all images that it was trained on.
        held_out: images of other patients from the same source; the threshold is calibrated on them.
        keep: keeps what is finished, so that the audit can go on.
        alarm: chance of any false alarm among the samples of a model that copies nothing.
        seed: of the training images that the rule is tried on.

    Returns:
        JSON-ready:

        * ``num_samples``, ``num_train``, ``num_held_out``, ``num_copies``;
        * ``copies``: of each ``sample``, the ``training_image`` and its ``patient``, the ``rule`` that is surest,
          ``score`` (its lead) and ``threshold``, ``similarity``, ``second`` (``training_image`` and ``similarity`` of
          the nearest image of another patient), ``change`` (``shift`` down and to the right as fractions of the longer
          side, ``zoom``, ``flipped``); the surest first;
        * ``false_alarm_rate`` of the held-out images by the same rule, and ``false_alarm_interval`` (95 %, exact);
        * ``threshold`` and ``least_similarity`` by rule;
        * ``spaces``, by rule and in further spaces: see :func:`medvdm.evaluation.privacy.spaces.summary`;
        * ``visits``: the share of training images whose patient the rule finds by another image when they are left out
          themselves; None where no patient has two;
        * ``clusters``: ``groups`` of samples that are as near to one another as copies, and the ``largest`` one's size;
        * ``notes``: what was lost, and why.

    Raises:
        InputError: an alarm outside (0, 1), images of different shapes or not finite, patients or pictures on both
            sides, or too few held-out images.
    """
    _check(samples, train, held_out, alarm)
    of_train, of_held_out, of_samples = (
        reduced(shelf, name, keep=keep)
        for name, shelf in (("train", train), ("held_out", held_out), ("samples", samples))
    )
    null = measure(of_held_out, of_train, keep=under("held_out", keep))
    _check_twins(null["pixels"], held_out, train)
    found = measure(of_samples, of_train, keep=under("samples", keep))
    limits = calibrate(null, held_out.patients, len(samples), alarm)
    copies = _copies(found, samples, train, limits)
    alarms = flagged(null, limits)
    visits = _visits(of_train, limits, keep, seed)
    return {
        "num_samples": len(samples),
        "num_train": len(train),
        "num_held_out": len(held_out),
        "num_copies": len(copies),
        "copies": copies,
        "alarm": alarm,
        "false_alarm_rate": float(alarms.mean()),
        "false_alarm_interval": exact_interval(int(alarms.sum()), len(alarms)),
        "threshold": {rule: limit.lead for rule, limit in limits.items()},
        "least_similarity": {rule: limit.similarity for rule, limit in limits.items()},
        "visits": visits,
        "spaces": spaces.summary(of_samples, of_train, of_held_out, found, null, keep=keep, seed=seed),
        "clusters": _clusters(of_samples, null["pixels"], keep),
        "notes": _notes(samples, held_out, int(alarms.sum()), visits),
    }


def exact_interval(found: int, of: int) -> list[float]:
    """The 95 % interval of a share by Clopper and Pearson (1934)."""
    from scipy.stats import binomtest

    interval = binomtest(found, of).proportion_ci(0.95, method="exact")
    return [float(interval.low), float(interval.high)]


def _check(samples: Shelf, train: Shelf, held_out: Shelf, alarm: float) -> None:
    if not 0 < alarm < 1:
        raise InputError(f"alarm: {alarm}; expected a chance between 0 and 1")
    shapes = {}
    for name, shelf in (("samples", samples), ("train", train), ("held_out", held_out)):
        if not len(shelf):
            raise InputError(f"{name}: no image; expected at least one")
        shapes[name] = shelf.read(np.arange(1)).shape[1:]
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        raise InputError(f"images: shapes {found}; expected one shape")
    if len(held_out) < LEAST_HELD_OUT:
        raise InputError(
            f"held_out: {len(held_out)} images; expected at least {LEAST_HELD_OUT}, to calibrate the threshold on"
        )
    if len(set(train.patients)) < 2:
        raise InputError("train: images of one patient; expected at least two, for the nearest image of another")
    if both := sorted(set(held_out.patients) & set(train.patients)):
        raise InputError(
            f"held_out: patient '{both[0]}' is in the training images as well ({len(both)} such patients); expected "
            "other patients"
        )


def _check_twins(found: Nearest, held_out: Shelf, train: Shelf) -> None:
    """Refuse held-out pictures that are training images."""
    near = np.flatnonzero(found.similarity[:, 0] > SAME)
    twins = [i for i in near if np.array_equal(held_out.read(np.array([i])), train.read(found.where[[i], 0]))]
    if twins:
        name, other = held_out.names[twins[0]], train.names[found.where[twins[0], 0]]
        raise InputError(
            f"held_out: {name} is the same picture as the training image {other} ({len(twins)} such pictures); "
            "expected none of the training images"
        )


def _notes(samples: Shelf, held_out: Shelf, alarms: int, visits: float | None) -> list[str]:
    notes = []
    if alarms:
        notes.append(
            f"{alarms} of {len(held_out)} held-out images are called copies themselves: look for training patients "
            "among them under another name, which would also raise the threshold"
        )
    if len(samples) < FEW:
        notes.append(f"only {len(samples)} samples: what a model copies once in a hundred draws is hardly seen")
    if len(held_out) < FEW:
        notes.append(f"only {len(held_out)} held-out images: the threshold is higher for it, so fewer copies are found")
    if visits is None:
        notes.append(
            "no training patient has two images: not known how often the rule would find a patient on another day; it "
            "is tried on changed copies alone. If second images of a patient go by another name, they hide a copy"
        )
    return notes


def _copies(found: Measured, samples: Shelf, train: Shelf, limits: dict[str, Limit]) -> list[dict[str, Any]]:
    out = []
    for i in np.flatnonzero(flagged(found, limits)):
        called = [rule for rule in limits if beyond(found[rule], limits[rule])[i]]
        surest = max(called, key=lambda rule: found[rule].lead[i] / limits[rule].lead)
        one = found[surest]
        nearest, second = one.where[i]
        out.append(
            {
                "sample": samples.names[i],
                "training_image": train.names[nearest],
                "patient": str(train.patients[nearest]),
                "rule": surest,
                "score": float(one.lead[i]),
                "threshold": limits[surest].lead,
                "similarity": float(one.similarity[i, 0]),
                "second": {"training_image": train.names[second], "similarity": float(one.similarity[i, 1])},
                "change": {
                    "shift": [float(v) for v in one.shift[i]],
                    "zoom": float(one.zoom[i]),
                    "flipped": bool(one.flipped[i]),
                },
            }
        )
    return sorted(out, key=lambda one: one["threshold"] / one["score"])


def _visits(train: Reduced, limits: dict[str, Limit], keep: Keep, seed: int) -> float | None:
    """The share of training images, each left out once, whose patient the rule finds by another image."""
    _, whose, count = np.unique(train.patients, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[whose] > 1)
    if not len(rows):
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_QUERIES])
    found = measure(train.take(rows), train, keep=under("visits", keep), own=rows)
    right = [beyond(one, limits[rule]) & (whose[one.where[:, 0]] == whose[rows]) for rule, one in found.items()]
    return float(np.any(right, axis=0).mean())


def _clusters(samples: Reduced, held_out: Nearest, keep: Keep) -> dict[str, int]:
    """Groups of samples that are nearer to one another than 99 % of held-out images come to a training image.

    A second sign (Carlini et al., 2023): what is memorised is drawn again and again. Blurred samples are alike, too, so
    this alone is no alarm.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    near = float(np.quantile(held_out.similarity[:, 0], 0.99))
    n = len(samples)
    edges = csr_matrix((n, n), dtype=bool)
    for rows in in_parts(n, PART):

        def compute(rows: np.ndarray = rows) -> dict[str, np.ndarray]:
            i, j = np.nonzero(registration.coarse(samples.coarse[rows], samples.coarse).similarity > near)
            return {"i": rows[i], "j": j}

        pairs = keep(f"clusters-{rows[0]}", compute)
        edges = edges + csr_matrix((np.ones(len(pairs["i"]), bool), (pairs["i"], pairs["j"])), shape=(n, n))
    _, group = connected_components(edges, directed=False)
    sizes = np.bincount(group)
    return {"groups": int((sizes > 1).sum()), "largest": int(sizes.max())}
