"""Sources that are folders of image files: find the files, check them, and read them from memory or from disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medvdm.data import content, convert
from medvdm.errors import DataError, InputError, MissingFileError
from medvdm.images import as_unit_float

MEMORY_LIMIT = 1 << 30  # bytes of pixels kept in memory; more is decoded anew at every read
_THREADS = min(8, os.cpu_count() or 1)  # decoders release the GIL

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class FileImages:
    """Images from files, all of one shape: what a source passes on to ImageData."""

    reader: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    image_shape: tuple[int, int, int]
    notes: tuple[str, ...]
    digests: Callable[[], tuple[bytes, ...]] = field(repr=False)


def existing_folder(data_dir: str | None, source: str, holding: str) -> Path:
    """The folder that ``--data-dir`` names.

    Raises:
        InputError: none was given.
        MissingFileError: it is not there.
        DataError: it is a file.
    """
    if not data_dir:
        raise InputError(f"data_dir: not given; --data {source} needs --data-dir, {holding}")
    folder = Path(data_dir).expanduser()
    if not folder.exists():
        raise MissingFileError(f"{folder}: no such folder; expected {holding}")
    if not folder.is_dir():
        raise DataError(f"{folder}: found a file; expected {holding}")
    return folder


def walk(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files below ``folder`` with one of ``suffixes``, sorted by their path relative to it.

    Hidden files and folders and ``__MACOSX`` are skipped. Links to folders are followed, each folder once.

    Raises:
        DataError: a folder that cannot be listed.
    """

    def refuse(problem: OSError) -> None:
        raise DataError(f"{problem.filename}: the folder cannot be read ({problem.strerror})") from None

    wanted = tuple(suffixes)
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        found += [Path(here, name) for name in files if not name.startswith(".") and name.lower().endswith(wanted)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def open_images(paths: Sequence[Path], image_size: int | None, fit: convert.Fit) -> FileImages:
    """Check every file's header and give a reader of the images, from memory if they fit in MEMORY_LIMIT.

    Raises:
        DataError: a file that is no image; images of several sizes without ``image_size``; if the images are
            kept in memory also a damaged one. Otherwise the reader raises that.
    """
    headers = threaded(convert.header, paths)
    height, width = (image_size, image_size) if image_size is not None else _common_size(paths, headers)
    notes = _size_notes(headers, image_size, fit)
    keep_bytes = image_size is None and all(header.is_uint8 for header in headers)
    dtype = np.dtype(np.uint8 if keep_bytes else np.float32)
    decoder = _Decoder(tuple(paths), (height, width), image_size, fit, dtype)
    reader = in_memory(decoder, (len(paths), height, width, 1), dtype)
    changed = [fit] if image_size is not None and any(header.height != header.width for header in headers) else []
    return FileImages(reader, (height, width, 1), notes, lambda: content.of_files(paths, changed))


def in_memory(
    read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[np.ndarray], np.ndarray]:
    """Read all images once if they fit in MEMORY_LIMIT; give a reader of float32 with the same values either way.

    Args:
        read: maps integer positions to images of ``dtype``: uint8, or float32 in [0, 1].
        shape: (N, H, W, C) of all images.
        dtype: uint8 or float32.
    """
    if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize > MEMORY_LIMIT:
        return lambda indices: as_unit_float(read(indices))
    kept = np.empty(shape, dtype)
    for start in range(0, shape[0], 256):  # in blocks, so that the whole is never there twice
        block = np.arange(start, min(start + 256, shape[0]))
        kept[block] = read(block)
    return lambda indices: as_unit_float(kept[indices])


def threaded(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """``function`` of every item, in order; the first exception in that order is raised."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


@dataclass(frozen=True)
class _Decoder:
    paths: tuple[Path, ...]
    size: tuple[int, int]
    image_size: int | None
    fit: convert.Fit
    dtype: np.dtype[Any]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.size, 1), self.dtype)
        for position, image in enumerate(threaded(self._one, [self.paths[i] for i in indices])):
            out[position] = image
        return out

    def _one(self, path: Path) -> np.ndarray:
        if self.dtype == np.uint8:
            image = convert.read_gray(path)[..., None]
        else:
            image = convert.read_image(path, self.image_size, self.fit)
        if image.shape[:2] != self.size or image.dtype != self.dtype:  # its header said otherwise before
            raise DataError(
                f"{path}: found {_text(image.shape)} pixels of {image.dtype}; "
                f"expected {_text(self.size)} of {self.dtype}, as when the folder was first read"
            )
        return image


def _common_size(paths: Sequence[Path], headers: Sequence[convert.Header]) -> tuple[int, int]:
    sizes = [(header.height, header.width) for header in headers]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise DataError(
            f"images of different sizes: {paths[0]} has {_text(sizes[0])} pixels, {paths[other]} has "
            f"{_text(sizes[other])}; expected one size, give --image-size to bring them to one"
        )
    return sizes[0]


def _size_notes(headers: Sequence[convert.Header], image_size: int | None, fit: convert.Fit) -> tuple[str, ...]:
    if image_size is None:
        return ()
    sizes = Counter((header.height, header.width) for header in headers)
    if set(sizes) == {(image_size, image_size)}:
        return ()
    listed = _text(next(iter(sizes))) if len(sizes) == 1 else f"{len(sizes)} different sizes"
    notes = [f"resized from {listed} (width x height) to {image_size} x {image_size} pixels"]
    not_square = sum(count for (height, width), count in sizes.items() if height != width)
    if not_square:
        how = {"pad": "padded with black", "crop": "cropped to the centre square", "stretch": "stretched to a square"}
        notes.append(f"{not_square} of {len(headers)} images are not square: {how[fit]}")
    if any(min(size) < image_size for size in sizes):
        notes.append("some images were smaller than that and were enlarged")
    return tuple(notes)


def _text(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
