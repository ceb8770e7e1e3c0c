r"""How images use the 256 gray levels that an 8-bit likelihood knows: what was rounded, and what never occurs.

Levels that never occur lower the bits per dimension for a wrong reason. After a histogram was equalised, stretched or
bent by a curve, or where few bits were scaled up to eight, pixels sit on some levels and never on those between. A
model that learns which is :math:`\log_2` of their distance better per pixel, and knows no more of X-rays.

Which levels are missing, and not only unused by chance: all between two neighbouring used levels a < b, if

.. math::
    \min(n_a, n_b) \ge n

A histogram without gaps expects about as many in between, and a Poisson number of mean n is 0 with probability
:math:`e^{-n}`. For the whole set, :math:`n_a` counts images that hold level a, since pixels of one image
are not independent, with n = 20. For one image it counts pixels that differ from the one above and the one to the left,
with n = 5: a flat patch, or the copies of a pixel in an enlarged image, count once.

What they save at most: each used level takes half of the missing levels on either side of it, :math:`g_a` together,
and its pixels would be spread over them. In bits per pixel,

.. math::
    \frac{1}{N} \sum_a m_a \log_2 (1 + g_a)

:math:`m_a` is the number of pixels of level a, but at most that of the level across the gap: the black of a border,
far below the tissue, is one level more and no comb. Every second level of an even histogram saves one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medvdm.images import to_levels

LEVELS = 256
IMAGES_EXPECTED = 20  # a level of a set without gaps is in none of them with probability e^-20
PIXELS_EXPECTED = 5  # e^-5 for a level of an image, which over many images saves far less than IMAGE_BITS
SET_BITS = 0.005  # less vanishes in two digits of bits per dimension
IMAGE_BITS = 0.01  # mean over the images; NIH, PneumoniaMNIST and phantoms have at most 0.002, enlarged or not
ONE_IMAGE_BITS = 0.05  # from here on an image counts as one with gaps
LITTLE = 0.25  # of the 256 levels; less contrast is noted
MOST_IMAGES, MOST_PIXELS = 1000, 2**26  # that are looked at, but 64 images at least
_BETWEEN = 1e-3  # of a level: 16 bits are 1/257 off or more, float32 of 8 bits 2e-5 or less
_BLOCK = 16


@dataclass(frozen=True)
class Gaps:
    """Levels that are missing in one histogram.

    Attributes:
        missing: number of levels between the least and the greatest used one that are missing.
        between: number of levels between those two.
        bits: what they save at most, in bits per pixel.
    """

    missing: int
    between: int
    bits: float


@dataclass(frozen=True, kw_only=True)
class LevelUse:
    """What the images of a set make of 256 gray levels.

    Attributes:
        images: number of images that were looked at.
        of: number of images that there are.
        rounded: share of pixels whose gray value lay between two levels.
        rounded_from: why, see :class:`medvdm.data.Reading`.
        pixels: (256,) number of pixels of each level, all channels together.
        distinct_per_image: median number of different levels in an image (in a channel of it).
        gaps: of all images together.
        image_gaps: of each image, or of each channel of it.
    """

    images: int
    of: int
    rounded: float
    rounded_from: tuple[str, ...]
    pixels: np.ndarray
    distinct_per_image: float
    gaps: Gaps
    image_gaps: tuple[Gaps, ...]

    @property
    def distinct(self) -> int:
        """Number of levels that occur."""
        return int((self.pixels > 0).sum())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of bits per dimension should know of these gray values, one line each."""
        whose = "" if self.images == self.of else f" (a sample of {self.images:,} of {self.of:,} images)"
        found = (self._rounding_note(), self._range_note(), self._gap_note(), self._image_gap_note())
        return tuple(note + whose for note in found if note is not None)

    def _rounding_note(self) -> str | None:
        if not self.rounded:
            return None
        why = f" ({'; '.join(self.rounded_from)})" if self.rounded_from else ""
        share = f"{self.rounded:.0%}" if self.rounded >= 0.005 else "less than 1%"
        return (
            f"gray values are rounded to 256 levels for an 8-bit likelihood{why}: "
            f"{share} of the pixels lay between two levels"
        )

    def _range_note(self) -> str | None:
        below = np.cumsum(self.pixels) / self.pixels.sum()
        low, high = (int(level) for level in np.searchsorted(below, (0.0005, 0.9995)))
        if high + 1 - low > LITTLE * LEVELS:
            return None
        return (
            f"99.9% of the pixels lie from gray level {low} to {high} of 255: with so little contrast the bits per "
            "dimension are low"
        )

    def _gap_note(self) -> str | None:
        if self.gaps.bits < SET_BITS:
            return None
        used = np.flatnonzero(self.pixels)
        return (
            f"{self.gaps.missing} of {self.gaps.between} gray levels between {used[0]} and {used[-1]} never occur: the "
            f"bits per dimension are up to {self.gaps.bits:.2f} lower for that reason"
        )

    def _image_gap_note(self) -> str | None:
        bits = float(np.mean([gaps.bits for gaps in self.image_gaps]))
        combs = [gaps for gaps in self.image_gaps if gaps.bits >= ONE_IMAGE_BITS]
        if not combs or bits < IMAGE_BITS or bits - self.gaps.bits < IMAGE_BITS:  # or those of the set say it all
            return None
        missing, between = np.median([(gaps.missing, gaps.between) for gaps in combs], axis=0)
        return (
            f"{len(combs) / len(self.image_gaps):.0%} of the images have gaps of their own in the gray levels (in the "
            f"median one of them {missing:.0f} of {between:.0f} levels within its range are missing), as after "
            "equalising or stretching image by image: the bits per dimension are up to "
            f"{bits:.2f} lower for that reason"
        )


