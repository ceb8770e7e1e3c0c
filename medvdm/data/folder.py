"""Any tree of PNG, JPEG, TIFF, BMP or DICOM files; sub-folders are labels.

    FOLDER/LABEL/.../image.png             split by the hash of the patient
    FOLDER/[.../]train|val|test/LABEL/...  split as the folders say
    FOLDER/[.../]LABEL/train|val|test/...  the same
    FOLDER/image.png                       one class, 'all'

Names of sides: train, training; val, valid, validation, dev; test, testing, holdout; in any case, and with words that
say nothing (train_data, Test1, val-images). A name that reads like a side and says more (test_covid), or one that is no
side for sure (fold_0, eval, imagesTr), is refused, as are sides beside other folders, and sides at several depths.
A missing validation folder is carved out of train: the patients with hash bucket 2.

Left out, and counted: files that are no images, DICOM files without a picture, masks (a file or folder named so, beside
others that are not), and of the same picture on two sides the one in train (or in val, if the other is in test).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from medvdm.data import convert, files
from medvdm.data.base import SPLITS, ImageData, Reading, split_of_patient
from medvdm.data.stored import Header
from medvdm.errors import DataError, InputError

_ONE_CLASS = "all"
_SIDES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "holdout", "heldout"), "test"),
}
_DOUBTFUL = {
    *("eval", "evaluation", "fold", "folds", "kfold", "cv", "split", "splits", "partition", "seen", "unseen"),
    *("tr", "trn", "vl", "te", "ts", "tst", "trainval", "pretrain", "finetune", "internal", "external"),
    *("entrenamiento", "prueba", "treino", "teste"),
}
_CLEAR = {"train", "training", "test", "testing", "validation"}  # no finding is called so
_SAY_NOTHING = {
    *("data", "dataset", "set", "subset", "folder", "files", "image", "images", "img", "imgs", "pictures", "pics"),
    *("chest", "xray", "xrays", "cxr", "radiographs", "scans", "dicom", "dicoms", "dcm", "png", "pngs", "jpg", "jpeg"),
    *("tif", "tiff", "bmp", "raw", "original", "resized", "processed", "stage", "part", "split", "splits", "the", "x"),
    *("ray", "rays"),
}
_MASKS = {"mask", "masks", "annotation", "annotations", "segmentation", "segmentations", "gt"}
_NO_NAMES = {"", "anonymous", "anonymized", "anonymised", "anon", "anonym", "unknown", "none", "na", "nan", "null"}
_NO_NAMES |= {"patient", "patientid", "id", "test", "default", "noid", "deidentified", "removed", "x", "xxx", "xxxx"}

_MASK, _NO_PICTURE, _COPY = (
    "a mask, by its name",
    "a DICOM file without a picture",
    "a copy of a picture on another side",
)
_QUIET_REASONS = (files.HIDDEN, files.SIDECAR)

Parts = tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """What a folder says of the images in it.

    Attributes:
        label: the class.
        side: train, val or test; None if the folders say none.
        owner: the folder of the label, which must hold images; None if there is no label folder.
    """

    label: str
    side: str | None
    owner: Parts | None


def load(
    data_dir: str | None,
    image_size: int | None = None,
    fit: convert.Fit = "pad",
    patient_pattern: str | None = None,
    window: str = "full",
) -> ImageData:
    """Load a folder of images.

    Args:
        data_dir: the folder.
        image_size: new height and width in pixels; None keeps the size of the files.
        fit: what happens to images that are not square, see :func:`medvdm.data.convert.resize`.
        patient_pattern: a regular expression with one group, searched in the path relative to ``data_dir``
            (with '/'); the group is the patient. None: the PatientID of DICOM files, otherwise unknown.
        window: stored values that become 0 and 1, see :class:`medvdm.data.DataConfig`.

    Raises:
        InputError: no ``data_dir``, or a pattern or window that cannot be used.
        MissingFileError: no such folder.
        DataError: no images, an image that cannot be used, a pattern that does not match, a name that is not UTF-8,
            folders of which it is not clear what they mean, a label folder without images.
        MissingPackageError: DICOM files without pydicom or without a decoder of their compression.
    """
    pattern = _compiled(patient_pattern)
    files.parsed_window(window)
    folder = files.existing_folder(data_dir, "folder", "a folder of images, with a sub-folder for each label")
    survey = files.survey(folder)
    skipped = {_relative(path, folder): reason for path, reason in survey.skipped.items()}
    ids = [_relative(path, folder) for path in survey.images]
    ids, masks = _without_masks(ids)
    skipped |= dict.fromkeys(masks, _MASK)
    found = dict(zip(ids, files.headers([folder / name for name in ids]), strict=True))
    skipped |= {name: _NO_PICTURE for name, header in found.items() if header is None}
    heads = {name: header for name, header in found.items() if header is not None}
    if not heads:
        raise DataError(
            f"{folder}: has no images{_counted(skipped)}; expected files named "
            f"{' '.join('*' + s for s in convert.SUFFIXES)}"
        )
    ids = list(heads)
    places, layout_notes = _places([PurePosixPath(name).parts[:-1] for name in ids], folder)
    folder_notes = _check_empty(set(places), skipped, [_relative(path, folder) for path in survey.empty], folder)
    patients, patient_notes = _patients(ids, list(heads.values()), folder, pattern)
    splits, split_rule, split_notes = _splits(places, patients)
    images = files.open_images(
        [folder / name for name in ids],
        image_size,
        fit,
        window=window,
        found=list(heads.values()),
        training=[i for i, split in enumerate(splits) if split == "train"],
    )
    stated = places[0].side is not None
    splits, kept, copy_notes = _copies_on_one_side(ids, images.pictures, places, patients, splits, stated)
    skipped |= {ids[i]: _COPY for i in range(len(ids)) if i not in kept}
    positions = np.array(sorted(kept))
    class_names = tuple(sorted({places[i].label for i in positions}))
    column = {name: i for i, name in enumerate(class_names)}
    return ImageData(
        name="folder",
        origin=f"{len(positions)} image files given by the user, folder '{folder.resolve().name}'",
        ids=tuple(ids[i] for i in positions),
        labels=np.eye(len(class_names), dtype=np.uint8)[[column[places[i].label] for i in positions]],
        class_names=class_names,
        patients=np.array(patients)[positions],
        splits=np.array(splits)[positions],
        split_rule=split_rule,
        image_shape=images.image_shape,
        reader=lambda indices: images.reader(positions[indices]),
        notes=(
            *_skip_notes(skipped),
            *folder_notes,
            *layout_notes,
            *patient_notes,
            *split_notes,
            *copy_notes,
            *images.notes,
        ),
        reading=Reading(
            seen=len(survey.images) + len(survey.skipped),
            read=len(positions),
            skipped=dict(Counter(skipped.values())),
            stored_range=images.stored_range,
            guessed=(*layout_notes, *(note for note in patient_notes if "unknown" in note)),
            rounded_from=images.rounded_from,
        ),
        digests=lambda: tuple(digest for i, digest in enumerate(images.digests()) if i in kept),
    )


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


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


# ---------------------------------------------------------------- what is left out


def _without_masks(ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Images, and masks; if all look like masks, they are what the user wants to have."""
    masks = [name for name in ids if _is_mask(PurePosixPath(name))]
    if len(masks) == len(ids):
        return list(ids), []
    left_out = set(masks)
    return [name for name in ids if name not in left_out], masks


