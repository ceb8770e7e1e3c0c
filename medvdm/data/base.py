"""What every data source returns: images in [0, 1] with labels, patients and a fixed split.

A source decides everything about its images when it is loaded (which files, which labels, which patient is
in which split) and gives a function that reads any subset. Nothing here knows about JAX.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medvdm.errors import DataError, InputError, InputTypeError, nearest
from medvdm.images import as_unit_float

SPLITS = ("train", "val", "test")


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
    """

    seen: int
    read: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    stored_range: tuple[float, float] | None = None
    guessed: tuple[str, ...] = ()


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
        reader: maps an integer array of n positions to float32 of shape (n, height, width, channels) in [0, 1].
        notes: what a reader of the model card should know (missing files, resizing, unknown patients).
        reading: what was looked at, read, skipped and guessed, as counts.
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

    def __post_init__(self) -> None:
        n = len(self.ids)
        if self.labels.shape != (n, len(self.class_names)):
            raise InputError(
                f"labels: shape {self.labels.shape}; expected {(n, len(self.class_names))} (images, classes)"
            )
        for what in ("patients", "splits"):
            if len(getattr(self, what)) != n:
                raise InputError(f"{what}: {len(getattr(self, what))} entries; expected {n}, one per image")
        sides: dict[str, str] = {}
        for patient, split in zip(self.patients, self.splits, strict=True):
            if sides.setdefault(patient, split) != split:
                raise DataError(f"patient {patient} is in both '{sides[patient]}' and '{split}'; expected one split")

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
        return self.reader(np.asarray(indices, dtype=np.int64))

    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of images and patients of each split."""
        return {
            split: {
                "images": int((self.splits == split).sum()),
                "patients": len(set(self.patients[self.splits == split])),
            }
            for split in SPLITS
        }

    def fingerprint(self) -> str:
        """A short hash of names, labels, split, shape and the brightness of 16 images: is this the same data?"""
        h = hashlib.sha256()
        for text in (self.name, str(self.image_shape), *self.class_names, *self.ids, *self.patients, *self.splits):
            h.update(text.encode() + b"\0")
        h.update(np.ascontiguousarray(self.labels, dtype=np.uint8).tobytes())
        probe = np.unique(np.linspace(0, len(self) - 1, num=min(16, len(self))).astype(int))
        # The mean gray of each, to three digits: it survives the last float32 digit of another processor.
        means = self.read(probe).reshape(len(probe), -1).mean(axis=1, dtype=np.float64)
        h.update(" ".join(f"{mean:.3f}" for mean in means).encode())
        return h.hexdigest()[:16]


def index_of(name: str, names: Sequence[str], what: str) -> int:
    """Position of ``name`` in ``names``; raises InputError that says ``what`` it is and names the nearest."""
    if name not in names:
        raise InputError(f"{what}: '{name}'; {nearest(name, names)}")
    return list(names).index(name)


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    class_names: Sequence[str] | None = None,
    patients: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    name: str = "arrays",
    origin: str = "arrays given by the caller",
) -> ImageData:
    """Wrap arrays as :class:`ImageData`.

    Args:
        images: (N, H, W) or (N, H, W, C); uint8, or float in [0, 1].
        labels: (N,) class indices or (N, K) multi-hot; None puts every image in one class.
        class_names: K names; by default '0', '1', ...
        patients: N names; by default every image is a patient of its own.
        splits: N of 'train', 'val', 'test'; by default :func:`split_of_patient`.

    Raises:
        InputTypeError: images of a dtype other than uint8 or float.
        InputError: values outside [0, 1]; shapes that do not fit together.
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"images: shape {images.shape}; expected (N, H, W) or (N, H, W, C), none of them 0")
    if images.dtype != np.uint8:  # uint8 is kept as it is (a quarter of the memory) and scaled when read
        images = as_unit_float(images)
    n = len(images)
    labels = np.zeros(n, np.int64) if labels is None else np.asarray(labels)
    if labels.ndim == 1:
        if not np.issubdtype(labels.dtype, np.integer) or (n and labels.min() < 0):
            raise InputTypeError(f"labels: dtype {labels.dtype}; expected class indices 0, 1, ... or (N, K) multi-hot")
        k = len(class_names) if class_names is not None else int(labels.max()) + 1
        if labels.max() >= k:
            raise InputError(f"labels: index {int(labels.max())}; expected less than {k}, the number of class_names")
        labels = np.eye(k, dtype=np.uint8)[labels]
    names = tuple(class_names) if class_names is not None else tuple(str(i) for i in range(labels.shape[1]))
    who = np.array([str(p) for p in patients] if patients is not None else [str(i) for i in range(n)])
    where = np.array(list(splits) if splits is not None else [split_of_patient(p) for p in who])
    unknown = set(where) - set(SPLITS)
    if unknown:
        raise InputError(f"splits: {sorted(unknown)}; expected 'train', 'val' or 'test'")
    return ImageData(
        name=name,
        origin=origin,
        ids=tuple(str(i) for i in range(n)),
        labels=labels.astype(np.uint8),
        class_names=names,
        patients=who,
        splits=where,
        split_rule="given by the caller" if splits is not None else "sha256 of the patient, mod 10",
        image_shape=tuple(images.shape[1:]),
        reader=lambda i: as_unit_float(images[i]),
        notes=() if patients is not None else ("no patients given: every image counts as a patient of its own",),
    )
