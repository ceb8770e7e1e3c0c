"""Arrays of your own as images: each shape and type has one meaning, or is refused with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from medvdm.data.base import (
    ImageData,
    Reading,
    check_class_names,
    check_multi_hot,
    meaning,
    says_nothing,
    split_of_patient,
)
from medvdm.errors import InputError, InputTypeError, nearest
from medvdm.images import as_unit_float, channels_last

_NUMBER = re.compile(r"(\d+)(\.0*)?")
DARK = 0.25  # below this share of the range, the brightest pixel of all images is worth a note


def from_arrays(
    images: Any,
    labels: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    patients: Any = None,
    splits: Any = None,
    name: str = "arrays",
    origin: str = "arrays given by the caller",
) -> ImageData:
    """Wrap arrays as :class:`ImageData`. An array that can be written to is copied, so later changes do not matter.

    Args:
        images: (N, H, W) or (N, H, W, C) with C = 1 (gray) or 3 (RGB); uint8, or float in [0, 1].
        labels: what each image shows. None: all images are of one class. Otherwise, by shape:

            - (N,) or (N, 1) integers: the index of the image's class, 0 to K - 1 (MedMNIST, Keras, torchvision).
            - (N,) or (N, 1) strings: the name of the image's class.
            - (N, K) with K > 1: 0 or 1 for each class, integer, bool or float; one-hot is one case of it. A row of
              zeros is an image without a class.

            bool in place of an index is 0 or 1. One yes-or-no finding is an index, with two class names.
        class_names: K names; by default '0', '1', ..., or the strings in ``labels`` in sorted order. Without them each
            index from 0 to the largest must occur, since nothing else says how many classes there are.
        patients: N strings or whole numbers; by default every image is a patient of its own.
        splits: N of 'train', 'val', 'test'; by default :func:`split_of_patient`.
        name: what the run's record calls the source.
        origin: one line for the model card.

    Raises:
        InputTypeError: images of a dtype other than uint8 or float; labels, names or patients of another type.
        InputError: values outside [0, 1]; channels that do not come last; labels other than 0 and 1, such as -1 or
            NaN; a patient that is blank; two spellings of one patient; shapes that do not fit together.
        DataError: a patient in two splits.
    """
    given = _as_array(images, "images")
    images = channels_last(given, "images")
    if images.dtype == np.uint8:  # kept as it is, a quarter of the memory, and scaled when read
        images = images.copy() if images.flags.writeable else images
        low, high = int(images.min()) / 255, int(images.max()) / 255
        rounded_from: tuple[str, ...] = ()
    else:
        rounded_from = (f"arrays of {given.dtype}",)
        images = as_unit_float(images)
        images = images.copy() if np.may_share_memory(images, given) and images.flags.writeable else images
        low, high = float(images.min()), float(images.max())
    n = len(images)
    multi_hot, names, notes = _labels(labels, n, class_names)
    if patients is None:
        who = np.array([str(i) for i in range(n)])
        notes.append("no patients given: every image counts as a patient of its own")
    else:
        who, patient_notes = _patients(patients, n)
        notes += patient_notes
    where = np.array([split_of_patient(p) for p in who]) if splits is None else _splits(splits, n)
    if high < DARK:
        notes.append(
            f"dark: the brightest pixel of all images is {high:.3g} of white; were they scaled by the right number?"
        )
    guessed = ("3 arrays without labels are three gray images, not the channels of one",)
    if given.ndim == 4 or n != 3 or labels is not None:
        guessed = ()
    return ImageData(
        name=name,
        origin=origin,
        ids=tuple(str(i) for i in range(n)),
        labels=multi_hot,
        class_names=names,
        patients=who,
        splits=where,
        split_rule="given by the caller" if splits is not None else "sha256 of the patient, mod 10",
        image_shape=tuple(images.shape[1:]),
        reader=lambda i: images[i],
        notes=tuple(notes),
        reading=Reading(seen=n, read=n, stored_range=(low, high), guessed=guessed, rounded_from=rounded_from),
    )


def _as_array(values: Any, what: str) -> np.ndarray:
    """An array of anything array-like that hides no missing value.

    Raises:
        InputError: a ragged sequence, a masked array that masks something.
    """
    if np.ma.is_masked(values):
        raise InputError(f"{what}: {int(np.ma.count_masked(values))} masked values; expected an array without a mask")
    try:
        return np.asarray(values)
    except ValueError:
        raise InputError(f"{what}: rows of different lengths; expected one length") from None


# ---------------------------------------------------------------- labels


def _labels(labels: Any, n: int, class_names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """uint8 (N, K), the K names and what to note."""
    if class_names is not None:
        class_names = tuple(_in_order(class_names, "class_names"))
        check_class_names(class_names)
        class_names = tuple(map(str, class_names))
    if labels is None:
        if class_names is not None and len(class_names) != 1:
            raise InputError(f"class_names: {len(class_names)} without labels; expected labels, or one name")
        return np.ones((n, 1), np.uint8), class_names or ("0",), []
    array = _as_array(labels, "labels")
    if array.dtype.kind == "U" and not hasattr(labels, "__array__"):
        array = np.array(labels, object)  # numpy would make a text of a NaN among strings
    if array.ndim not in (1, 2) or len(array) != n:
        hint = "; transposed?" if array.ndim == 2 and array.shape[1] == n else ""
        raise InputError(f"labels: shape {array.shape}{hint}; expected ({n},), ({n}, 1) or ({n}, K) for {n} images")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype == object:
        array = _without_objects(array)
    if array.ndim == 1:
        multi_hot, names = _one_class_each(array, class_names)
    else:
        multi_hot, names = _multi_hot(array, class_names)
    notes = []
    empty = [name for name, count in zip(names, multi_hot.sum(axis=0, dtype=np.int64), strict=True) if not count]
    if empty:
        notes.append(f"classes without an image: {', '.join(empty)}")
    without = int((multi_hot.sum(axis=1) == 0).sum())
    if without:
        notes.append(f"{without} of {n} images carry none of the {len(names)} classes")
    return multi_hot, names, notes


def _without_objects(array: np.ndarray) -> np.ndarray:
    """Strings as an array of strings; anything else in an object array is refused by its first value.

    A column of a table has this dtype where it holds text, or numbers beside blanks.
    """
    others = [(i, value) for i, value in enumerate(array.flat) if not isinstance(value, str)]
    if not others:
        return array.astype(str)
    i, value = next((other for other in others if _is_blank(other[1])), others[0])
    at = i if array.ndim == 1 else tuple(int(k) for k in np.unravel_index(i, array.shape))
    if _is_blank(value):
        raise InputError(f"labels: {value!r} at {at}{meaning(float('nan'))}; expected a label for every image")
    raise InputTypeError(f"labels: dtype object with {value!r} at {at}; expected numbers or strings, .astype(int)?")


def _one_class_each(labels: np.ndarray, class_names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Multi-hot from (N,) indices or names of classes."""
    if labels.dtype.kind == "U":
        blank = next((i for i, label in enumerate(labels.tolist()) if says_nothing(label)), None)
        if blank is not None:
            raise InputError(f"labels: '{labels[blank]}' at {blank}; expected the name of a class")
        names = class_names if class_names is not None else tuple(np.unique(labels).tolist())
        unknown = [label for label in labels.tolist() if label not in set(names)] if class_names is not None else []
        if unknown:
            raise InputError(f"labels: '{unknown[0]}'; {nearest(unknown[0], names)}")
        column = {name: k for k, name in enumerate(names)}
        indices = np.array([column[label] for label in labels.tolist()])
    elif labels.dtype.kind in "iub":
        indices = labels.astype(np.int64)  # uint64 beyond int64 turns negative and is refused
        _check_indices(indices, class_names)
        names = class_names if class_names is not None else tuple(map(str, range(int(indices.max()) + 1)))
    else:
        doubtful = (
            np.flatnonzero(~np.isfinite(labels) | (labels < 0)) if labels.dtype.kind == "f" else np.array([], int)
        )
        if doubtful.size:
            i = int(doubtful[0])
            raise InputError(f"labels: {labels[i]} at {i}{meaning(float(labels[i]))}; expected class indices 0, 1, ...")
        raise InputTypeError(
            f"labels: dtype {labels.dtype} of shape {labels.shape}; expected class indices 0, 1, ... as integers "
            "(.astype(int)), names of classes, or (N, K) multi-hot"
        )
    multi_hot = np.zeros((len(labels), len(names)), np.uint8)
    multi_hot[np.arange(len(labels)), indices] = 1
    return multi_hot, names