def _is_mask(path: PurePosixPath) -> bool:
    folders = path.parts[:-1]
    named = any(
        _MASKS & set(_words(part)) or part.casefold() == "labels" or "groundtruth" in "".join(_words(part))
        for part in folders
    )
    words = [word for word in _words(path.stem) if not word.isdigit()]
    return named or (bool(words) and words[-1] in _MASKS)


def _counted(skipped: Mapping[str, str]) -> str:
    counts = Counter(skipped.values())
    return f" ({'; '.join(f'{count} {reason}' for reason, count in counts.most_common(3))})" if counts else ""


def _skip_notes(skipped: Mapping[str, str]) -> list[str]:
    counts = Counter(reason for reason in skipped.values() if reason not in (*_QUIET_REASONS, _COPY))
    if not counts:
        return []
    reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return [f"{counts.total()} files were not read: {reasons}"]


def _check_empty(places: set[_Place], skipped: Mapping[str, str], empty: Iterable[str], folder: Path) -> list[str]:
    """Refuse a label folder that has no images in the end; note one that holds nothing but tables and texts."""
    owners = {place.owner for place in places if place.owner is not None}
    if not owners:
        return []
    depth = max(map(len, owners))
    parents = {owner[:length] for owner in owners for length in range(len(owner) + 1)}
    lost: dict[Parts, Counter[str]] = {}
    for name, reason in skipped.items():
        owner = PurePosixPath(name).parts[:-1][:depth]
        named_mask = reason == _MASK and _is_mask(PurePosixPath(*owner, "image"))
        if owner not in parents and reason != files.HIDDEN and not named_mask:
            lost.setdefault(owner, Counter())[reason] += 1
    for name in empty:
        parts = PurePosixPath(name).parts
        if parts[:depth] not in parents and len(parts) <= depth:
            lost.setdefault(parts, Counter())
    texts = sorted(owner for owner, reasons in lost.items() if set(reasons) == {files.SIDECAR})
    for owner, reasons in sorted(lost.items()):
        if owner not in texts:
            held = "; ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no file"
            raise DataError(
                f"{folder.joinpath(*owner)}: holds no image that can be read ({held}); expected images, or no such "
                "folder beside the label folders"
            )
    return [f"the folder {'/'.join(owner)} holds texts or tables and no image: no label" for owner in texts]


