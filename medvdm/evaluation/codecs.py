r"""What lossless codecs spend on the same images: the yardsticks beside a bound in true 8-bit bits per dimension.

All codecs come from imagecodecs (the extra ``codecs``) and write whole files, so their headers count:

* ``png``: libpng at level 9 with the filters and the deflate strategy that it chooses for pictures. An optimiser that
  tries every strategy saves another 3 % on chest X-rays of 256x256 pixels.
* ``webp``: libwebp, lossless, method 6. Gray is stored as three equal channels, which cost next to nothing. The full
  search of level 100 saves another 1 %, for about 18 times the time.
* ``jpegls``: CharLS. Channels are coded one beside the other, with no change of colour space.
* ``jxl``: libjxl, lossless, effort 9. Effort 10 takes four times as long and was no better on chest X-rays.

Every file is decoded again and compared: a number of this module belongs to a file that gives back the image.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from medvdm.errors import DataError, InputError, InputTypeError, MissingPackageError, nearest
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.images import channels_last, default_columns

Encoder = Callable[..., bytes]
Decoder = Callable[[bytes], np.ndarray]

#: By the name of a result: what imagecodecs calls the codec, and the settings of its encoder, each on one thread.
CODECS = {
    "png": ("png", {"level": 9, "strategy": 1}),  # Z_FILTERED
    "webp": ("webp", {"lossless": True, "level": 75, "method": 6, "numthreads": 1}),
    "jpegls": ("jpegls", {}),
    "jxl": ("jpegxl", {"lossless": True, "effort": 9, "numthreads": 1}),
}
#: Images with a side up to this are also coded as one sheet. A file has 20 to 80 bytes that hold no pixel: 0.2 to 0.8
#: bits per pixel of 28x28, 0.04 to 0.16 of 64x64, and at most 0.01 of 256x256. And a codec learns an image's
#: statistics from its pixels, of which a small image has few: a sheet of chest X-rays of 64x64 saves JPEG XL 0.33 bits
#: per pixel, of which headers are 0.04.
SHEET_SIDE = 64
SHEET_PIXELS = 2**20  #: more images than fill this make several sheets, which bounds memory and fits every format
_THREADS = min(8, os.cpu_count() or 1)  # encoders release the GIL


def codec_bits(levels: np.ndarray, patients: Sequence[str] | np.ndarray | None = None) -> dict[str, float | None]:
    r"""Bits per dimension of each codec on 8-bit images.

    Per image they are :math:`8 \cdot \text{bytes of the file} / (h w c)`, and ``png_bpd``, ``webp_bpd``, ``jpegls_bpd``
    and ``jxl_bpd`` are means over the images, each with its standard error by patient (``png_bpd_stderr``, ...; None
    with fewer than two patients). ``png_sheet_bpd``, ... are those of all images side by side in one file (its form:
    :func:`sheets`), which has no standard error. They are given for images with a side of at most 64 pixels, where
    headers count and a codec has little to learn from; None for larger ones.

    Args:
        levels: (n, h, w, c) or (n, h, w) uint8, gray or RGB.
        patients: the images' patients; each image its own if None.

    Raises:
        InputError, InputTypeError: levels of another shape or dtype; another number of patients than images.
        MissingPackageError: imagecodecs is not installed or lacks a codec.
        DataError: a codec cannot store an image (WebP: a side above 16,383), or does not give it back.
    """
    levels = _as_levels(levels)
    n, h, w, c = levels.shape
    patients = np.arange(n) if patients is None else np.asarray(patients)
    if patients.shape != (n,):
        raise InputError(f"patients: shape {patients.shape}; expected {(n,)}, one per image")
    result: dict[str, float | None] = {}
    for name, sizes in _file_bytes(levels).items():
        bits = sizes * 8 / (h * w * c)
        stderr = clustered_stderr(bits, patients)
        result |= {f"{name}_bpd": float(bits.mean()), f"{name}_bpd_stderr": None if math.isnan(stderr) else stderr}
    return result | sheet_bits(levels)


def sheet_bits(levels: np.ndarray) -> dict[str, float | None]:
    """Bits per dimension of all images side by side in one file: ``png_sheet_bpd``, ... as of :func:`codec_bits`.

    Args:
        levels: (n, h, w, c) or (n, h, w) uint8, gray or RGB.

    Raises: as :func:`file_bytes`.
    """
    levels = _as_levels(levels)
    if not has_sheets(levels.shape[1:]):
        return {f"{name}_sheet_bpd": None for name in CODECS}
    whole = _file_bytes(sheets(levels))
    return {f"{name}_sheet_bpd": float(sizes.sum() * 8 / levels.size) for name, sizes in whole.items()}


def has_sheets(image_shape: tuple[int, ...]) -> bool:
    """Whether images (h, w, c) are so small that they are also coded as one sheet."""
    return min(image_shape[:2]) <= SHEET_SIDE


def check() -> None:
    """Refuse to start where a codec is missing.

    Raises:
        MissingPackageError: imagecodecs is not installed or lacks a codec.
    """
    _load()


def file_bytes(levels: np.ndarray, names: Sequence[str] = tuple(CODECS)) -> dict[str, np.ndarray]:
    """The size in bytes of every image's file, for each codec, as integers (n,) in the order of the images.

    Args:
        levels: (n, h, w, c) or (n, h, w) uint8, gray or RGB.
        names: which of :data:`CODECS`.

    Raises:
        InputError, InputTypeError: levels of another shape or dtype; an unknown codec.
        MissingPackageError: imagecodecs is not installed or lacks a codec.
        DataError: a codec cannot store an image, or does not give it back.
    """
    for name in names:
        if name not in CODECS:
            raise InputError(f"codec: '{name}'; {nearest(name, CODECS)}")
    return _file_bytes(_as_levels(levels), names)


def sheets(levels: np.ndarray) -> list[np.ndarray]:
    """Images (n, h, w, c) side by side without gaps, as nearly square sheets of at most about a million pixels.

    One sheet, unless there are more images. What the last row lacks is black. Read row by row, a sheet holds its images
    in their order; the last sheet is shorter than the others.
    """
    n, h, w, c = levels.shape
    most = max(1, SHEET_PIXELS // (h * w))
    result = []
    for part in (levels[start : start + most] for start in range(0, n, most)):
        columns = default_columns(len(part))
        rows = -(-len(part) // columns)
        cells = np.zeros((rows * columns, h, w, c), levels.dtype)
        cells[: len(part)] = part
        sheet = cells.reshape(rows, columns, h, w, c).swapaxes(1, 2)
        result.append(sheet.reshape(rows * h, columns * w, c))
    return result


def _as_levels(levels: np.ndarray) -> np.ndarray:
    levels = np.asarray(levels)
    if levels.dtype != np.uint8:
        raise InputTypeError(f"levels: dtype {levels.dtype}; expected uint8, gray values from 0 to 255")
    return channels_last(levels, "levels")


def _file_bytes(images: Iterable[np.ndarray], names: Sequence[str] = tuple(CODECS)) -> dict[str, np.ndarray]:
    """The same for images (h, w, c) that may differ in size."""
    codecs = _load()
    tasks = [(name, i, image, *codecs[name]) for i, image in enumerate(images) for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:  # a thread holds one file, and returns its size
        sizes = list(pool.map(lambda task: _size(*task), tasks))
    return {name: np.array(sizes[k :: len(names)], np.int64) for k, name in enumerate(names)}


def _load() -> dict[str, tuple[Encoder, Decoder]]:
    """Encoder and decoder by name of the codec."""
    remedy = "pip install 'medvdm[codecs]'"
    try:
        import imagecodecs
    except ImportError:
        raise MissingPackageError(f"codecs: the package imagecodecs is not installed; {remedy}") from None
    pairs: dict[str, tuple[Encoder, Decoder]] = {}
    for name, (called, settings) in CODECS.items():
        if not getattr(imagecodecs, called.upper()).available:
            raise MissingPackageError(f"codecs: imagecodecs {imagecodecs.__version__} has no {called}; {remedy}")
        encode = functools.partial(getattr(imagecodecs, f"{called}_encode"), **settings)
        pairs[name] = encode, getattr(imagecodecs, f"{called}_decode")
    return pairs


def _size(name: str, i: int, image: np.ndarray, encode: Encoder, decode: Decoder) -> int:
    """Bytes of one image's file, which was decoded and compared."""
    h, w, c = image.shape
    if c == 1:  # imagecodecs takes gray as (h, w); WebP has no gray
        image = np.repeat(image, 3, axis=2) if name == "webp" else image[..., 0]
    # imagecodecs gives JPEG-LS too little room for noise; a code word has at most 32 bits for a value.
    room = {"out": 4 * image.size + 1024} if name == "jpegls" else {}
    try:
        file = encode(np.ascontiguousarray(image), **room)
        same = np.array_equal(decode(file), image)
    except (RuntimeError, ValueError) as error:  # every codec has its own kind of the first
        raise DataError(f"{name}: cannot store image {i}, {h}x{w}x{c}: {' '.join(str(error).split())}") from error
    if not same:
        raise DataError(f"{name}: image {i}, {h}x{w}x{c}, is not what its file holds; expected a lossless codec")
    return len(file)