def _check_indices(indices: np.ndarray, class_names: tuple[str, ...] | None) -> None:
    if indices.min() < 0:
        i = int(np.flatnonzero(indices < 0)[0])
        raise InputError(f"labels: {indices[i]} at {i}{meaning(indices[i])}; expected class indices 0, 1, ...")
    top = int(indices.max())
    if class_names is None:
        there = np.unique(indices)
        if len(there) != top + 1:
            lacking = next(k for k, index in enumerate([*there.tolist(), -1]) if index != k)
            raise InputError(
                f"labels: indices up to {top} but none of {lacking}; expected each from 0 to {top}, or class_names"
            )
    elif top >= len(class_names):
        hint = "; one yes-or-no finding has two class names" if len(class_names) == 1 and top == 1 else ""
        raise InputError(f"labels: index {top}; expected less than {len(class_names)}, the number of class_names{hint}")


def _multi_hot(labels: np.ndarray, class_names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Multi-hot uint8 from (N, K) zeros and ones of any number type."""
    if labels.dtype.kind not in "iubf":
        raise InputTypeError(f"labels: dtype {labels.dtype} of shape {labels.shape}; expected 0 and 1 for each class")
    check_multi_hot(labels)
    k = labels.shape[1]
    if class_names is not None and len(class_names) != k:
        raise InputError(f"labels: {k} columns; expected {len(class_names)}, the number of class_names")
    return labels.astype(np.uint8), class_names if class_names is not None else tuple(map(str, range(k)))


# ---------------------------------------------------------------- patients and splits


def _is_blank(value: Any) -> bool:
    """None, NaN, NaT, pandas' NA, or a text that says nothing."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if value is None or isinstance(value, str):
        return value is None or says_nothing(value)
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA has no truth value
        return True


def _column(values: Any, n: int, what: str) -> list[Any]:
    array = _as_array(values if hasattr(values, "__array__") else _objects(_in_order(values, what)), what)
    if array.shape != (n,):
        raise InputError(f"{what}: shape {array.shape}; expected ({n},), one per image")
    entries = array.tolist()
    for i, value in enumerate(entries):
        if _is_blank(value):
            raise InputError(f"{what}: {value!r} at {i}; expected one per image, none of them blank")
    return entries


def _in_order(values: Any, what: str) -> list[Any]:
    """The entries of a sequence; raises InputTypeError for a string, for one thing, and for what has no order."""
    kind = f"the string '{values}'" if isinstance(values, str) else f"a {type(values).__name__}"
    if isinstance(values, (str, bytes, Set, Mapping)) or not isinstance(values, Iterable):
        raise InputTypeError(f"{what}: {kind}; expected a sequence, such as a list")
    return list(values)


def _objects(entries: Sequence[Any]) -> np.ndarray:
    """A 1-D array of the entries as they are: numpy would make text of [1, '1', None]."""
    array = np.empty(len(entries), object)
    array[:] = entries
    return array


def _patients(patients: Any, n: int) -> tuple[np.ndarray, list[str]]:
    """Patients as text without spaces around it, and notes; refuses a number that is written in two ways."""
    entries = []
    for i, value in enumerate(_column(patients, n, "patients")):
        if isinstance(value, bytes):
            value = value.decode(errors="backslashreplace")
        if isinstance(value, bool) or not isinstance(value, (int, np.integer, str)):
            raise InputTypeError(f"patients: {value!r} at {i}; expected strings or whole numbers")
        text = str(value).strip()
        if text.casefold() in ("none", "null"):
            raise InputError(f"patients: '{text}' at {i}; expected one per image, none of them blank")
        entries.append(text)
    numbers: dict[int, str] = {}
    folded: dict[str, str] = {}
    notes = []
    for person in dict.fromkeys(entries):
        number = _NUMBER.fullmatch(person)
        if number is not None and numbers.setdefault(int(number[1]), person) != person:
            first = numbers[int(number[1])]
            raise InputError(f"patients: '{first}' and '{person}'; expected one spelling of one person")
        first = folded.setdefault(person.casefold(), person)
        if first != person and not notes:
            notes.append(f"patients that differ only in case count as two: '{first}' and '{person}'")
    return np.array(entries), notes


def _splits(splits: Any, n: int) -> np.ndarray:
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in _column(splits, n, "splits")])
