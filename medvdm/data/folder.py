"""Any tree of PNG, JPEG, TIFF or DICOM files; sub-folders are labels.

    FOLDER/LABEL/.../image.png            split by the hash of the patient
    FOLDER/train|val|test/LABEL/image.png split as the folders say (also 'valid', 'validation')
    FOLDER/image.png                      one class, 'all'

In the second form a missing validation folder is carved out of train: the patients with hash bucket 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from medvdm.data import convert, files
from medvdm.data.base import ImageData, split_of_patient
from medvdm.errors import DataError, InputError

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ONE_CLASS = "all"


@dataclass(frozen=True)
class _Layout:
    """Labels, and the split that the folders say (None: they say none), one per image."""

    labels: list[str]
    splits: list[str] | None


def load(
    data_dir: str | None,
    image_size: int | None = None,
    fit: convert.Fit = "pad",
    patient_pattern: str | None = None,
) -> ImageData:
    """Load a folder of images.

    Args:
        data_dir: the folder.
        image_size: new height and width in pixels; None keeps the size of the files.
        fit: what happens to images that are not square, see :func:`medvdm.data.convert.resize`.
        patient_pattern: a regular expression with one group, searched in the path relative to ``data_dir``
            (with '/'); the group is the patient. None: the PatientID of DICOM files, otherwise unknown.

    Raises:
        InputError: no ``data_dir``, or a pattern that cannot be used.
        MissingFileError: no such folder.
        DataError: no images, an image that cannot be used, a pattern that does not match.
        MissingPackageError: DICOM files without pydicom.
    """
    pattern = _compiled(patient_pattern)
    folder = files.existing_folder(data_dir, "folder", "a folder of images, with a sub-folder for each label")
    paths = files.walk(folder, convert.SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: has no images; expected files named {' '.join('*' + s for s in convert.SUFFIXES)}")
    ids = [path.relative_to(folder).as_posix() for path in paths]
    layout = _layout(ids, folder)
    patients, notes = _patients(paths, ids, pattern)
    splits, split_rule, split_notes = _splits(layout, patients)
    class_names = tuple(sorted(set(layout.labels)))
    images = files.open_images(paths, image_size, fit)
    return ImageData(
        name="folder",
        origin=f"{len(ids)} image files given by the user, folder '{folder.resolve().name}'",
        ids=tuple(ids),
        labels=np.eye(len(class_names), dtype=np.uint8)[[class_names.index(label) for label in layout.labels]],
        class_names=class_names,
        patients=np.array(patients),
        splits=np.array(splits),
        split_rule=split_rule,
        image_shape=images.image_shape,
        reader=images.reader,
        notes=(*notes, *split_notes, *images.notes),
        digests=images.digests,
    )


def _compiled(patient_pattern: str | None) -> re.Pattern[str] | None:
    if patient_pattern is None:
        return None
    try:
        pattern = re.compile(patient_pattern)
    except re.error as problem:
        raise InputError(f"patient_pattern: '{patient_pattern}' is no regular expression ({problem})") from None
    if pattern.groups != 1:
        raise InputError(f"patient_pattern: '{patient_pattern}' has {pattern.groups} groups; expected 1, the patient")
    return pattern


def _layout(ids: Sequence[str], folder: Path) -> _Layout:
    """Labels and splits by the folders' names."""
    folders = [PurePosixPath(name).parts[:-1] for name in ids]
    tops = {parts[0].casefold() if parts else "" for parts in folders}
    if tops <= _SPLIT_FOLDERS.keys():
        splits = [_SPLIT_FOLDERS[parts[0].casefold()] for parts in folders]
        return _Layout(_labels([parts[1:] for parts in folders], ids, folder), splits)
    return _Layout(_labels(folders, ids, folder), None)


def _labels(folders: Sequence[tuple[str, ...]], ids: Sequence[str], folder: Path) -> list[str]:
    bare = next((name for name, parts in zip(ids, folders, strict=True) if not parts), None)
    if bare is None:
        return [parts[0] for parts in folders]
    labelled = next((parts[0] for parts in folders if parts), None)
    if labelled is not None:
        raise DataError(
            f"{folder / bare}: in no label folder, while others are (as '{labelled}'); expected all or none"
        )
    return [_ONE_CLASS] * len(ids)


def _patients(
    paths: Sequence[Path], ids: Sequence[str], pattern: re.Pattern[str] | None
) -> tuple[list[str], list[str]]:
    """One patient per image, and what to note about them."""
    if pattern is not None:
        patients = [_matched(pattern, name, path) for name, path in zip(ids, paths, strict=True)]
        return patients, [f"patients by the pattern {pattern.pattern}: {len(set(patients))}"]
    is_dicom = [path.suffix.lower() == ".dcm" for path in paths]
    stated = files.threaded(lambda i: convert.dicom_patient(paths[i]) if is_dicom[i] else "", range(len(paths)))
    patients = [patient or name for patient, name in zip(stated, ids, strict=True)]
    known = sum(map(bool, stated))
    notes = []
    if known:
        notes.append(f"patients by the PatientID of {known} DICOM files: {len(set(filter(None, stated)))}")
    if known < len(ids):
        notes.append(
            f"patients unknown for {len(ids) - known} of {len(ids)} images: each counts as a patient of its own, "
            "so one person may be on both sides of the split (--patient-pattern states them)"
        )
    return patients, notes


def _matched(pattern: re.Pattern[str], name: str, path: Path) -> str:
    match = pattern.search(name)
    if match is None or not match[1]:
        raise DataError(f"{path}: patient_pattern '{pattern.pattern}' finds no patient in '{name}'")
    return match[1]


def _splits(layout: _Layout, patients: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Splits, the rule in one line, and what to note."""
    by_hash = [split_of_patient(patient) for patient in patients]
    if layout.splits is None:
        return by_hash, "by patient: sha256 of the patient, mod 10; 0 and 1 test, 2 validation", []
    notes = [] if "test" in layout.splits else ["there is no test folder: the test split is empty"]
    if "val" in layout.splits:
        return layout.splits, "as the folders train, val and test say", notes
    carved = [
        "val" if said == "train" and hashed == "val" else said
        for said, hashed in zip(layout.splits, by_hash, strict=True)
    ]
    return carved, "as the folders say; validation: patients of train whose sha256, mod 10, is 2", notes