def level_use(
    reader: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, rounded_from: Sequence[str] = ()
) -> LevelUse:
    """Look at the gray levels of images, of at most MOST_IMAGES evenly spread ones.

    Args:
        reader: maps integer positions to images (n, h, w, c), uint8 or float in [0, 1].
        positions: of the images, at least one.
        rounded_from: why their values may lie between two levels.

    Raises: as :func:`medvdm.images.to_levels`.
    """
    size = int(np.prod(reader(positions[:1]).shape))
    most = min(len(positions), MOST_IMAGES, max(64, MOST_PIXELS // size))
    looked_at = positions[np.linspace(0, len(positions) - 1, most).astype(int)]
    pixels, holding = np.zeros(LEVELS, np.int64), np.zeros(LEVELS, np.int64)
    between, total = 0, 0
    distinct: list[int] = []
    image_gaps: list[Gaps] = []
    for images in _blocks(reader, looked_at):
        total += images.size
        between += _between_levels(images)
        levels = to_levels(images)
        for image in levels:
            planes = np.moveaxis(image, -1, 0)
            counts = [_histogram(plane) for plane in planes]
            pixels += np.sum(counts, axis=0)
            holding += np.any(counts, axis=0)
            distinct += [int((count > 0).sum()) for count in counts]
            image_gaps += [
                find_gaps(count, _histogram(plane[_fresh(plane)]), PIXELS_EXPECTED)
                for plane, count in zip(planes, counts, strict=True)
            ]
    return LevelUse(
        images=most,
        of=len(positions),
        rounded=between / total,
        rounded_from=tuple(rounded_from),
        pixels=pixels,
        distinct_per_image=float(np.median(distinct)),
        gaps=find_gaps(pixels, holding, IMAGES_EXPECTED),
        image_gaps=tuple(image_gaps),
    )


def find_gaps(pixels: np.ndarray, counts: np.ndarray, expected: int) -> Gaps:
    """The levels that are missing in a histogram, by the rule of :mod:`medvdm.data.levels`.

    Args:
        pixels: (256,) number of pixels of each level.
        counts: (256,) what is held against ``expected``: images that hold the level, or pixels; 0 where ``pixels`` is.
        expected: so many on either side make an empty level a missing one.
    """
    used = np.flatnonzero(pixels)
    if len(used) < 2:
        return Gaps(0, 0, 0.0)
    width = np.diff(used) - 1
    left, right = used[:-1], used[1:]
    sure = (width > 0) & (np.minimum(counts[left], counts[right]) >= expected)
    width = np.where(sure, width, 0)
    across = np.where(sure, np.minimum(pixels[left], pixels[right]), 0)
    around = (np.append(width, 0) + np.insert(width, 0, 0)) / 2
    spread = np.maximum(np.append(across, 0), np.insert(across, 0, 0))  # at most the pixels of the level itself
    bits = float((spread * np.log2(1 + around)).sum() / pixels.sum())
    return Gaps(int(width.sum()), int(used[-1] - used[0] - 1), bits)


def _blocks(reader: Callable[[np.ndarray], np.ndarray], positions: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(positions), _BLOCK):
        yield reader(positions[first : first + _BLOCK])


def _histogram(levels: np.ndarray) -> np.ndarray:
    return np.bincount(levels.ravel(), minlength=LEVELS)


def _fresh(plane: np.ndarray) -> np.ndarray:
    """Where a pixel of (h, w) differs from the one above and from the one to the left."""
    fresh = np.ones(plane.shape, bool)
    fresh[1:] &= plane[1:] != plane[:-1]
    fresh[:, 1:] &= plane[:, 1:] != plane[:, :-1]
    return fresh


def _between_levels(images: np.ndarray) -> int:
    """Number of values that are no multiple of 1/255."""
    if images.dtype == np.uint8:
        return 0
    scaled = np.multiply(images, 255, dtype=np.float64)
    return int((np.abs(scaled - np.rint(scaled)) > _BETWEEN).sum())
