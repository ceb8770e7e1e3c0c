"""NIH ChestX-ray8/14 (Wang et al., CVPR 2017) in its official layout, whole or in part, at any resolution.

The folder holds the label file and, anywhere below it, the images:

    Data_Entry_2017_v2020.csv  or  Data_Entry_2017.csv
    images/00000001_000.png    or  images_001/images/00000001_000.png, ...
    train_val_list.txt and test_list.txt  (both or neither)

A finding that is named twice for an image is there once. A row that joins 'No Finding' with a finding, or whose
Patient ID is not the number in the image's official name, is refused.

Split: by the hash of the patient's number. If both official lists are there, the official test set is kept
and the patients of the train_val list are divided by the same hash: bucket 2 validation, the others training.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvdm.data import files
from medvdm.data.base import ImageData, Reading, check_class_names, split_of_patient
from medvdm.data.convert import Fit
from medvdm.errors import DataError, MissingFileError

LABEL_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the newer, corrected release first
SPLIT_LISTS = ("train_val_list.txt", "test_list.txt")
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
_SUFFIXES = (".png", ".jpg", ".jpeg")
_NO_FINDING = "No Finding"
_OFFICIAL_NAME = re.compile(r"(\d{8})_\d{3}\.\w+")  # the patient's number, and that of the visit


@dataclass(frozen=True)
class _Row:
    line: int
    findings: tuple[str, ...]
    patient: str


def load(data_dir: str | None, image_size: int | None = None, fit: Fit = "pad") -> ImageData:
    """Load the images that are there, with their findings, patients and split.

    Args:
        data_dir: the folder with the label file.
        image_size: new height and width in pixels; None keeps the size of the files.
        fit: what happens to images that are not square, see :func:`medvdm.data.convert.resize`.

    Raises:
        InputError: no ``data_dir``.
        MissingFileError: no such folder, no label file, or only one of the official split lists.
        DataError: label file, split lists and images do not fit together, or an image cannot be used.
    """
    folder = files.existing_folder(data_dir, "nih", "the folder with Data_Entry_2017.csv and the images")
    label_file = _label_file(folder)
    rows = _read_rows(label_file)
    lists = _read_lists(folder)
    paths = _images_by_name(folder)

    names = sorted(rows.keys() & paths.keys())
    if not names:
        raise DataError(
            f"{label_file}: names none of the {len(paths)} images in {folder}; expected file names as there"
        )
    skipped = Counter({"no row in the label file": len(paths) - len(names)})
    notes = _count_notes(rows=len(rows), present=len(names), without_row=len(paths) - len(names))
    if lists is not None:
        listed = [name for name in names if name in lists]
        if not listed:
            raise DataError(f"{folder}: {' and '.join(SPLIT_LISTS)} name none of the {len(names)} images there")
        if len(listed) < len(names):
            notes.append(f"{len(names) - len(listed)} images are on neither official list and were left out")
            skipped["on neither official list"] = len(names) - len(listed)
        names = listed

    patients = [rows[name].patient for name in names]
    splits = [_split(lists[name] if lists else None, patient) for name, patient in zip(names, patients, strict=True)]
    labels, class_names = _multi_hot([rows[name].findings for name in names])
    images = files.open_images([paths[name] for name in names], image_size, fit)
    return ImageData(
        name="nih",
        origin=f"NIH ChestX-ray14 (Wang et al., CVPR 2017; provider: NIH Clinical Center), labels of {label_file.name}",
        ids=tuple(names),
        labels=labels,
        class_names=class_names,
        patients=np.array(patients),
        splits=np.array(splits),
        split_rule=_SPLIT_RULES[lists is not None],
        image_shape=images.image_shape,
        reader=images.reader,
        notes=(*notes, *images.notes),
        reading=Reading(
            seen=len(paths),
            read=len(names),
            skipped=dict(+skipped),
            stored_range=images.stored_range,
            rounded_from=images.rounded_from,
        ),
        digests=images.digests,
    )


_SPLIT_RULES = {
    False: "by patient: sha256 of the Patient ID, mod 10; 0 and 1 test, 2 validation",
    True: "official test_list.txt; patients of train_val_list.txt by sha256 of the Patient ID, mod 10: 2 validation",
}


def _split(official: str | None, patient: str) -> str:
    if official == "test":
        return "test"
    by_hash = split_of_patient(patient)
    return by_hash if official is None or by_hash == "val" else "train"


def _label_file(folder: Path) -> Path:
    for name in LABEL_FILES:
        if (folder / name).is_file():
            return folder / name
    raise MissingFileError(f"{folder}: has no label file; expected {' or '.join(reversed(LABEL_FILES))} in it")


def _read_rows(path: Path) -> dict[str, _Row]:
    """The label file by image name.

    Raises:
        DataError: not a CSV file in UTF-8, a column lacking, a damaged row, an image named twice.
    """
    rows: dict[str, _Row] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            columns = _column_positions(next(lines, []), path)
            for cells in lines:
                if cells:
                    _add_row(rows, cells, columns, lines.line_num, path)
    except (csv.Error, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: found {problem}; expected a CSV file in UTF-8") from None
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror})") from None
    return rows


def _column_positions(found: Sequence[str], path: Path) -> tuple[int, ...]:
    found = [name.strip() for name in found]
    lacking = [name for name in _COLUMNS if name not in found]
    if lacking:
        hint = "; expected commas between the cells" if len(found) == 1 and any(c in found[0] for c in ";\t|") else ""
        raise DataError(
            f"{path}: lacks the column {', '.join(map(repr, lacking))}; found {', '.join(found) or 'nothing'}{hint}"
        )
    twice = [name for name in _COLUMNS if found.count(name) > 1]
    if twice:
        raise DataError(f"{path}: has the column '{twice[0]}' {found.count(twice[0])} times; expected it once")
    return tuple(found.index(name) for name in _COLUMNS)


def _add_row(rows: dict[str, _Row], cells: Sequence[str], columns: tuple[int, ...], line: int, path: Path) -> None:
    if len(cells) <= max(columns):
        raise DataError(f"{path}: line {line} has {len(cells)} cells; expected at least {max(columns) + 1}")
    name, findings, patient = (cells[column].strip() for column in columns)
    found = tuple(finding.strip() for finding in findings.split("|"))
    if not name or not all(found):
        raise DataError(f"{path}: line {line} has no image name or an empty finding ('{name}', '{findings}')")
    if _NO_FINDING in found and set(found) != {_NO_FINDING}:
        raise DataError(f"{path}: line {line} says '{findings}'; expected '{_NO_FINDING}' alone, or findings")
    if not (patient.isascii() and patient.isdigit()):
        raise DataError(f"{path}: line {line} has the Patient ID '{patient}'; expected a whole number")
    official = _OFFICIAL_NAME.fullmatch(name)
    if official is not None and int(official[1]) != int(patient):
        raise DataError(
            f"{path}: line {line} gives {name} to the Patient ID '{patient}'; "
            f"expected {int(official[1])}, as its name says"
        )
    if name in rows:
        raise DataError(
            f"{path}: line {line} names {name} again, after line {rows[name].line}; expected one row per image"
        )
    rows[name] = _Row(line, found, str(int(patient)))


def _read_lists(folder: Path) -> dict[str, str] | None:
    """'train_val' or 'test' by image name; None if neither list is there. One alone would leave the split open."""
    there = [name for name in SPLIT_LISTS if (folder / name).is_file()]
    if not there:
        return None
    if len(there) == 1:
        other = next(name for name in SPLIT_LISTS if name not in there)
        raise MissingFileError(
            f"{folder / other}: not there, but {there[0]} is; expected both official lists or neither"
        )
    lists: dict[str, str] = {}
    for name, side in zip(SPLIT_LISTS, ("train_val", "test"), strict=True):
        try:
            listed = (folder / name).read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as problem:
            raise DataError(f"{folder / name}: cannot be read ({problem}); expected one image name a line") from None
        for image in listed:
            if lists.setdefault(image, side) != side:
                raise DataError(
                    f"{folder / name}: names {image}, which is in {SPLIT_LISTS[0]} too; expected one of them"
                )
    return lists


def _images_by_name(folder: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in files.walk(folder, _SUFFIXES):
        if path.name in paths:
            raise DataError(f"{path.name}: found twice, as {paths[path.name]} and {path}; expected each image once")
        paths[path.name] = path
    return paths


def _count_notes(rows: int, present: int, without_row: int) -> list[str]:
    notes = []
    if present < rows:
        notes.append(f"{rows - present:,} of the {rows:,} images in the label file are not there: {present:,} used")
    if without_row:
        notes.append(f"{without_row:,} images without a row in the label file were ignored")
    return notes


def _multi_hot(findings: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, tuple[str, ...]]:
    class_names = tuple(sorted({name for found in findings for name in found}))
    check_class_names(class_names)
    column = {name: i for i, name in enumerate(class_names)}
    labels = np.zeros((len(findings), len(class_names)), np.uint8)
    for row, found in zip(labels, findings, strict=True):
        row[[column[name] for name in found]] = 1
    return labels, class_names
