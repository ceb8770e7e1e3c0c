r"""Copies of training images among samples: how much nearer is the nearest training image than the second?

A distance alone deceives. X-rays of different patients correlate up to 0.95, and a blurred sample is nearer to *every*
training image than a sharp X-ray of somebody else is. So each image is asked for two distances
(:mod:`medvdm.evaluation.privacy.registration`): :math:`r_1` to its nearest training image, and :math:`r_2` to the
nearest one of *another* patient. Where training images lie around with a smooth density in D dimensions, the number of
them within a radius grows as :math:`r^D`, and for an image that copies none of them

.. math:: P(r_1 / r_2 \le q) = q^D, \qquad \log(r_2 / r_1) \sim \text{Exponential}(D)

(Facco et al., 2017, who estimate D so). Held-out images of other patients give D: with the mean s of their n
*leads* :math:`\log(r_2 / r_1)`, the lead of one more such image over s follows F(2, 2n). A sample is called a copy
where its lead is above

.. math:: s \; F^{-1}_{2, 2n}\!\left(1 - \frac{a}{2m}\right) ,

so that among m samples of a model that copies nothing any is called with a chance of at most a. The 2 is there since
there are two rules: images of 32 pixels as they lie (shifted and mirrored at most), which noise hardly disturbs, and
images of 64 pixels after registration, which finds what was shifted by a part of a pixel or zoomed.

Not found: a copy of a part of an image, one that is changed beyond this, an image whose patient is there under two
names (the second nearest is then a copy, too), and the person in another image (``visits`` says how seldom).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from medvdm.data import ImageData
from medvdm.errors import InputError
from medvdm.evaluation.privacy import registration
from medvdm.evaluation.privacy.registration import COARSE, FINE

READ = 128  #: images that are read at a time
PART = 512  #: training images that are compared, and whose result is kept, at a time
CANDIDATES = 4  #: training images per image that are registered, of distinct patients
LEAST_HELD_OUT = 20
LEAST_SIMILAR = 0.5  #: a copy is more similar to its training image than this share of held-out images to theirs
MOST_QUERIES = 400  #: training images with a second visit that the rule is tried on
FEW = 100  #: samples, or held-out images, below which there is a note
TWIN = 0.999  #: correlation as they lie, above which two training images of different patients are one picture
SAME = 0.9999  #: similarity of a picture with itself, after rounding to 8 bits

#: Gives the arrays of a part, by its name: those kept from before, or computed now.
Keep = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


def now(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Keeps nothing."""
    return compute()


@dataclass(frozen=True)
class Shelf:
    """Images that are read when they are needed.

    Attributes:
        read: maps (m,) rows to (m, h, w, c) float32 in [0, 1].
        patients: (N,) names.
        names: (N,) of the images.
    """

    read: Callable[[np.ndarray], np.ndarray]
    patients: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        patients: Sequence[str] | np.ndarray | None = None,
        names: Sequence[str] | None = None,
    ) -> Self:
        """Of images (N, h, w, c) in [0, 1]; without names each is called by its number, and is a patient of its own."""
        names = [f"image {i}" for i in range(len(images))] if names is None else list(names)
        who = np.array([f"patient of {name}" for name in names] if patients is None else [str(p) for p in patients])
        return cls(lambda rows: np.asarray(images[rows], np.float32), who, names)

    @classmethod
    def from_data(cls, data: ImageData, rows: np.ndarray) -> Self:
        """Some images of a data set."""
        rows = np.asarray(rows, int)
        return cls(lambda chosen: data.read(rows[chosen]), data.patients[rows], [data.ids[i] for i in rows])

    def take(self, rows: np.ndarray) -> Shelf:
        """Some of the images."""
        rows = np.asarray(rows, int)
        return Shelf(lambda chosen: self.read(rows[chosen]), self.patients[rows], [self.names[i] for i in rows])


@dataclass(frozen=True)
class Reduced:
    """All images of a shelf, small and gray, as the search needs them: about 20 KB per image.

    Attributes:
        coarse: (N, h, w), at most 32 pixels a side.
        fine: (N, H, W), at most 64.
        patients, names: as of the shelf.
    """

    coarse: np.ndarray
    fine: np.ndarray
    patients: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> Reduced:
        """Some of the images."""
        return Reduced(self.coarse[rows], self.fine[rows], self.patients[rows], [self.names[i] for i in rows])


