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

PART = 512  #: training images that are read at a time
LEAST_HELD_OUT = 20
MOST_QUERIES = 400  #: training images with a second visit that the rule is tried on, and pairs for the curves
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

    def small(self, side: int) -> np.ndarray:
        """All images, small and gray, read in parts: (N, h', w')."""
        parts = [
            registration.small(self.read(np.arange(first, min(first + PART // 4, len(self)))), side)
            for first in range(0, len(self), PART // 4)
        ]
        return np.concatenate(parts)


class Nearest(NamedTuple):
    """The nearest training image of each of n images, and the nearest of another patient than that one's.

    Attributes:
        similarity: (n, 2) normalised correlation with either; -1 where there is none.
        where: (n, 2) their positions.
        move: (n, 2) numbers of the coarse moves.
    """

    similarity: np.ndarray
    where: np.ndarray
    move: np.ndarray

    @property
    def lead(self) -> np.ndarray:
        """(n,) log of the distance to the second over that to the nearest; 0 or more."""
        distance = np.sqrt(np.maximum(1 - self.similarity, 1e-7))
        return np.log(distance[:, 1] / distance[:, 0])


# --- The search ---------------------------------------------------------------------------------------------------


def search(images: np.ndarray, train: Shelf, *, keep: Keep = now, own: np.ndarray | None = None) -> Nearest:
    """Compare small images (n, h, w) with all training images, read part by part.

    Args:
        images: from :meth:`Shelf.small` with 32 pixels.
        train: the training images.
        keep: keeps what each part has found.
        own: (n,) where the images are training images, their positions, which are left out.
    """
    found = []
    for first in range(0, len(train), PART):
        rows = np.arange(first, min(first + PART, len(train)))

        def compute(rows: np.ndarray = rows) -> dict[str, np.ndarray]:
            part = registration.small(train.read(rows), COARSE)
            similarity, move = registration.coarse(images, part)
            if own is not None:
                similarity[own[:, None] == rows] = -1
            return _two_best(similarity, np.tile(rows, (len(images), 1)), move, train.patients)._asdict()

        found.append(Nearest(**keep(f"part-{first}", compute)))
    return _two_best(*(np.concatenate(one, axis=1) for one in zip(*found, strict=True)), train.patients)


def _two_best(similarity: np.ndarray, where: np.ndarray, move: np.ndarray, patients: np.ndarray) -> Nearest:
    """Of candidates (n, m): the best, and the best of another patient. Of two of each part it is that of the whole."""
    n = np.arange(len(similarity))
    best = similarity.argmax(axis=1)
    whose = patients[where]
    others = np.where(whose == whose[n, best][:, None], -1.0, similarity)
    chosen = np.stack([best, others.argmax(axis=1)], axis=1)
    taken = np.stack([similarity[n, best], others[n, chosen[:, 1]]], axis=1)
    return Nearest(taken, where[n[:, None], chosen], move[n[:, None], chosen])


class Registered(NamedTuple):
    """Both candidates of each image after registration; ``nearest`` may have changed their order."""

    nearest: Nearest
    shift: np.ndarray
    zoom: np.ndarray
    flipped: np.ndarray


def register(images: Shelf, train: Shelf, found: Nearest, *, keep: Keep = now) -> Registered:
    """The two candidates of :func:`search`, once more on images of 64 pixels."""

    def compute() -> dict[str, np.ndarray]:
        rows, back = np.unique(found.where, return_inverse=True)
        theirs = train.take(rows).small(FINE)[back.reshape(-1)]
        ours = np.repeat(images.small(FINE), 2, axis=0)
        coarse_side = min(COARSE, max(ours.shape[1:]))
        fine = registration.fine(ours, theirs, found.move.reshape(-1), coarse_side)
        return {name: value.reshape(len(images), 2, *value.shape[1:]) for name, value in fine._asdict().items()}

    fine = keep("registered", compute)
    similarity = np.where(found.similarity > -1, fine["similarity"], -1)
    order = np.argsort(-similarity, axis=1)
    turned = {name: np.take_along_axis(fine[name], order, axis=1) for name in ("zoom", "flipped")}
    nearest = Nearest(*(np.take_along_axis(one, order, axis=1) for one in (similarity, found.where, found.move)))
    return Registered(nearest, np.take_along_axis(fine["shift"], order[..., None], axis=1), **turned)


# --- The rule -----------------------------------------------------------------------------------------------------


def threshold(leads: np.ndarray, chance: float) -> float:
    """The lead that one more image like these exceeds with this chance; see the module."""
    from scipy.stats import f

    return float(np.mean(leads) * f.ppf(1 - chance, 2, 2 * len(leads)))


def dimension(leads: np.ndarray) -> float:
    """D of the module: 1 over the mean lead."""
    return float(1 / np.mean(leads))


class Measured(NamedTuple):
    """A set of images by both rules."""

    coarse: Nearest
    fine: Registered

    @property
    def leads(self) -> dict[str, np.ndarray]:
        """(n,) by the name of the rule."""
        return {"pixels": self.coarse.lead, "registered": self.fine.nearest.lead}

    def flagged(self, thresholds: dict[str, float]) -> np.ndarray:
        """(n,) whether one of the rules calls an image a copy."""
        return np.any([self.leads[name] > thresholds[name] for name in thresholds], axis=0)


def measure(images: Shelf, train: Shelf, *, keep: Keep = now, own: np.ndarray | None = None) -> Measured:
    """Search and registration of a set of images."""
    coarse = search(images.small(COARSE), train, keep=keep, own=own)
    return Measured(coarse, register(images, train, coarse, keep=keep))


def calibrate(held_out: Measured, num_samples: int, alarm: float) -> dict[str, float]:
    """The threshold of each rule, for as many samples."""
    return {name: threshold(leads, alarm / 2 / max(num_samples, 1)) for name, leads in held_out.leads.items()}


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
        * ``copies``: of each ``sample``, ``training_image``, ``patient``, ``rule`` ('pixels' or 'registered'),
          ``score`` (its lead) and ``threshold``, ``similarity``, ``second`` (the nearest image of another patient) and
          ``second_similarity``, ``shift`` (fractions of the side), ``zoom``, ``flipped``; the surest first;
        * ``false_alarm_rate`` of the held-out images by the same rule, and ``false_alarm_interval`` (95 %, exact);
        * ``threshold`` and ``spaces``, by rule and in further spaces: see :func:`_space`;
        * ``visits``: the share of training images whose second visit the rule finds when they are left out themselves;
          None where no patient has two;
        * ``clusters``: samples that are as near to one another as copies;
        * ``notes``: what was lost, and why.

    Raises:
        InputError: images of different shapes or not finite, patients or pictures on both sides, or too few held-out
            images.
    """
    from medvdm.evaluation.privacy import spaces

    _check(samples, train, held_out)
    notes = _notes(samples, train)
    of_held_out = measure(held_out, train, keep=_under("held-out", keep))
    _check_twins(of_held_out, held_out, train)
    of_samples = measure(samples, train, keep=_under("samples", keep))
    thresholds = calibrate(of_held_out, len(samples), alarm)
    copies = _copies(of_samples, samples, train, thresholds)
    alarms = of_held_out.flagged(thresholds)
    visits = _visits(train, thresholds, keep, seed)
    if visits is None:
        notes.append(
            "no training patient has two images: how often the rule would find a patient on another day is not known"
        )
    return {
        "num_samples": len(samples),
        "num_train": len(train),
        "num_held_out": len(held_out),
        "num_copies": len(copies),
        "copies": copies,
        "alarm": alarm,
        "false_alarm_rate": float(alarms.mean()),
        "false_alarm_interval": exact_interval(int(alarms.sum()), len(alarms)),
        "threshold": thresholds,
        "visits": visits,
        "spaces": spaces.summary(samples, train, held_out, of_samples, of_held_out, keep=keep, seed=seed),
        "clusters": _clusters(samples, of_samples, of_held_out, keep),
        "notes": notes,
    }


def exact_interval(found: int, of: int) -> list[float]:
    """The 95 % interval of a share by Clopper and Pearson (1934)."""
    from scipy.stats import beta

    low = 0.0 if found == 0 else float(beta.ppf(0.025, found, of - found + 1))
    high = 1.0 if found == of else float(beta.ppf(0.975, found + 1, of - found))
    return [low, high]


def _under(name: str, keep: Keep) -> Keep:
    return lambda part, compute: keep(f"{name}-{part}", compute)


def _check(samples: Shelf, train: Shelf, held_out: Shelf) -> None:
    shapes = {}
    for name, shelf in (("samples", samples), ("train", train), ("held_out", held_out)):
        if not len(shelf):
            raise InputError(f"{name}: no image; expected at least one")
        first = shelf.read(np.arange(1))
        shapes[name] = first.shape[1:]
        if not np.isfinite(first).all():
            raise InputError(f"{name}: {shelf.names[0]} has values that are not finite; expected gray values in [0, 1]")
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


def _check_twins(found: Measured, held_out: Shelf, train: Shelf) -> None:
    """Refuse held-out pictures that are training images."""
    similarity, where, _ = found.coarse
    twins = [i for i in np.flatnonzero(similarity[:, 0] > SAME) if _same(held_out, i, train, where[i, 0])]
    if twins:
        name, other = held_out.names[twins[0]], train.names[where[twins[0], 0]]
        raise InputError(
            f"held_out: {name} is the same picture as the training image {other} ({len(twins)} such pictures); "
            "expected none of the training images"
        )


def _same(a: Shelf, i: int, b: Shelf, j: int) -> bool:
    return bool(np.array_equal(a.read(np.array([i])), b.read(np.array([j]))))


def _notes(samples: Shelf, train: Shelf) -> list[str]:
    notes = []
    if len(samples) < 100:
        notes.append(f"only {len(samples)} samples: what a model copies once in a hundred draws is hardly seen")
    if len(set(train.patients)) == len(train):
        notes.append("every training image is of a patient of its own: second images of a patient would hide a copy")
    return notes


def _copies(found: Measured, samples: Shelf, train: Shelf, thresholds: dict[str, float]) -> list[dict[str, Any]]:
    out = []
    for i in np.flatnonzero(found.flagged(thresholds)):
        surest = max(thresholds, key=lambda name: found.leads[name][i] / thresholds[name])
        nearest = found.coarse if surest == "pixels" else found.fine.nearest
        out.append(
            {
                "sample": samples.names[i],
                "training_image": train.names[nearest.where[i, 0]],
                "patient": str(train.patients[nearest.where[i, 0]]),
                "rule": surest,
                "score": float(found.leads[surest][i]),
                "threshold": thresholds[surest],
                "similarity": float(nearest.similarity[i, 0]),
                "second": train.names[nearest.where[i, 1]],
                "second_similarity": float(nearest.similarity[i, 1]),
                "shift": [float(v) for v in found.fine.shift[i, 0]],
                "zoom": float(found.fine.zoom[i, 0]),
                "flipped": bool(found.fine.flipped[i, 0]),
            }
        )
    return sorted(out, key=lambda one: one["threshold"] - one["score"])


def _visits(train: Shelf, thresholds: dict[str, float], keep: Keep, seed: int) -> float | None:
    """The share of training images, each left out once, whose patient the rule finds by another image."""
    _, whose, count = np.unique(train.patients, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[whose] > 1)
    if not len(rows):
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_QUERIES])
    found = measure(train.take(rows), train, keep=_under("visits", keep), own=rows)
    right = [
        (leads > thresholds[name]) & (train.patients[nearest.where[:, 0]] == train.patients[rows])
        for (name, leads), nearest in zip(found.leads.items(), (found.coarse, found.fine.nearest), strict=True)
    ]
    return float(np.any(right, axis=0).mean())


def _clusters(samples: Shelf, found: Measured, held_out: Measured, keep: Keep) -> dict[str, int]:
    """Groups of samples that are nearer to one another than 99 % of held-out images come to a training image.

    A second sign (Carlini et al., 2023): what is memorised is drawn again and again. Blurred samples are alike, too, so
    this alone is no alarm.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    near = float(np.quantile(held_out.coarse.similarity[:, 0], 0.99))

    def compute() -> dict[str, np.ndarray]:
        images = samples.small(COARSE)
        rows, columns = [], []
        for first in range(0, len(images), PART):
            similarity = registration.coarse(images[first : first + PART], images).similarity
            i, j = np.nonzero(similarity > near)
            rows.append(i + first)
            columns.append(j)
        return {"rows": np.concatenate(rows), "columns": np.concatenate(columns)}

    pairs = keep("clusters", compute)
    apart = pairs["rows"] != pairs["columns"]
    edges = csr_matrix(
        (np.ones(apart.sum()), (pairs["rows"][apart], pairs["columns"][apart])), shape=(len(samples), len(samples))
    )
    _, group = connected_components(edges, directed=False)
    sizes = np.bincount(group)
    return {"groups": int((sizes > 1).sum()), "largest": int(sizes.max())}