# ---------------------------------------------------------------- what the folders say


def _words(name: str) -> list[str]:
    """The words of a name, in lower case: at signs, changes of case, and numbers.

    >>> _words("stage2-TrainImages")
    ['stage', '2', 'train', 'images']
    """
    parts = re.split(r"[^\w]|_|(?<=[a-z])(?=[A-Z])|(?<=\D)(?=\d)|(?<=\d)(?=\D)", name)
    words = [part.casefold() for part in parts if part]
    return [word for glued in words for word in _unglued(glued)]


def _unglued(word: str) -> list[str]:
    """'trainset' as 'train', 'set'.

    >>> _unglued("testdata"), _unglued("testis")
    (['test', 'data'], ['testis'])
    """
    for side in _SIDES:
        if word.startswith(side) and word[len(side) :] in ("set", "sets", "data", "images", "image", "imgs", "img"):
            return [side, word[len(side) :]]
    return [word]


def _says_nothing(name: str) -> bool:
    words = _words(name)
    return any(word in _SAY_NOTHING for word in words) and all(word in _SAY_NOTHING or word.isdigit() for word in words)


def _side(name: str, folder: Path) -> str | None:
    """The side that a folder's name states; None if it states none.

    Raises:
        DataError: it reads like a side, but it is not clear which, or it says more.
    """
    words = [word for word in _words(name) if not word.isdigit()]
    sides = {_SIDES[word] for word in words if word in _SIDES}
    if words[:2] == ["hold", "out"] or words[:2] == ["held", "out"]:
        sides, words = {"test"}, ["test", *words[2:]]
    others = [word for word in words if word not in _SIDES and word not in _SAY_NOTHING]
    if len(sides) == 1 and not others:
        return sides.pop()
    doubtful = bool(words) and all(word in _SIDES or word in _SAY_NOTHING or word in _DOUBTFUL for word in words)
    if _CLEAR & set(words) or (doubtful and (sides or _DOUBTFUL & set(words))):
        raise DataError(
            f"{folder}: has the folder '{name}', which reads like a side of a split; expected train, val or test "
            "around or inside the label folders, or a name that cannot be taken for one"
        )
    return None


