"""Sources that are folders of image files: find the files, check them, and read them from memory or from disk."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medvdm.data import content, convert
from medvdm.data.stored import Header, NoImageError, Window
from medvdm.errors import DataError, InputError, MissingFileError

MEMORY_LIMIT = 1 << 30  # bytes of pixels kept in memory; more is decoded anew at every read
WINDOWS = ("full", "data", "percentile")
PERCENTILES = (0.1, 99.9)
LITTLE = 0.25  # of the range that files could hold; less is noted
RANGE_SAMPLE = 256  # files whose range is looked at, where the images are not kept in memory
WINDOW_SAMPLE = 2000  # files from which a window is taken
HIDDEN, SIDECAR = "hidden file", "sidecar file (text, table or index)"
_SIDECARS = (
    *(".csv", ".tsv", ".txt", ".json", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm", ".pdf", ".doc"),
    *(".docx", ".xls", ".xlsx", ".log", ".py", ".ipynb", ".sh", ".ini", ".db", ".sha256", ".md5"),
)
_TEXTS = ("README", "LICENSE", "LICENCE", "CHECKSUMS", "SHA256SUMS", "MD5SUMS", "MANIFEST")
_THREADS = min(8, os.cpu_count() or 1)  # decoders release the GIL

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class FileImages:
    """Images from files, all of one shape: what a source passes on to ImageData.

    Attributes:
        reader: maps integer positions to images: uint8 if that is what all files hold and none is resized, otherwise
            float32 in [0, 1].
        image_shape: (height, width, 1).
        notes: what a reader of the model card should know.
        stored_range: least and greatest stored value as fractions of what the files could hold; None if a file states
            no range.
        rounded_from: what may put gray values between two of 256 levels, see :class:`medvdm.data.Reading`.
        digests: gives one digest per file, of its bytes and of whatever changes the picture after decoding.
        pictures: one key per file, the same for files with the same picture (images in memory) or the same bytes.
    """

    reader: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    image_shape: tuple[int, int, int]
    notes: tuple[str, ...]
    stored_range: tuple[float, float] | None
    rounded_from: tuple[str, ...]
    digests: Callable[[], tuple[bytes, ...]] = field(repr=False)
    pictures: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Survey:
    """All files below a folder.

    Attributes:
        images: files that are or should be images, sorted by their path relative to the folder.
        skipped: why each of the others was left out.
        empty: folders without a file (hidden files apart).
    """

    images: tuple[Path, ...]
    skipped: dict[Path, str]
    empty: tuple[Path, ...]


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
    _check_name(folder)
    if not folder.exists():
        raise MissingFileError(f"{folder}: no such folder; expected {holding}")
    if not folder.is_dir():
        raise DataError(f"{folder}: found a file; expected {holding}")
    return folder


def walk(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files below ``folder`` with one of ``suffixes``, sorted by their path relative to it.

    Hidden files and folders and ``__MACOSX`` are skipped. Links to folders are followed, each folder once.

    Raises:
        DataError: a folder that cannot be listed, or a name that is not UTF-8.
    """
    wanted = tuple(suffixes)
    files = _all_files(folder)[0]
    found = [path for path in files if not path.name.startswith(".") and path.name.lower().endswith(wanted)]
    for path in found:
        _check_name(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def survey(folder: Path) -> Survey:
    """All files below ``folder``: which are images by their first bytes or by their names, and why the others are not.

    A file whose name says that it is an image is taken as one, so that a damaged one is refused later and not skipped.

    Raises: as :func:`walk`.
    """
    paths, empty = _all_files(folder)
    reasons = threaded(_reason_to_skip, paths)
    images = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    for path in images:
        _check_name(path)
    return Survey(
        images=tuple(sorted(images, key=lambda path: path.relative_to(folder).as_posix())),
        skipped={path: reason for path, reason in zip(paths, reasons, strict=True) if reason is not None},
        empty=tuple(empty),
    )


def headers(paths: Sequence[Path]) -> list[Header | None]:
    """The header of each image file; None for a DICOM file without a picture.

    Raises: as :func:`medvdm.data.convert.header`.
    """

    def one(path: Path) -> Header | None:
        try:
            return convert.header(path)
        except NoImageError:
            return None

    return threaded(one, paths)


def parsed_window(window: str) -> str | Window:
    """'full', 'data', 'percentile', or the two numbers of 'LOW,HIGH'.

    Raises:
        InputError: something else, numbers that are not finite, or LOW not below HIGH.
    """
    if window in WINDOWS:
        return window
    try:
        low, high = (float(number) for number in window.split(","))
    except ValueError:
        raise InputError(f"window: '{window}'; expected LOW,HIGH or {', '.join(WINDOWS)}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"window: '{window}'; expected finite numbers LOW,HIGH with LOW below HIGH")
    return low, high


def open_images(
    paths: Sequence[Path],
    image_size: int | None,
    fit: convert.Fit,
    *,
    window: str = "full",
    found: Sequence[Header] | None = None,
    training: Sequence[int] | None = None,
) -> FileImages:
    """Check every file's header and give a reader of the images, from memory if they fit in MEMORY_LIMIT.

    Args:
        paths: the files.
        image_size: new height and width in pixels; None keeps the size of the files.
        fit: what happens to images that are not square, see :func:`medvdm.data.convert.resize`.
        window: stored values that become 0 and 1, see :class:`medvdm.data.DataConfig`.
        found: the files' headers, if they have been read.
        training: positions of the files from which the windows 'data' and 'percentile' are taken; None: all.

    Raises:
        InputError: a window that cannot be used.
        DataError: a file that is no image; images of several sizes without ``image_size``; a window for files whose
            stored values have several meanings; if the images are kept in memory also a damaged one. Otherwise the
            reader raises that.
    """
    heads = threaded(convert.header, paths) if found is None else list(found)
    height, width = (image_size, image_size) if image_size is not None else _common_size(paths, heads)
    limits, window_notes = _window(paths, heads, window, range(len(paths)) if training is None else training)
    resized = any((head.height, head.width) != (height, width) for head in heads)
    keep_bytes = not resized and limits is None and all(head.is_uint8 for head in heads)
    dtype = np.dtype(np.uint8 if keep_bytes else np.float32)
    decoder = _Decoder(tuple(paths), (height, width), image_size, fit, limits, dtype)
    shape = (len(paths), height, width, 1)
    decoded: dict[int, _Decoded] = {}
    if fits_in_memory(shape, dtype):
        kept = np.empty(shape, dtype)
        for block in _blocks(len(paths)):
            for index, one in zip(block, threaded(decoder.decode, block), strict=True):
                kept[index] = one.image
                decoded[index] = replace(one, image=None)

        def reader(indices: np.ndarray) -> np.ndarray:
            return kept[indices]

        pictures = [decoded[index].picture for index in range(len(paths))]
    else:
        sample = _spread(range(len(paths)), RANGE_SAMPLE)
        decoded = {i: replace(one, image=None) for i, one in zip(sample, threaded(decoder.decode, sample), strict=True)}

        def reader(indices: np.ndarray) -> np.ndarray:
            return decoder(indices)

        pictures = same_files(paths)
    ranges, range_notes = _range_notes(decoded, heads, len(paths), limits)
    notes = (*_size_notes(heads, image_size, fit), *window_notes, *range_notes, *_remark_notes(heads))
    changed = [fit] if image_size is not None and any(head.height != head.width for head in heads) else []
    changed += [f"window {limits[0]!r} {limits[1]!r}"] if limits is not None else []
    return FileImages(
        reader=reader,
        image_shape=(height, width, 1),
        notes=notes,
        stored_range=ranges,
        rounded_from=_rounded_from(heads, (height, width), limits),
        digests=lambda: content.of_files(paths, changed),
        pictures=tuple(pictures),
    )


def fits_in_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether images of this shape are kept in memory."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize <= MEMORY_LIMIT


def same_files(paths: Sequence[Path]) -> list[bytes]:
    """One key per file, the same for files of the same bytes; most files are not read for it.

    Files of different sizes differ; of those of one size the middle is compared first, then the whole.
    """
    keys: list[tuple[Any, ...]] = [(path.stat().st_size,) for path in paths]
    for compare in (_middle, _whole):
        often = Counter(keys)
        again = [i for i, key in enumerate(keys) if often[key] > 1]
        for i, more in zip(again, threaded(compare, [paths[i] for i in again]), strict=True):
            keys[i] = (*keys[i], more)
    return [repr(key).encode() for key in keys]


def in_memory(
    read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[np.ndarray], np.ndarray]:
    """Read all images once if they fit in MEMORY_LIMIT; give a reader of the same images either way.

    Args:
        read: maps integer positions to images of ``dtype``: uint8, or float32 in [0, 1].
        shape: (N, H, W, C) of all images.
        dtype: uint8 or float32.
    """
    if not fits_in_memory(shape, dtype):
        return read
    kept = np.empty(shape, dtype)
    for block in _blocks(shape[0]):
        kept[block] = read(block)
    return lambda indices: kept[indices]


def threaded(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """``function`` of every item, in order; the first exception in that order is raised."""
    items = list(items)
    block = min(max(len(items) // (8 * _THREADS), 1), 256)  # a task per item would cost more than a small file
    blocks = [items[i : i + block] for i in range(0, len(items), block)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(chain.from_iterable(pool.map(lambda some: list(map(function, some)), blocks)))


def _blocks(n: int) -> Iterator[np.ndarray]:
    """All of 0, ..., n - 1 in parts, so that the whole is never there twice."""
    for start in range(0, n, 256):
        yield np.arange(start, min(start + 256, n))


def _spread(positions: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the positions, evenly spread."""
    if len(positions) <= most:
        return list(positions)
    return [positions[i] for i in np.linspace(0, len(positions) - 1, most).astype(int)]


def _middle(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size // 2 - 2048))
        return hashlib.blake2b(file.read(4096), digest_size=16).digest()


def _whole(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# ---------------------------------------------------------------- finding files


def _all_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below ``folder`` outside hidden folders, and the folders that hold nothing at all."""

    def refuse(problem: OSError) -> None:
        raise DataError(f"{problem.filename}: the folder cannot be read ({problem.strerror})") from None

    found: list[Path] = []
    empty: list[Path] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        found += [Path(here, name) for name in files]
        if not folders and all(map(_is_hidden, files)):
            empty.append(Path(here))
    return found, empty


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def _reason_to_skip(path: Path) -> str | None:
    """None for an image."""
    suffix = path.suffix.lower()
    if _is_hidden(path.name):
        return HIDDEN
    if path.name == "DICOMDIR" or suffix in _SIDECARS or path.stem.upper() in _TEXTS:
        return SIDECAR
    if suffix in convert.SUFFIXES:
        return None
    if not path.is_file():  # a pipe, or a link to nothing
        return "not a regular file"
    if convert.kind_of(path) is not None:
        return None
    suffix = "".join(path.suffixes[-2:]).lower() if suffix == ".gz" else suffix
    return f"not an image of a kind that is read: {f'*{suffix}' if suffix else 'without a suffix'}"


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"{ascii(str(path))}: found a name that is not UTF-8; expected one, rename it") from None


# ---------------------------------------------------------------- reading files


@dataclass(frozen=True)
class _Decoded:
    """One image, and what is to be known of it without its pixels.

    Attributes:
        image: (H, W, 1).
        used: least and greatest stored value as fractions of the file's range; None if it states no range.
        values: least and greatest stored value.
        picture: a key, the same for files with the same picture, whatever their kind.
    """

    image: np.ndarray | None
    used: Window | None
    values: Window
    picture: bytes


@dataclass(frozen=True)
class _Decoder:
    paths: tuple[Path, ...]
    size: tuple[int, int]
    image_size: int | None
    fit: convert.Fit
    window: Window | None
    dtype: np.dtype[Any]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.size, 1), self.dtype)
        for position, one in enumerate(threaded(self.decode, indices)):
            out[position] = one.image
        return out

    def decode(self, index: int) -> _Decoded:
        path = self.paths[index]
        stored = convert.read_stored(path)
        gray = stored.gray(str(path), self.window)
        if self.dtype == np.uint8:
            image = gray[..., None]
        else:
            image = convert.as_image(gray, path, self.image_size, self.fit)
        if image.shape[:2] != self.size or image.dtype != self.dtype:  # its header said otherwise before
            raise DataError(
                f"{path}: found {_text(image.shape)} pixels of {image.dtype}; "
                f"expected {_text(self.size)} of {self.dtype}, as when the folder was first read"
            )
        return _Decoded(
            image, stored.used(), (float(stored.values.min()), float(stored.values.max())), _picture_key(gray)
        )


def _picture_key(gray: np.ndarray) -> bytes:
    """The same for pictures of the same shape and values, whether they are bytes or the floats of those."""
    if gray.dtype != np.uint8:
        levels = np.rint(gray * np.float32(255)).astype(np.uint8)
        same = np.allclose(levels / np.float32(255), gray, rtol=0, atol=1e-6)  # 16 bits differ by 1.5e-5 or more
        gray = levels if same else np.rint(gray * np.float32(65535)).astype(np.uint16)
    return hashlib.blake2b(repr((gray.shape, gray.dtype.str)).encode() + gray.tobytes(), digest_size=16).digest()


def _window(
    paths: Sequence[Path], heads: Sequence[Header], window: str, training: Sequence[int]
) -> tuple[Window | None, list[str]]:
    """The two stored values that become 0 and 1 (None: each file's own range), and what to note."""
    asked = parsed_window(window)
    if asked == "full":
        ways = Counter(head.unit for head in heads if head.unit.startswith("DICOM"))
        if len(ways) < 2:
            return None, []
        return None, [
            f"DICOM files with {len(ways)} scales ({'; '.join(unit for unit, _ in ways.most_common(3))}, ...): each is "
            "brought to [0, 1] over its own range, so equal grays need not be equal values (--window gives them one)"
        ]
    other = next((i for i, head in enumerate(heads) if _meaning(head) != _meaning(heads[0])), None)
    if other is not None:
        raise DataError(
            f"window: '{window}'; {paths[0]} holds {heads[0].unit}, {paths[other]} {heads[other].unit}; expected one "
            "kind of stored values for one window"
        )
    if not isinstance(asked, str):
        return asked, [f"stored values from {asked[0]:g} to {asked[1]:g} became 0 to 1, those beyond were clipped"]
    images = "training images" if len(training) else "images"
    training = list(training) or list(range(len(paths)))
    sample = _spread(training, WINDOW_SAMPLE)
    grays = threaded(lambda i: _thinned(convert.read_stored(paths[i]).values, asked), sample)
    pooled = np.concatenate(grays)
    low, high = (float(value) for value in np.percentile(pooled, (0, 100) if asked == "data" else PERCENTILES))
    if not low < high:
        raise DataError(f"window: '{window}'; all stored values are {low:g}; expected at least two different ones")
    whose = f"{len(sample)} of the {len(training)}" if len(sample) < len(training) else f"the {len(sample)}"
    which = "least and greatest value" if asked == "data" else f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]}"
    return (low, high), [
        f"stored values from {low:g} to {high:g} became 0 to 1 ({which} of {whose} {images}), those beyond were clipped"
    ]


def _meaning(head: Header) -> str:
    return head.unit.partition(",")[0]


def _thinned(values: np.ndarray, window: str) -> np.ndarray:
    """The ends of the values, or every k-th of them: at most 10,000."""
    flat = values.ravel().astype(np.float64)
    if window == "data":
        return np.array([flat.min(), flat.max()])
    return flat[:: -(-flat.size // 10_000)]


def _range_notes(
    decoded: Mapping[int, _Decoded], heads: Sequence[Header], n: int, window: Window | None
) -> tuple[Window | None, list[str]]:
    """Least and greatest stored value as fractions, and a note for each kind of file that uses little of its range."""
    kinds: dict[str, list[_Decoded]] = {}
    for index, one in decoded.items():
        if one.used is not None:
            kinds.setdefault(",".join(heads[index].unit.split(",")[:2]), []).append(one)
    whose = "" if len(decoded) == n else f" (a sample of {len(decoded)} of {n})"
    notes = []
    for kind, ones in kinds.items():
        low, high = min(one.used[0] for one in ones), max(one.used[1] for one in ones)
        least, most = min(one.values[0] for one in ones), max(one.values[1] for one in ones)
        if window is None and high - low < LITTLE:
            spread = f"; --window={least:g},{most:g} or --window percentile spreads them" if least < most else ""
            if spread and len(kinds) > 1:
                spread = f"; a window spreads files of one kind, so give each of the {len(kinds)} kinds a folder"
            notes.append(
                f"{kind}: stored values from {least:g} to {most:g} use {high - low:.1%} of the files' range{whose}, so "
                f"pictures are flat{spread}"
            )
        if window is not None and (most <= window[0] or least >= window[1]):
            raise DataError(
                f"window: {window[0]:g},{window[1]:g} leaves nothing; the stored values are {least:g} to {most:g}"
            )
    used = [one.used for one in decoded.values()]
    if any(one is None for one in used):
        return None, notes
    overall = (min(one[0] for one in used), max(one[1] for one in used))
    if whose:
        notes.append(f"range of stored values: {overall[0]:.3f} to {overall[1]:.3f} of the files' range{whose}")
    return overall, notes


def _remark_notes(heads: Sequence[Header]) -> list[str]:
    counts = Counter(remark for head in heads for remark in head.remarks)
    return [f"{count} of {len(heads)} files: {remark}" for remark, count in counts.items()]


def _common_size(paths: Sequence[Path], headers: Sequence[Header]) -> tuple[int, int]:
    sizes = [(header.height, header.width) for header in headers]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise DataError(
            f"images of different sizes: {paths[0]} has {_text(sizes[0])} pixels, {paths[other]} has "
            f"{_text(sizes[other])}; expected one size, give --image-size to bring them to one"
        )
    return sizes[0]


def _size_notes(headers: Sequence[Header], image_size: int | None, fit: convert.Fit) -> tuple[str, ...]:
    if image_size is None:
        return ()
    sizes = Counter((header.height, header.width) for header in headers)
    if set(sizes) == {(image_size, image_size)}:
        return ()
    notes = [f"resized from {_listed(sizes)} (width x height) to {image_size} x {image_size} pixels"]
    not_square = sum(count for (height, width), count in sizes.items() if height != width)
    if not_square:
        how = {"pad": "padded with black", "crop": "cropped to the centre square", "stretch": "stretched to a square"}
        notes.append(f"{not_square} of {len(headers)} images are not square: {how[fit]}")
    if any(min(size) < image_size for size in sizes):
        notes.append("some images were smaller than that and were enlarged")
    return tuple(notes)


def _rounded_from(heads: Sequence[Header], size: tuple[int, int], window: Window | None) -> tuple[str, ...]:
    kinds = dict.fromkeys(",".join(head.unit.split(",")[:2]) for head in heads if not head.is_uint8)
    reasons = [f"files of {kind}" for kind in kinds]
    if window is not None:
        reasons.append(f"window {window[0]:g},{window[1]:g}")
    sizes = {(head.height, head.width) for head in heads}
    if sizes != {size}:
        reasons.append(f"resized from {_listed(sizes)}")
    return tuple(reasons)


def _listed(sizes: Collection[tuple[int, int]]) -> str:
    return _text(next(iter(sizes))) if len(sizes) == 1 else f"{len(sizes)} different sizes"


def _text(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