def reduced(shelf: Shelf, name: str, *, keep: Keep = now) -> Reduced:
    """Read a shelf once, :data:`READ` images at a time.

    Raises:
        InputError: values that are not finite; ``name`` says of what.
    """

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        images = shelf.read(rows)
        wrong = ~np.isfinite(images).all(axis=(1, 2, 3))
        if wrong.any():
            which = shelf.names[rows[wrong.argmax()]]
            raise InputError(f"{name}: {which} has values that are not finite; expected gray values in [0, 1]")
        return {"coarse": registration.small(images, COARSE), "fine": registration.small(images, FINE)}

    parts = [keep(f"{name}-small-{rows[0]}", lambda rows=rows: compute(rows)) for rows in _in_parts(len(shelf), READ)]
    coarse, fine = (np.concatenate([part[size] for part in parts]) for size in ("coarse", "fine"))
    return Reduced(coarse, fine, shelf.patients, shelf.names)


def _in_parts(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(first, min(first + size, n)) for first in range(0, n, size)]


# --- The search ---------------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The most similar training images of each of n images, each of another patient, best first.

    Attributes:
        similarity: (n, k) normalised correlation; -1 where there are fewer patients.
        where: (n, k) their positions.
        move: (n, k) numbers of the moves of :func:`medvdm.evaluation.privacy.registration.coarse`.
    """

    similarity: np.ndarray
    where: np.ndarray
    move: np.ndarray


def search(images: Reduced, train: Reduced, *, keep: Keep = now, own: np.ndarray | None = None) -> Candidates:
    """Compare images with all training images, :data:`PART` of these at a time.

    Args:
        images, train: from :func:`reduced`.
        keep: keeps what each part has found.
        own: (n,) where the images are training images, their positions, which are left out.
    """
    _, whose = np.unique(train.patients, return_inverse=True)
    found = []
    for rows in _in_parts(len(train), PART):

        def compute(rows: np.ndarray = rows) -> dict[str, np.ndarray]:
            similarity, move = registration.coarse(images.coarse, train.coarse[rows])
            if own is not None:
                similarity[own[:, None] == rows] = -1
            return _best(similarity, np.broadcast_to(rows, similarity.shape), move, whose)._asdict()

        found.append(Candidates(**keep(f"part-{rows[0]}", compute)))
    return _best(*(np.concatenate(one, axis=1) for one in zip(*found, strict=True)), whose)


def _best(similarity: np.ndarray, where: np.ndarray, move: np.ndarray, whose: np.ndarray) -> Candidates:
    """Of candidates (n, m) the best ones of distinct patients. Of those of each part they are those of the whole."""
    left, patient, chosen, taken = similarity.copy(), whose[where], [], []
    n = np.arange(len(left))
    for _ in range(CANDIDATES):
        best = left.argmax(axis=1)
        chosen.append(best)
        taken.append(left[n, best])
        left[patient == patient[n, best][:, None]] = -1
    at = np.stack(chosen, axis=1)
    return Candidates(np.stack(taken, axis=1), where[n[:, None], at], move[n[:, None], at])


class Nearest(NamedTuple):
    """The nearest training image of each of n images, and the nearest of another patient than that one's, by one rule.

    Attributes:
        similarity: (n, 2) normalised correlation with either; -1 where there is none.
        where: (n, 2) their positions.
        shift: (n, 2) of the nearest, down and to the right, as fractions of the longer side.
        zoom: (n,) its magnification.
        flipped: (n,) whether it is mirrored.
    """

    similarity: np.ndarray
    where: np.ndarray
    shift: np.ndarray
    zoom: np.ndarray
    flipped: np.ndarray

    @property
    def lead(self) -> np.ndarray:
        """(n,) log of the distance to the second over that to the nearest; 0 or more."""
        distance = np.sqrt(np.maximum(1 - self.similarity, 1e-7))
        return np.log(distance[:, 1] / distance[:, 0])


def _nearest(similarity: np.ndarray, found: Candidates, twins: np.ndarray, **moved: np.ndarray) -> Nearest:
    """Order candidates by their similarity (n, k) by some rule; the second is no twin of the nearest."""
    n = np.arange(len(similarity))
    best = similarity.argmax(axis=1)
    others = np.where(twins[n, best], -1.0, similarity)
    second = others.argmax(axis=1)
    return Nearest(
        np.stack([similarity[n, best], others[n, second]], axis=1),
        np.stack([found.where[n, best], found.where[n, second]], axis=1),
        **{name: value[n, best] for name, value in moved.items()},
    )


Measured = dict[str, Nearest]  #: by rule: 'pixels', 'smoothed' and 'registered'


def measure(images: Reduced, train: Reduced, *, keep: Keep = now, own: np.ndarray | None = None) -> Measured:
    """Search, then all rules. Arguments as of :func:`search`."""
    found = search(images, train, keep=keep, own=own)
    rows = _unit_rows(train.coarse[found.where.reshape(-1)]).reshape(*found.where.shape, -1)
    twins = np.einsum("nip,njp->nij", rows, rows) > TWIN  # of itself, too

    def compute() -> dict[str, np.ndarray]:
        where, move = found.where.reshape(-1), found.move.reshape(-1)
        coarse, fine = (np.repeat(one, CANDIDATES, axis=0) for one in (images.coarse, images.fine))
        pairs = registration.fine(fine, train.fine[where], move, images.coarse.shape[1:])._asdict()
        pairs["smoothed"] = registration.smoothed(coarse, train.coarse[where], move)
        return {name: x.reshape(len(images), CANDIDATES, *x.shape[1:]) for name, x in pairs.items()}

    pairs = keep("registered", compute)
    moved = registration.describe(found.move, images.coarse.shape[1:])
    registered = {name: pairs[name] for name in moved}
    rules = {
        "pixels": (found.similarity, moved),
        "smoothed": (pairs["smoothed"], moved),
        "registered": (pairs["similarity"], registered),
    }
    there = found.similarity > -1
    return {name: _nearest(np.where(there, one, -1), found, twins, **how) for name, (one, how) in rules.items()}


def _unit_rows(images: np.ndarray) -> np.ndarray:
    rows = images.reshape(len(images), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


# --- The rule -----------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """What the nearest training image of a copy exceeds, in its lead and in its similarity."""

    lead: float
    similarity: float


def threshold(leads: np.ndarray, patients: np.ndarray, chance: float) -> float:
    """The lead that one more image like these exceeds with this chance; see the module.

    Args:
        leads: (n,) of held-out images.
        patients: (n,) theirs. Images of one patient are alike, so it is patients that count as observations.
        chance: below 1.
    """
    from scipy.stats import f

    return float(np.mean(leads) * f.isf(chance, 2, 2 * len(set(patients.tolist()))))


def calibrate(held_out: Measured, patients: np.ndarray, num_samples: int, alarm: float) -> dict[str, Limit]:
    """The limits of each rule, for as many samples, from held-out images and their patients."""
    chance = alarm / (len(held_out) * max(num_samples, 1))
    return {
        rule: Limit(threshold(one.lead, patients, chance), float(np.quantile(one.similarity[:, 0], LEAST_SIMILAR)))
        for rule, one in held_out.items()
    }


def beyond(one: Nearest, limit: Limit) -> np.ndarray:
    """(n,) whether a rule calls an image a copy."""
    return (one.lead > limit.lead) & (one.similarity[:, 0] > limit.similarity)


def flagged(found: Measured, limits: dict[str, Limit]) -> np.ndarray:
    """(n,) whether one of the rules calls an image a copy."""
    return np.any([beyond(found[rule], limits[rule]) for rule in limits], axis=0)


# --- All of it ----------------------------------------------------------------------------------------------------


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
    from medvdm.evaluation.privacy import spaces

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
        "notes": _notes(samples, of_train, held_out, visits),
    }


def exact_interval(found: int, of: int) -> list[float]:
    """The 95 % interval of a share by Clopper and Pearson (1934)."""
    from scipy.stats import beta

    low = 0.0 if found == 0 else float(beta.ppf(0.025, found, of - found + 1))
    high = 1.0 if found == of else float(beta.ppf(0.975, found + 1, of - found))
    return [low, high]


def under(name: str, keep: Keep) -> Keep:
    """A ``keep`` whose parts are called ``name-...``."""
    return lambda part, compute: keep(f"{name}-{part}", compute)


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


def _notes(samples: Shelf, train: Reduced, held_out: Shelf, visits: float | None) -> list[str]:
    notes = []
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
    for rows in _in_parts(n, PART):

        def compute(rows: np.ndarray = rows) -> dict[str, np.ndarray]:
            i, j = np.nonzero(registration.coarse(samples.coarse[rows], samples.coarse).similarity > near)
            return {"i": rows[i], "j": j}

        pairs = keep(f"clusters-{rows[0]}", compute)
        edges = edges + csr_matrix((np.ones(len(pairs["i"]), bool), (pairs["i"], pairs["j"])), shape=(n, n))
    _, group = connected_components(edges, directed=False)
    sizes = np.bincount(group)
    return {"groups": int((sizes > 1).sum()), "largest": int(sizes.max())}