def _places(folders: Sequence[Parts], folder: Path) -> tuple[list[_Place], list[str]]:
    """Label and side of each image from its folders, and what had to be guessed."""
    distinct = sorted(set(folders))
    sides = {name: _side(name, folder) for name in sorted({part for parts in distinct for part in parts})}
    depths = {parts: [i for i, part in enumerate(parts) if sides[part]] for parts in distinct}
    if not any(depths.values()):
        of, notes = _labelled({parts: parts for parts in distinct}, folder)
        places = {parts: _Place(label, None, owner) for parts, (label, owner) in of.items()}
        return [places[parts] for parts in folders], notes
    _check_sides(depths, folder)
    depth = next(iter(depths.values()))[0]
    before = {parts[:depth] for parts in distinct}
    after = {parts[depth + 1 :] for parts in distinct}
    if len(before) == 1:
        inside = {parts: parts[depth + 1 :] for parts in distinct}
    elif len(after) == 1:
        inside = {parts: parts[:depth] for parts in distinct}
    else:
        one, other = sorted(before)[:2]
        raise DataError(
            f"{folder}: has sides in several folders ({'/'.join(one)}, {'/'.join(other)}) with several folders inside "
            "them; expected labels around the sides or inside them, not both: give the folder that holds the sides"
        )
    of, notes = _labelled(inside, folder, around=len(before) > 1)
    places = {}
    for parts, (label, owner) in of.items():
        if len(before) == 1 and owner is not None:
            owner = parts[: depth + 1] + owner
        places[parts] = _Place(label, sides[parts[depth]], owner if owner is not None else parts[: depth + 1])
    return [places[parts] for parts in folders], notes + _one_sided_notes(places.values())


def _check_sides(depths: Mapping[Parts, Sequence[int]], folder: Path) -> None:
    """Refuse folders that are on no side, on two, or at several depths."""
    without = next((parts for parts, found in depths.items() if not found), None)
    within = next(parts for parts, found in depths.items() if found)
    if without is not None:
        beside = f"'{'/'.join(without)}'" if without else "images"
        raise DataError(
            f"{folder}: has {beside} beside '{'/'.join(within)}', which names a side of a split; expected all images "
            "on a side, or none: give the folder that holds the sides, or rename"
        )
    twice = next((parts for parts, found in depths.items() if len(found) > 1), None)
    if twice is not None:
        raise DataError(f"{folder}: '{'/'.join(twice)}' names a side twice; expected once")
    if len({found[0] for found in depths.values()}) > 1:
        other = next(parts for parts, found in depths.items() if found != depths[within])
        raise DataError(
            f"{folder}: has sides at several depths ('{'/'.join(within)}', '{'/'.join(other)}'), perhaps the same "
            "images twice; expected one: give the folder that holds one of them"
        )


def _labelled(
    inside: Mapping[Parts, Parts], folder: Path, around: bool = False
) -> tuple[dict[Parts, tuple[str, Parts | None]], list[str]]:
    """The label and the label folder of each folder, and what had to be guessed.

    Args:
        inside: for each folder of images, the part of it that may hold the label.
        folder: the root, for errors.
        around: whether the labels are known to be folders that differ, those around the sides.
    """
    values = set(inside.values())
    start = 0  # folders that all images share are no labels, if they say nothing (as 'images') or others must be
    while all(len(parts) > start for parts in values) and len({parts[start] for parts in values}) == 1:
        if not (around or _says_nothing(next(iter(values))[start])):
            break
        start += 1
    bare = next((whole for whole, parts in inside.items() if len(parts) == start), None)
    labelled = next((parts[start] for parts in inside.values() if len(parts) > start), None)
    if bare is not None and labelled is not None:
        raise DataError(
            f"{folder.joinpath(*bare)}: holds images in no label folder, while others are (as '{labelled}'); "
            "expected all or none"
        )
    if labelled is None:
        return dict.fromkeys(inside, (_ONE_CLASS, None)), []
    labels = sorted({parts[start] for parts in values})
    _check_labels(labels, folder)
    notes = []
    deeper = sorted({parts[start + 1] for parts in values if len(parts) > start + 1})
    if len(labels) == 1 and len(deeper) > 1:
        notes.append(
            f"all images are in the one folder '{labels[0]}', so there is one class; if its folders "
            f"({', '.join(deeper[:3])}{', ...' if len(deeper) > 3 else ''}) are the labels, give that folder"
        )
    return {whole: (parts[start], parts[: start + 1]) for whole, parts in inside.items()}, notes


