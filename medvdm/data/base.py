"""What every data source returns: images in [0, 1] with labels, patients and a fixed split.

A source decides everything about its images when it is loaded (which files, which labels, which patient is
in which split) and gives a function that reads any subset. Nothing here knows about JAX.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medvdm.data import content
from medvdm.data.levels import LevelUse, level_use
from medvdm.errors import DataError, InputError, InputTypeError, nearest
from medvdm.images import as_unit_float, to_levels

SPLITS = ("train", "val", "test")
_SPLIT_LIST = "'train', 'val' or 'test'"
_BLANK = ("", "nan", "<na>", "nat")  # what libraries for tables write for a cell that says nothing


def split_of_patient(patient: str) -> str:
    """The fixed split by patient: sha256 of the ID as text, as an integer, mod 10; 0 and 1 test, 2 validation.

    It depends on nothing but the ID: not on which images are present, their order or a seed. So a patient
    can never be on both sides, and two people with different parts of a data set agree.

    >>> split_of_patient("61")
    'train'
    """
    bucket = int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 10
    return "test" if bucket in (0, 1) else "val" if bucket == 2 else "train"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a source did to get its images: for the log, the data record and the model card.

    Attributes:
        seen: files (or array rows) that were looked at.
        read: how many of them are images of the set; the rest was skipped.
        skipped: number of those that were not read, by reason.
        stored_range: least and largest stored value that was read, as fractions of what the files could hold: (0, 0.06)
            is 12 bits in a 16-bit file. None where it is not known before every pixel has been read.
        guessed: one line for each thing that was not stated and had to be guessed.
        rounded_from: what may put gray values between two of 256 levels, such as 'files of 16 bits' or 'resized from
            1024 x 1024'; nothing where all are stored in 8 bits and read as they are.
    """

    seen: int
    read: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    stored_range: tuple[float, float] | None = None
    guessed: tuple[str, ...] = ()
    rounded_from: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A labelled set of images of one shape, split by patient.

    Attributes:
        name: the registry's name of the source, as in ``--data``.
        origin: one line that says what the images are and where they came from, for the model card.
        ids: one name per image, unique (a file name, an index).
        labels: uint8 of shape (N, K), multi-hot: 1 where the image carries the class.
        class_names: the K names, in the order of the columns of ``labels``.
        patients: N strings; images with the same string belong to one person.
        splits: N strings out of :data:`SPLITS`.
        split_rule: one line that says how the split was made.
        image_shape: (height, width, channels).
        reader: maps an integer array of n positions to images (n, height, width, channels) as the source keeps them:
            uint8, or float in [0, 1].
        notes: what a reader of the model card should know (missing files, resizing, unknown patients).
        reading: what was looked at, read, skipped and guessed, as counts.
        digests: gives one digest per image, equal for equal pictures; None hashes what ``read`` gives.

    Raises:
        InputError: shapes that do not fit together, labels other than 0 and 1, unknown splits, class names that are
            the same to a reader.
        InputTypeError: labels that are not uint8; patients or splits that are no strings.
        DataError: two images of one name, a patient without a name or in two splits.
    """

    name: str
    origin: str
    ids: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    patients: np.ndarray
    splits: np.ndarray
    split_rule: str
    image_shape: tuple[int, int, int]
    reader: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    notes: tuple[str, ...] = ()
    reading: Reading | None = None
    digests: Callable[[], tuple[bytes, ...]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for what in ("labels", "patients", "splits"):  # read-only, so that what is checked and hashed here stays true
            fixed = np.asarray(getattr(self, what)).view()
            fixed.flags.writeable = False
            object.__setattr__(self, what, fixed)
        n = len(self.ids)
        check_class_names(self.class_names)
        if self.labels.shape != (n, len(self.class_names)):
            raise InputError(
                f"labels: shape {self.labels.shape}; expected {(n, len(self.class_names))} (images, classes)"
            )
        if self.labels.dtype != np.uint8:
            raise InputTypeError(f"labels: dtype {self.labels.dtype}; expected uint8")
        check_multi_hot(self.labels)
        for what in ("patients", "splits"):
            column = getattr(self, what)
            if column.shape != (n,):
                raise InputError(f"{what}: shape {column.shape}; expected {(n,)}, one per image")
            if column.dtype.kind != "U":
                raise InputTypeError(f"{what}: dtype {column.dtype}; expected strings")
        if len(set(self.ids)) != n:
            twice = next(name for name, count in Counter(self.ids).items() if count > 1)
            raise DataError(f"ids: '{twice}' is there twice; expected one name per image")
        unknown = set(np.unique(self.splits)) - set(SPLITS)
        if unknown:
            raise InputError(f"splits: {', '.join(map(repr, sorted(map(str, unknown))))}; expected {_SPLIT_LIST}")
        people, first, patient = np.unique(self.patients, return_index=True, return_inverse=True)
        nameless = [i for i, person in zip(first, people, strict=True) if says_nothing(person)]
        if nameless:
            i = nameless[0]
            raise DataError(f"patients: '{self.patients[i]}' for {self.ids[i]}; expected a name of the patient")
        elsewhere = np.flatnonzero(self.splits != self.splits[first][patient])
        if elsewhere.size:
            i = elsewhere[0]
            raise DataError(
                f"patient {self.patients[i]} is in both '{self.splits[first[patient[i]]]}' and '{self.splits[i]}'; "
                "expected one split"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, split: str) -> np.ndarray:
        """Positions of the images of ``split`` ('train', 'val', 'test' or 'all'), in a fixed order.

        Raises:
            InputError: unknown split.
            DataError: the split holds no image.
        """
        if split not in (*SPLITS, "all"):
            raise InputError(f"split: '{split}'; {nearest(split, (*SPLITS, 'all'))}")
        found = np.arange(len(self)) if split == "all" else np.flatnonzero(self.splits == split)
        if found.size == 0:
            raise DataError(f"{self.name}: the split '{split}' has no images (of {len(self)}; {self.split_rule})")
        return found

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images at ``indices``: float32 of shape (n, height, width, channels) in [0, 1]."""
        return as_unit_float(self._stored(indices))

    def levels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Gray levels 0 to 255 at ``indices``: uint8 of shape (n, height, width, channels), for an 8-bit likelihood.

        What is stored in 8 bits and not resized comes out as it is stored. Any other value x in [0, 1] is rounded to
        level floor(255 x + 1/2); :meth:`level_use` says whether that happens, and why.
        """
        return to_levels(self._stored(indices))

    def level_use(self) -> LevelUse:
        """What the training images make of the 256 levels: rounding, contrast, gaps; read once, from a sample.

        Raises:
            DataError: no training image.
        """
        return self._level_use

    @functools.cached_property
    def _level_use(self) -> LevelUse:
        why = () if self.reading is None else self.reading.rounded_from
        return level_use(self.reader, self.indices("train"), why)

    def _stored(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.reader(np.asarray(indices, dtype=np.int64))

    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of images and patients of each split."""
        return {
            split: {
                "images": int((self.splits == split).sum()),
                "patients": len(np.unique(self.patients[self.splits == split])),
            }
            for split in SPLITS
        }

    def check_splits(self) -> tuple[str, ...]:
        """What is wrong with the split, one line each, for the log before training and for the model card.

        Noted: a validation or test split without images, one patient with all or most of the images, pictures that
        are on two sides, pictures that are there twice with different labels. Pictures are compared by their digests.

        Raises:
            DataError: no image to train on; a file that cannot be read any more.
        """
        self.indices("train")
        people, images_of = np.unique(self.patients, return_counts=True)
        most = int(images_of.argmax())
        notes = [
            f"the split '{split}' has no images (of {len(self)} of {len(people)} patients): nothing is measured on it"
            for split in ("val", "test")
            if not (self.splits == split).any()
        ]
        if len(people) == 1 and len(self) > 1:
            notes.append(f"all {len(self)} images are of one patient, '{people[0]}': nobody else is held out")
        elif images_of[most] > len(self) / 2 and images_of[most] >= 10:
            notes.append(f"patient '{people[most]}' has {images_of[most]} of the {len(self)} images: is it one person?")
        return (*notes, *self._notes_of_twins())

    def _notes_of_twins(self) -> list[str]:
        sides: dict[bytes, set[str]] = {}
        labels: dict[bytes, set[bytes]] = {}
        for digest, side, row in zip(self._digests, self.splits, self.labels, strict=True):
            sides.setdefault(digest, set()).add(str(side))
            labels.setdefault(digest, set()).add(row.tobytes())
        on_two_sides = sum(len(sides[digest]) > 1 for digest in self._digests)
        contradicted = sum(len(labels[digest]) > 1 for digest in self._digests)
        notes = []
        if on_two_sides:
            notes.append(f"{on_two_sides} images have an identical copy on another side of the split")
        if contradicted:
            notes.append(f"{contradicted} images have an identical copy with other labels")
        return notes

    @functools.cached_property
    def _digests(self) -> tuple[bytes, ...]:
        return self.digests() if self.digests is not None else content.of_images(self.read, len(self))

    def fingerprint(self) -> str:
        """A short hash of names, classes, labels, patients, splits, shape and every image: is this the same data?

        An image enters by its digest: of every pixel of an array, of the bytes of a file (of samples of its bytes
        where the files together exceed 2 GiB), of what a phantom is drawn from. So the hash is the same on every
        machine. It is computed once.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        texts = (self.class_names, self.ids, self.patients.tolist(), self.splits.tolist())
        h = hashlib.sha256(json.dumps((self.name, self.image_shape, *texts)).encode())
        h.update(np.ascontiguousarray(self.labels))
        h.update(b"".join(self._digests))
        return h.hexdigest()[:16]


def says_nothing(text: str) -> bool:
    """Whether a name is blank, or what is left of a blank cell of a table that was turned into text ('nan')."""
    return text.strip().casefold() in _BLANK


def check_class_names(names: Sequence[str]) -> None:
    """Refuse class names that are no text, blank, or the same but for case and spaces.

    Raises:
        InputTypeError: a name that is no string.
        InputError: no name, a blank one, or two that a reader would take for one.
    """
    spelled: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise InputTypeError(f"class_names: {name!r}; expected strings")
        plain = "".join(name.split()).casefold()
        if says_nothing(name):
            raise InputError(f"class_names: '{name}'; expected a name that is not blank")
        if plain in spelled:
            raise InputError(f"class_names: '{spelled[plain]}' and '{name}'; expected names that differ in letters")
        spelled[plain] = name
    if not spelled:
        raise InputError("class_names: none; expected at least one")


def check_multi_hot(labels: np.ndarray) -> None:
    """Refuse labels (N, K) of numbers other than 0 and 1: say which, where, and what it means in files that ship it.

    Raises:
        InputError: such a number.
    """
    wrong = (labels != 0) & (labels != 1)  # true for NaN, too
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        value = labels[row, column].item()
        raise InputError(
            f"labels: {value} at ({row}, {column}), one of {int(wrong.sum())} values other than 0 and 1"
            f"{meaning(value)}; expected 0 or 1"
        )


def meaning(value: float) -> str:
    """What a label other than 0 and 1 means in the files that ship it, in brackets; '' if it has no usual meaning."""
    if value == -1:
        return " (-1 is 'uncertain' in files like CheXpert's: make it 0 or 1, or leave the image out)"
    if value != value:
        return " (blank is 'not mentioned' in files like CheXpert's: make it 0, or leave the image out)"
    if 0 < value < 1:
        return " (a probability: decide by a threshold of yours)"
    return ""


def index_of(name: str, names: Sequence[str], what: str) -> int:
    """Position of ``name`` in ``names``; raises InputError that says ``what`` it is and names the nearest."""
    if name not in names:
        raise InputError(f"{what}: '{name}'; {nearest(name, names)}")
    return list(names).index(name)
