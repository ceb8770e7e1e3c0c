"""The 2-D sets of MedMNIST v2 and MedMNIST+ (Yang et al., Scientific Data 2023), in their official files.

Names, classes and checksums are the facts of release 3.0.2 (Zenodo record 10519652). A file that the caller
points at is read as it is; a downloaded one is held against its official MD5.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from medvdm.data import content, files
from medvdm.data.base import SPLITS, ImageData, Reading
from medvdm.data.convert import Fit, resize
from medvdm.errors import DataError, InputError, MissingFileError, nearest
from medvdm.images import as_unit_float

SIZES = (28, 64, 128, 224)
_URL = "https://zenodo.org/records/10519652/files/{file}?download=1"
_NO_FINDING = "no finding"


@dataclass(frozen=True, kw_only=True)
class _Flag:
    what: str
    channels: int
    classes: tuple[str, ...]
    md5: Mapping[int, str]
    multi_label: bool
    license: str


def _table() -> dict[str, _Flag]:
    """The sets by name, from ``medmnist.json`` beside this module."""
    table = json.loads(resources.files("medvdm.data").joinpath("medmnist.json").read_text(encoding="utf-8"))
    return {
        name: _Flag(
            **{
                **facts,
                "classes": tuple(facts["classes"]),
                "md5": {int(size): md5 for size, md5 in facts["md5"].items()},
            }
        )
        for name, facts in table.items()
    }


_FLAGS = _table()
FLAGS = tuple(_FLAGS)


def load(flag: str, data_dir: str | None = None, image_size: int | None = None, fit: Fit = "pad") -> ImageData:
    """Load a MedMNIST set with its official split.

    Args:
        flag: one of :data:`FLAGS`, such as 'pneumoniamnist'.
        data_dir: a file, or a folder that holds ``{flag}.npz`` or ``{flag}_{size}.npz``; None downloads the
            official file into the cache folder of the user.
        image_size: new height and width in pixels: the file of that size, otherwise the next larger one, resized.
            None takes the smallest.
        fit: what happens to images that are not square (no official file has any).

    Raises:
        InputError: unknown flag.
        MissingFileError: the file is not there, or could not be downloaded.
        DataError: the file does not hold what it should, or its checksum is wrong.
    """
    if flag not in _FLAGS:
        raise InputError(f"data: '{flag}'; {nearest(flag, FLAGS)}")
    info = _FLAGS[flag]
    if data_dir is None:
        path, notes = _download(flag, _wanted_sizes(image_size)[0]), []
    else:
        path = _local_file(flag, data_dir, image_size)
        notes = [f"{path.name} was given by the user and read as it is, without a checksum"]

    images, raw_labels, splits = _read(path, info)
    labels, class_names = _multi_hot(raw_labels, info, path)
    ids = _ids(splits)
    notes.append("the file names no patients: its split is kept, but whether it divides by patient is not known here")
    reader, shape = _reader(images, image_size, fit)
    rounded_from: tuple[str, ...] = ()
    digests = None  # of what the reader gives, which is exactly what the file holds
    if shape != images.shape[1:3]:
        # Of the file's own pixels, taken now so that they need not be kept: resized floats may differ by machine.
        changed = [fit] if images.shape[1] != images.shape[2] else []
        taken = content.of_images(lambda indices: as_unit_float(images[indices]), len(ids), changed)
        digests = lambda: taken  # noqa: E731
        resized = f"resized from {images.shape[2]} x {images.shape[1]}"
        notes.append(f"{resized} to {image_size} x {image_size} pixels")
        rounded_from = (resized,)
    return ImageData(
        name=flag,
        origin=f"{info.what} of MedMNIST (Yang et al., Scientific Data 2023; {info.license}), file {path.name}",
        ids=ids,
        labels=labels,
        class_names=class_names,
        patients=np.array(ids),
        splits=splits,
        split_rule="official split of MedMNIST",
        image_shape=(*shape, info.channels),
        reader=reader,
        notes=tuple(notes),
        reading=Reading(
            seen=len(ids),
            read=len(ids),
            stored_range=(int(images.min()) / 255, int(images.max()) / 255),
            rounded_from=rounded_from,
        ),
        digests=digests,
    )


# ---------------------------------------------------------------- which file


def _file_name(flag: str, size: int) -> str:
    return f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"


def _wanted_sizes(image_size: int | None) -> list[int]:
    """Official sizes, the best first: the smallest that needs no enlarging, then the larger, then the smaller ones."""
    least = image_size or 0
    return [size for size in SIZES if size >= least] + [size for size in reversed(SIZES) if size < least]


def _local_file(flag: str, data_dir: str, image_size: int | None) -> Path:
    place = Path(data_dir).expanduser()
    if place.is_file():
        other = re.sub(r"(_\d+)?\.npz$", "", place.name)
        if other in _FLAGS and other != flag:
            raise DataError(f"{place}: is named as {other}; expected a file of {flag}, or --data {other}")
        return place
    if not place.is_dir():
        raise MissingFileError(f"{place}: no such file or folder; expected {_file_name(flag, 28)} or a folder with it")
    candidates = [place / _file_name(flag, size) for size in _wanted_sizes(image_size)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        listed = ", ".join(sorted(path.name for path in candidates))
        raise MissingFileError(f"{place}: has no file of {flag}; expected one of {listed}")
    return found


def _download(flag: str, size: int) -> Path:
    """The official file from the user's cache, downloaded if it is not there, checked against its MD5 either way."""
    import pooch

    name = _file_name(flag, size)
    by_hand = f"download {_URL.format(file=name)} by hand and give --data-dir FOLDER, the folder with it"
    try:
        return Path(
            pooch.retrieve(
                _URL.format(file=name),
                known_hash=f"md5:{_FLAGS[flag].md5[size]}",
                fname=name,
                path=pooch.os_cache("medvdm"),
                downloader=pooch.HTTPDownloader(timeout=60),
            )
        )
    except ValueError as problem:  # pooch: the checksum is another
        if "hash" not in str(problem):
            raise MissingFileError(f"{name}: could not be downloaded ({_short(problem)}); {by_hand}") from None
        raise DataError(f"{name}: the download is not the official file (other checksum); {by_hand}") from None
    except Exception as problem:  # whatever the network or the cache folder raises
        raise MissingFileError(f"{name}: could not be downloaded ({_short(problem)}); {by_hand}") from None


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