def _check_labels(labels: Sequence[str], folder: Path) -> None:
    if len(labels) > 1 and all(map(_says_nothing, labels)):
        raise DataError(
            f"{folder}: the folders {', '.join(map(repr, labels[:3]))} name no labels; expected folders named by "
            "their labels, or all images in one folder"
        )
    folded: dict[str, str] = {}
    for label in labels:
        signs = re.findall(r"[^\w\s.,-]|-$", label)  # TB+ and TB- differ, no-finding and No_Finding do not
        other = folded.setdefault(" ".join(_words(label) + signs), label)
        if other != label:
            raise DataError(f"{folder}: has the label folders '{other}' and '{label}'; expected one spelling per label")


def _one_sided_notes(places: Iterable[_Place]) -> list[str]:
    sides: dict[str, set[str]] = {}
    for place in places:
        sides.setdefault(place.label, set()).add(str(place.side))
    return [f"the label '{label}' is in no training folder" for label, found in sides.items() if "train" not in found]


# ---------------------------------------------------------------- patients and splits


def _patients(
    ids: Sequence[str], heads: Sequence[Header], folder: Path, pattern: re.Pattern[str] | None
) -> tuple[list[str], list[str]]:
    """One patient per image, and what to note about them."""
    stated = ["" if _is_placeholder(head.patient) else str(head.patient) for head in heads]
    dicom = sum(head.patient is not None for head in heads)
    known = set(filter(None, stated))
    notes = []
    emptied = dicom - sum(map(bool, stated))
    if emptied:
        notes.append(f"{emptied} of {dicom} DICOM files state no PatientID, or one that stands for none")
    if len(known) == 1 and sum(map(bool, stated)) > 1:
        notes.append(f"all {sum(map(bool, stated))} PatientIDs are the same, '{next(iter(known))}': one side gets all")
    issuers: dict[str, set[str]] = {}
    for patient, head in zip(stated, heads, strict=True):
        if patient and head.issuer:
            issuers.setdefault(patient, set()).add(head.issuer)
    several = sum(len(found) > 1 for found in issuers.values())
    if several:
        notes.append(f"{several} PatientIDs have more than one IssuerOfPatientID and may be several people; one each")
    if pattern is not None:
        patients = [_matched(pattern, name, folder) for name in ids]
        notes.append(f"patients by the pattern {pattern.pattern}: {len(set(patients))}")
        return patients, notes + _spelling_notes(set(patients)) + _disagreement_notes(patients, stated)
    notes += _spelling_notes(known)
    patients = [patient or name for patient, name in zip(stated, ids, strict=True)]
    count = sum(map(bool, stated))
    if count:
        notes.append(f"patients by the PatientID of {count} DICOM files: {len(known)}")
    if count < len(ids):
        notes.append(
            f"patients unknown for {len(ids) - count} of {len(ids)} images: each counts as a patient of its own, "
            "so one person may be on both sides of the split (--patient-pattern states them)"
        )
    return patients, notes


def _is_placeholder(patient: str | None) -> bool:
    """Whether a PatientID stands for none, such as '', 'ANONYMOUS' or '0000'."""
    plain = re.sub(r"[\W_]", "", patient or "").casefold()
    return plain in _NO_NAMES or set(plain) <= {"0"}


