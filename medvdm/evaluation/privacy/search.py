r"""The nearest training image of an image, how much nearer it is than the second, and the rule that follows.

A distance alone deceives. X-rays of different patients correlate up to 0.95, and a blurred sample is nearer to *every*
training image than a sharp X-ray of somebody else is. So each image is asked for two distances
(:mod:`medvdm.evaluation.privacy.registration`): :math:`r_1` to its nearest training image, and :math:`r_2` to the
nearest one of *another* patient. Where training images lie around with a smooth density in D dimensions, the number of
them within a radius grows as :math:`r^D`, and for an image that copies none of them

.. math:: P(r_1 / r_2 \le q) = q^D, \qquad \log(r_2 / r_1) \sim \text{Exponential}(D)

(Facco et al., 2017, who estimate D so). Held-out images of other patients give D: with the mean s of their n
*leads* :math:`\log(r_2 / r_1)`, the lead of one more such image over s follows F(2, 2n). A sample is called a copy
where its lead is above

.. math:: s \; F^{-1}_{2, 2n}\!\left(1 - \frac{a}{3m}\right)

by one of three rules, so that among m samples of a model that copies nothing any is called with a chance of at most a
(n counts patients, as the images of one are alike). The rules differ in what disturbs them least: ``pixels`` (images of
32 pixels as they lie, shifted and mirrored at most) a bent gray scale, ``smoothed`` (the same, blurred) noise and blur,
``registered`` (64 pixels, laid over each other) shifts by a part of a pixel and zoom.

And the similarity to the nearest must be above that of 99 % of the held-out images to theirs, by the same rule. This
costs no copies, and clears an image that stands alone with one training image, such as the only other lateral view: its
lead is great although the two are not alike. It is not the greatest similarity, since one unnoticed second image of a
training patient among the held-out ones would then hide every copy.

Two training images that correlate above 0.999 as they lie are one picture under two names, and neither is the other's
second. More than three such names are not seen through.

Not found: a copy of a part of an image, one that is changed beyond this (zoomed by 10 %, turned, blurred by a thirtieth
of the side, under much noise), and the person in another image (``visits`` says how seldom). Where second images of a
patient go by another name, they hide a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from medvdm.data import ImageData
from medvdm.errors import InputError
from medvdm.evaluation.privacy import registration
from medvdm.evaluation.privacy.registration import COARSE, FINE

READ = 128  #: images that are read at a time
ASKED = 2048  #: images that are searched for at a time
PART = 512  #: training images that are compared, and whose result is kept, at a time
CANDIDATES = 4  #: training images per image that are registered, of distinct patients
LEAST_SIMILAR = 0.99  #: a copy is more similar to its training image than this share of held-out images to theirs
TWIN = 0.999  #: correlation as they lie, above which two training images of different patients are one picture

#: Gives the arrays of a part, by its name: those kept from before, or computed now.
Keep = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


def now(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Keeps nothing."""
    return compute()


def under(name: str, keep: Keep) -> Keep:
    """A ``keep`` whose parts are called ``name-...``."""
    return lambda part, compute: keep(f"{name}-{part}", compute)


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
    """All images of a shelf, small and gray, as the search needs them: about 10 KB per image.

    Attributes:
        coarse: (N, h, w) float16, at most 32 pixels a side.
        fine: (N, H, W) float16, at most 64.
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
        small = {"coarse": registration.small(images, COARSE), "fine": registration.small(images, FINE)}
        return {size: x.astype(np.float16) for size, x in small.items()}  # exact to a sixteenth of a gray level

    parts = [keep(f"{name}-small-{rows[0]}", lambda rows=rows: compute(rows)) for rows in in_parts(len(shelf), READ)]
    coarse, fine = (np.concatenate([part[size] for part in parts]) for size in ("coarse", "fine"))
    return Reduced(coarse, fine, shelf.patients, shelf.names)


def in_parts(n: int, size: int) -> list[np.ndarray]:
    """Positions 0 to n - 1, so many at a time."""
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
    for rows in in_parts(len(train), PART):

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
    """Search, then all rules, for :data:`ASKED` images at a time. Arguments as of :func:`search`."""
    some = [
        _measure(images.take(rows), train, under(f"from-{rows[0]}", keep), None if own is None else own[rows])
        for rows in in_parts(len(images), ASKED)
    ]
    return {
        rule: Nearest(*(np.concatenate(field) for field in zip(*(one[rule] for one in some), strict=True)))
        for rule in some[0]
    }


def _measure(images: Reduced, train: Reduced, keep: Keep, own: np.ndarray | None) -> Measured:
    found = search(images, train, keep=keep, own=own)
    rows = registration.standardised(train.coarse[found.where.reshape(-1)]).reshape(*found.where.shape, -1)
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
