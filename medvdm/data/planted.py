r"""What a privacy audit needs of the training images: some that are withheld, and canaries that are planted.

A model may remember a *picture* or know a *person*. To tell the two apart, :func:`withhold` leaves one image of each
of some training patients out: the model has met the person on another day and never this picture.

A canary is a synthetic X-ray with a secret that the audit knows and nothing else can predict: 8 of the 16 cells of a
4 x 4 grid hold a bright disc. There are :math:`\binom{16}{8} = 12{,}870` secrets, 13.7 bits. A model that gives the
planted secret a smaller loss than the others has memorised it. Planted secret and references are distinct draws
without replacement, so for a model that has learnt nothing of it, the rank of the planted one is exactly uniform.

Base and discs are whole gray levels that never add up to more than 255. All cells have one shape, so every secret has
the same gray values outside the discs, as many discs and the same sum, to the last level.

Source: Carlini, Liu, Erlingsson, Kos and Song, "The Secret Sharer: Evaluating and Testing Unintended Memorization in
Neural Networks" (2019).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from medvdm.data import content
from medvdm.data.base import ImageData
from medvdm.errors import DataError, InputError

if TYPE_CHECKING:
    from medvdm.data import DataConfig

GRID, FILLED = 4, 8  # cells a side of the grid, and how many of all cells hold a disc
SECRETS = 12_870  #: number of secrets, 16 choose 8
STRENGTH = 64  # gray levels that a disc adds in its middle; the base has the others
DRAWING = 1  # enters the fingerprint; to be raised by whoever changes what is drawn
MOST_CANARIES = MOST_COPIES = 1000

_LEAST_CELL = 4  # pixels a side: a disc of fewer is a dot
_WITHHELD_STREAM, _CANARY_STREAM = 0, 1
_WITHHELD = "withheld for a privacy audit"  # begins the note, and is the reason in the reading
_ID = re.compile(r"canary-\d+-copy-\d+")


def apply(data: ImageData, config: DataConfig) -> ImageData:
    """What :func:`medvdm.data.load` does after reading: :func:`withhold` first, then :func:`plant`."""
    if config.withhold:
        data, _ = withhold(data, config.withhold, config.data_seed)
    return plant(data, config.canaries, config.canary_copies, config.data_seed) if config.canaries else data


def check_given(data: ImageData, config: DataConfig) -> None:
    """Refuse settings that images given from Python do not have: nothing is withheld from them, or planted, later.

    Raises:
        InputError: ``withhold`` or ``canaries`` that were not applied to ``data``.
    """
    there = len(np.unique(data.patients[is_canary(data)]))
    if config.canaries not in (0, there):
        raise InputError(
            f"canaries: {config.canaries}, and the images given from Python have {there}; expected "
            "medvdm.data.planted.plant(data, ...) before, or canaries=0"
        )
    if config.withhold and not any(note.startswith(_WITHHELD) for note in data.notes):
        raise InputError(
            f"withhold: {config.withhold}, and all images are given from Python; expected "
            "medvdm.data.planted.withhold(data, ...) before, or withhold=0"
        )


# --- Images of people that the model knows from another day --------------------------------------------------------


def withhold(data: ImageData, number: int, seed: int = 0) -> tuple[ImageData, np.ndarray]:
    """Leave out one image of each of some training patients who have two or more.

    Args:
        data: the images.
        number: of patients, 1 or more; all that have two training images, if they are fewer.
        seed: 0 or more; which patients, and which image of each.

    Returns:
        The data without these images, with a note, and the positions (n,) in ``data`` of what was left out, in rising
        order. Where no training patient has two images, nothing is left out and the note says so.

    Raises:
        InputError: a number below 1 or a negative seed.
    """
    if number < 1:
        raise InputError(f"withhold: {number}; expected 1 or more patients")
    _check_seed(seed)
    train = np.flatnonzero(data.splits == "train")
    people, images_of = np.unique(data.patients[train], return_counts=True)
    able = people[images_of >= 2]
    rng = np.random.default_rng([seed, _WITHHELD_STREAM])
    chosen = rng.permutation(able)[:number]
    left_out = np.array([rng.choice(train[data.patients[train] == person]) for person in chosen], np.int64)
    left_out.sort()
    few = f" ({number:,} asked for; {len(able):,} have two)" if len(able) < number else ""
    note = f"{_WITHHELD}: {len(left_out):,} images of as many training patients{few}"
    if not len(able):
        note = f"{_WITHHELD}: nothing, for no training patient has two images; people and pictures cannot be told apart"
    reading = data.reading
    if reading is not None and len(left_out):
        skipped = {**reading.skipped, _WITHHELD: len(left_out)}
        reading = replace(reading, read=reading.read - len(left_out), skipped=skipped)
    kept = take(data, np.setdiff1d(np.arange(len(data)), left_out))
    return replace(kept, notes=(*data.notes, note), reading=reading), left_out


def withheld(config: DataConfig) -> ImageData:
    """The images that ``config`` leaves out of its data, of patients whom its training images show on another day.

    Raises:
        InputError: a config that withholds nothing.
        DataError: no training patient has two images.
        MedvdmError: as :func:`medvdm.data.load`.
    """
    from medvdm import data as data_

    if not config.withhold:
        raise InputError("withhold: 0; expected a config that withholds images")
    everything = data_.load(replace(config, withhold=0, canaries=0, canary_copies="1"))
    _, left_out = withhold(everything, config.withhold, config.data_seed)
    if not len(left_out):
        raise DataError(f"{everything.name}: no training patient has two images; expected some to withhold one of")
    return take(everything, left_out)


def take(data: ImageData, rows: np.ndarray) -> ImageData:
    """The images at some positions (n,), each with its name, labels, patient, split and digest."""
    rows, of_all = np.asarray(rows, np.int64), data.digests

    def of_rows() -> tuple[bytes, ...]:
        digests = of_all()
        return tuple(digests[i] for i in rows)

    return replace(
        data,
        ids=tuple(data.ids[i] for i in rows),
        labels=data.labels[rows],
        patients=data.patients[rows],
        splits=data.splits[rows],
        reader=lambda indices: data.reader(rows[indices]),
        digests=of_rows if of_all is not None else None,
    )


# --- Canaries ------------------------------------------------------------------------------------------------------


def canary(number: int, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """A canary: a generated X-ray of a patient of its own, with its secret.

    Args:
        number: which, 0 or more.
        shape: (h, w, c), at least 16 x 16 pixels and at most 1024 x 1024; all channels are the same.
        seed: 0 or more; another seed is another patient and another secret.

    Returns:
        (h, w, c) uint8, gray levels; divided by 255 for a model of values in [0, 1].

    Raises:
        InputError: a negative number or seed, or a shape outside these ranges.
    """
    return _canaries(np.array([number]), shape, seed)[0]


def references(number: int, num: int, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """The same X-ray as :func:`canary` with other secrets, all different and none the planted one.

    Args:
        number, shape, seed: as of :func:`canary`.
        num: how many, 1 to 12,869. More of the same canary begin with those of fewer.

    Returns:
        (num, h, w, c) uint8.

    Raises:
        InputError: a num outside this range, and as :func:`canary`.
    """
    if not 1 <= num < SECRETS:
        raise InputError(f"num: {num}; expected 1 to {SECRETS - 1:,}, the number of other secrets")
    base = _bases(np.array([number]), shape, seed)
    return base + _discs(_secret_numbers(number, seed)[1 : num + 1], shape)


def secret(number: int, seed: int = 0) -> np.ndarray:
    """The secret of a canary: (4, 4) bool, row by row from the top, true in the 8 cells that hold a disc.

    Raises:
        InputError: a negative number or seed.
    """
    return _patterns()[_secret_numbers(number, seed)[0]]


def copies_of(number: int, copies: str) -> np.ndarray:
    """How often each canary is planted: (number,) int, canary i the i-th of ``copies``, over and over.

    Args:
        number: of canaries, 0 to 1000.
        copies: integers from 1 to 1000 with commas between them, such as '1,2,4'.

    Raises:
        InputError: values outside these ranges.
    """
    if not 0 <= number <= MOST_CANARIES:
        raise InputError(f"canaries: {number}; expected 0 to {MOST_CANARIES}")
    words = [word.strip() for word in copies.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 9 and 1 <= int(word) <= MOST_COPIES):
            raise InputError(f"canary_copies: '{copies}'; expected integers from 1 to {MOST_COPIES} such as '1,2,4'")
    return np.resize(np.array([int(word) for word in words]), number)


def plant(data: ImageData, number: int, copies: str = "1", seed: int = 0) -> ImageData:
    """Add canaries to the training images.

    Copy 2 of canary 3 has the id 'canary-003-copy-02' (canaries count from 0, copies from 1); all copies are of the
    patient 'canary 3'. A canary carries no class. Its gray values are levels of 256, as stored in 8 bits.

    Args:
        data: the images; none of them is changed.
        number: of canaries, 1 to 1000.
        copies: how often each is added, see :func:`copies_of`.
        seed: as of :func:`canary`.

    Returns:
        The data with the canaries at the end of the training split, and with a note that says so.

    Raises:
        InputError: values outside these ranges, or images too small for the grid, see :func:`canary`.
        DataError: the data have these canaries already.
    """
    times = copies_of(number, copies)
    if not number:
        raise InputError("canaries: 0; expected at least 1 to plant")
    _check_shape(data.image_shape)
    _check_seed(seed)
    n, which = len(data), np.repeat(np.arange(number), times)
    copy = np.concatenate([np.arange(1, k + 1) for k in times])
    note = (
        f"not a model to publish: {_counted(number, 'canary', 'canaries')} in {_counted(len(which), 'copy', 'copies')} "
        "planted in the training images, synthetic X-rays with a secret that show what the model memorises"
    )
    lock = threading.Lock()
    drawn: list[np.ndarray] = []

    def canaries(positions: np.ndarray) -> np.ndarray:
        with lock:  # drawn at the first read; two threads that read first would both draw
            if not drawn:
                drawn.append(_canaries(np.arange(number), data.image_shape, seed))
        return drawn[0][which[positions]]

    def read(indices: np.ndarray) -> np.ndarray:
        added = indices >= n
        if not added.any():
            return data.reader(indices)
        if added.all():
            return canaries(indices - n)
        own, levels = data.reader(indices[~added]), canaries(indices[added] - n)
        out = np.empty((len(indices), *data.image_shape), own.dtype)
        out[~added] = own
        out[added] = levels if own.dtype == np.uint8 else levels.astype(np.float32) / np.float32(255)
        return out

    return replace(
        data,
        ids=(*data.ids, *(f"canary-{i:03d}-copy-{j:02d}" for i, j in zip(which, copy, strict=True))),
        labels=np.concatenate([data.labels, np.zeros((len(which), data.labels.shape[1]), np.uint8)]),
        patients=np.concatenate([data.patients, [f"canary {i}" for i in which]]),
        splits=np.concatenate([data.splits, np.full(len(which), "train")]),
        reader=read,
        notes=(*data.notes, note),
        digests=lambda: (*_digests(data), *(_canary_digest(i, data.image_shape, seed) for i in which)),
    )


def is_canary(data: ImageData) -> np.ndarray:
    """Which images are planted canaries: (N,) bool."""
    return np.array([_ID.fullmatch(name) is not None for name in data.ids], bool)


def _canaries(numbers: np.ndarray, shape: Sequence[int], seed: int) -> np.ndarray:
    """Several canaries: (n, h, w, c) uint8."""
    bases = _bases(numbers, shape, seed)
    return bases + _discs(np.array([_secret_numbers(int(number), seed)[0] for number in numbers]), shape)


def _bases(numbers: np.ndarray, shape: Sequence[int], seed: int) -> np.ndarray:
    """The X-rays under the secrets: (n, h, w, c) uint8, from 0 to 255 - STRENGTH, without opacities of their own."""
    from medvdm.data import phantom

    _check_shape(shape)
    height, width, channels = shape
    # A phantom's patient from the second billion on, whom no data set of phantoms reaches, whatever its seed.
    patients = np.array([_generator(int(number), seed, 0).integers(2**30, 2**31) for number in numbers])
    side = max(height, width)
    healthy = {"num_opacities": np.zeros(len(numbers), np.int64)}
    drawn, _ = phantom.render(phantom.VISITS * patients, size=side, changes=healthy)
    top, left = (side - height) // 2, (side - width) // 2
    drawn = drawn[:, top : top + height, left : left + width]
    levels = np.floor(drawn * np.float64(255 - STRENGTH) + 0.5).astype(np.uint8)
    return np.repeat(levels, channels, axis=-1)


def _check_shape(shape: Sequence[int]) -> None:
    from medvdm.data import phantom

    height, width, _ = shape
    least, most = GRID * _LEAST_CELL, phantom.MAX_SIZE
    if min(height, width) < least or max(height, width) > most:
        raise InputError(
            f"canaries: images of {height} x {width} pixels; expected {least} to {most} a side for the grid of a secret"
        )


def _discs(numbers: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The discs of secrets, by number: (n, h, w, 1) uint8; each fills its cell, all cells are alike."""
    sides = [side // GRID for side in shape[:2]]
    y, x = (2 * (np.arange(side) + 0.5) / side - 1 for side in sides)
    disc = np.rint(STRENGTH * (1 - np.minimum(y[:, None] ** 2 + x**2, 1)) ** 2).astype(np.uint8)
    grids = np.einsum("nij,yx->niyjx", _patterns()[numbers].astype(np.uint8), disc)
    grids = grids.reshape(len(numbers), GRID * sides[0], GRID * sides[1], 1)
    spare = [side - GRID * cell for side, cell in zip(shape[:2], sides, strict=True)]
    around = [(pixels // 2, pixels - pixels // 2) for pixels in spare]
    return np.pad(grids, ((0, 0), *around, (0, 0)))


@functools.cache
def _patterns() -> np.ndarray:
    """All secrets: (12870, 4, 4) bool."""
    filled = np.array(list(itertools.combinations(range(GRID**2), FILLED)))
    patterns = np.zeros((len(filled), GRID**2), bool)
    np.put_along_axis(patterns, filled, True, axis=1)
    return patterns.reshape(-1, GRID, GRID)


def _secret_numbers(number: int, seed: int) -> np.ndarray:
    """All secrets in a random order: the first is the canary's, those after it are its references'."""
    return _generator(number, seed, 1).permutation(SECRETS)


def _generator(number: int, seed: int, stream: int) -> np.random.Generator:
    _check_seed(seed)
    if number < 0:
        raise InputError(f"number: {number}; expected 0 or more")
    return np.random.default_rng([seed, _CANARY_STREAM, number, stream])


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"seed: {seed}; expected 0 or more")


def _digests(data: ImageData) -> tuple[bytes, ...]:
    return data.digests() if data.digests is not None else content.of_images(data.read, len(data))


def _canary_digest(number: int, shape: Sequence[int], seed: int) -> bytes:
    """Of what it is drawn from, as of a phantom: a level may differ from machine to machine."""
    from medvdm.data import phantom

    size = " x ".join(map(str, shape))
    text = f"canary {DRAWING} phantom {phantom.DRAWING} number {number} seed {seed} size {size}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