def _matched(pattern: re.Pattern[str], name: str, folder: Path) -> str:
    match = pattern.search(name)
    if match is None or not match[1]:
        raise DataError(
            f"{folder / name}: patient_pattern '{pattern.pattern}' finds no patient in '{name}'; expected a group that "
            r"finds one in every name, as '(p\d+)_' does in 'p17_2.png'"
        )
    return match[1]


def _spelling_notes(patients: set[str]) -> list[str]:
    """Patients that may be one person under two names."""
    spelled: dict[str, list[str]] = {}
    for patient in sorted(patients):
        spelled.setdefault(re.sub(r"[\W_]", "", patient).casefold().lstrip("0"), []).append(patient)
    doubtful = [names for names in spelled.values() if len(names) > 1]
    if not doubtful:
        return []
    return [
        f"{len(doubtful)} times patients differ only in case, signs or leading zeros (as '{doubtful[0][0]}' and "
        f"'{doubtful[0][1]}'): each spelling counts as a person"
    ]


def _disagreement_notes(patients: Sequence[str], stated: Sequence[str]) -> list[str]:
    """Where the pattern's patients and the PatientIDs are not the same people."""
    pairs = {(patient, other) for patient, other in zip(patients, stated, strict=True) if other}
    parted = sum(count > 1 for count in Counter(other for _, other in pairs).values())
    joined = sum(count > 1 for count in Counter(patient for patient, _ in pairs).values())
    notes = []
    if parted:
        notes.append(
            f"the pattern gives several patients for {parted} PatientIDs of the DICOM files: one person may be on both "
            "sides of the split"
        )
    if joined:
        notes.append(f"the pattern gives one patient for several PatientIDs of the DICOM files, {joined} times")
    return notes


def _splits(places: Sequence[_Place], patients: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Splits, the rule in one line, and what to note."""
    by_hash = [split_of_patient(patient) for patient in patients]
    said = [place.side for place in places if place.side is not None]
    if not said:
        return by_hash, "by patient: sha256 of the patient, mod 10; 0 and 1 test, 2 validation", []
    notes = [] if "test" in said else ["there is no test folder: the test split is empty"]
    if "val" in said:
        return said, "as the folders train, val and test say", notes
    carved = ["val" if side == "train" and other == "val" else side for side, other in zip(said, by_hash, strict=True)]
    return carved, "as the folders say; validation: patients of train whose sha256, mod 10, is 2", notes


def _copies_on_one_side(
    ids: Sequence[str],
    pictures: Sequence[bytes],
    places: Sequence[_Place],
    patients: Sequence[str],
    splits: Sequence[str],
    stated: bool,
) -> tuple[list[str], set[int], list[str]]:
    """No picture on two sides: splits, the positions that are kept, and what to note.

    If the folders state the split, the copy on the side that learns more is left out. Otherwise the patients of copies
    go to one side together, that of the first of them by name.
    """
    groups: dict[bytes, list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture, []).append(i)
    copies = [group for group in groups.values() if len(group) > 1]
    across = [group for group in copies if len({splits[i] for i in group}) > 1]
    if not across:
        return list(splits), set(range(len(ids))), []
    if stated:
        left_out = set()
        for group in across:
            last = max(group, key=lambda i: SPLITS.index(splits[i]))
            left_out |= {i for i in group if splits[i] != splits[last]}
        first, second = (ids[i] for i in across[0][:2])
        notes = [
            f"{len(across)} pictures are on two sides of the split (as {first} and {second}): {len(left_out)} copies "
            "were left out of train or val"
        ]
        return list(splits), set(range(len(ids))) - left_out, notes
    leader = {patient: patient for patient in patients}

    def root(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for group in copies:
        for i in group[1:]:
            first, second = sorted((root(patients[group[0]]), root(patients[i])))
            leader[second] = first
    moved = [split_of_patient(root(patient)) for patient in patients]
    notes = [
        f"{len(across)} pictures are stored more than once under different patients: those patients were put on one "
        "side of the split"
    ]
    return moved, set(range(len(ids))), notes