# ---------------------------------------------------------------- what is in it


def _read(path: Path, info: _Flag) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images uint8 (N, H, W, C), labels (N, ...), splits (N,)) of a file, in the order train, val, test."""
    arrays = _arrays(path)
    images, labels, splits = [], [], []
    for split in SPLITS:
        part, part_labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        _check_images(part, f"{path}: {split}_images", info)
        if len(part_labels) != len(part):
            raise DataError(f"{path}: {len(part_labels)} {split}_labels; expected {len(part)}, one per image")
        if part_labels.dtype.kind not in "iu" or part_labels.ndim not in (1, 2):
            raise DataError(
                f"{path}: {split}_labels are {part_labels.dtype} of shape {part_labels.shape}; "
                "expected integers of shape (N, 1) or (N, K)"
            )
        images.append(part.reshape(*part.shape[:3], info.channels))
        labels.append(part_labels.reshape(len(part_labels), -1))
        splits += [split] * len(part)
    if len({part.shape[1:] for part in images}) > 1 or len({part.shape[1:] for part in labels}) > 1:
        raise DataError(f"{path}: the splits differ in the shape of images or labels; expected one shape")
    return np.concatenate(images), np.concatenate(labels), np.array(splits)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The six arrays of a MedMNIST file.

    Raises:
        DataError: no such archive, a damaged one, arrays lacking, or more than memory holds.
    """
    needed = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
    expected = f"expected a MedMNIST .npz with {', '.join(needed)}"
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: found a single array; {expected}")
            lacking = [key for key in needed if key not in archive.files]
            if lacking:
                raise DataError(f"{path}: lacks {', '.join(lacking)}; found {', '.join(archive.files) or 'nothing'}")
            return {key: archive[key] for key in needed}
    except DataError:
        raise
    except MemoryError as problem:
        raise DataError(f"{path}: does not fit in memory ({problem}); take a smaller --image-size") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as problem:
        raise DataError(f"{path}: cannot be read ({_short(problem)}); {expected}") from None


def _check_images(images: np.ndarray, name: str, info: _Flag) -> None:
    shape = "(N, H, W)" if info.channels == 1 else f"(N, H, W, {info.channels})"
    fits = images.ndim == 3 if info.channels == 1 else images.ndim == 4 and images.shape[3] == info.channels
    if images.dtype != np.uint8 or not fits or 0 in images.shape[1:]:
        first = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3)
        hint = "; channels first? np.moveaxis(images, 1, -1)" if first else ""
        raise DataError(f"{name} is {images.dtype} of shape {images.shape}; expected uint8 of shape {shape}{hint}")


def _multi_hot(raw: np.ndarray, info: _Flag, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """uint8 (N, K) and the K names. Rows of zeros in a multi-label set get a class of their own."""
    columns, top = (len(info.classes), 1) if info.multi_label else (1, len(info.classes) - 1)
    if raw.shape[1] != columns:
        raise DataError(f"{path}: labels of shape {raw.shape}; expected (N, {columns})")
    if raw.size and (raw.min() < 0 or raw.max() > top):
        raise DataError(f"{path}: labels from {raw.min()} to {raw.max()}; expected 0 to {top}")
    if not info.multi_label:
        return np.eye(len(info.classes), dtype=np.uint8)[raw[:, 0]], info.classes
    none = ~raw.any(axis=1, keepdims=True)
    return np.concatenate([raw, none], axis=1).astype(np.uint8), (*info.classes, _NO_FINDING)


def _ids(splits: np.ndarray) -> tuple[str, ...]:
    """train_0, train_1, ..., val_0, ...: the positions in the file's arrays."""
    return tuple(f"{split}_{i}" for split in SPLITS for i in range(int((splits == split).sum())))


def _reader(
    images: np.ndarray, image_size: int | None, fit: Fit
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int]]:
    """A reader of images, uint8 as in the file or resized float32, and their (height, width)."""
    if image_size is None or images.shape[1:3] == (image_size, image_size):
        return lambda indices: images[indices], images.shape[1:3]

    def resized(indices: np.ndarray) -> np.ndarray:
        new = [resize(image, image_size, fit) for image in as_unit_float(images[indices])]
        return np.stack(new) if new else np.empty((0, image_size, image_size, images.shape[3]), np.float32)

    shape = (len(images), image_size, image_size, images.shape[3])
    return files.in_memory(resized, shape, np.dtype(np.float32)), (image_size, image_size)
