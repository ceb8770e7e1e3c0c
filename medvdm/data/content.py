"""Digests that tell whether two pictures are the same, on every machine: of pixels, or of the bytes of files.

A digest of pixels is taken from the values in [0, 1]: uint8 images and the floats read from them agree. A digest of a
file is taken from its bytes, since decoders may differ in the last digit from machine to machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from medvdm.errors import DataError, MissingFileError

WHOLE_BYTES = 2 << 30  # files that take more than this together are hashed by samples of their bytes
SAMPLES, SAMPLE_BYTES = 8, 4096  # of one file: spread evenly, the first and the last bytes among them

_BLOCK = 256  # images or files that are read at a time
_THREADS = min(8, os.cpu_count() or 1)


def of_images(
    reader: Callable[[np.ndarray], np.ndarray], count: int, settings: Sequence[str] = ()
) -> tuple[bytes, ...]:
    """One digest per image, of every pixel.

    Args:
        reader: maps integer positions to float32 of shape (n, H, W, C) in [0, 1].
        count: number of images.
        settings: whatever else changes the pictures after ``reader``.
    """
    digests: list[bytes] = []
    start = _started(settings)
    for first in range(0, count, _BLOCK):
        block = np.asarray(reader(np.arange(first, min(first + _BLOCK, count))), dtype="<f4")
        levels = np.rint(block * np.float32(255)).astype(np.uint8)
        is_bytes = (levels.astype(np.float32) / np.float32(255) == block).all(axis=(1, 2, 3))
        for exact, bytes_, floats in zip(is_bytes, levels, block, strict=True):
            one = start.copy()
            one.update(np.ascontiguousarray(bytes_ if exact else floats))
            digests.append(one.digest())
    return tuple(digests)


def of_files(paths: Sequence[Path], settings: Sequence[str] = ()) -> tuple[bytes, ...]:
    """One digest per file: of its size and all its bytes, or of samples of them where the files are very large.

    Above WHOLE_BYTES for all files together, SAMPLES pieces of SAMPLE_BYTES are read of each. PNG and deflated TIFF
    end with a checksum of all pixels, so the last piece sees every change of such a file; a change of a few pixels in
    a file that is not compressed may lie between the pieces.

    Args:
        paths: the files.
        settings: whatever changes the pictures after decoding (how they are made square, a window).

    Raises:
        MissingFileError: a file that is not there.
        DataError: a file that cannot be read.
    """
    start = _started(settings)

    def size(path: Path) -> int:
        with _problems_named(path):
            return os.stat(path).st_size

    def digest(path: Path) -> bytes:
        one = start.copy()
        with _problems_named(path), open(path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            one.update(length.to_bytes(8, "big"))
            for position in [0] if whole else _sample_positions(length):
                file.seek(position)
                one.update(file.readall() if whole else file.read(SAMPLE_BYTES))
        return one.digest()

    blocks = [paths[i : i + _BLOCK] for i in range(0, len(paths), _BLOCK)]  # one task per file would cost more
    with ThreadPoolExecutor(_THREADS) as pool:
        whole = sum(pool.map(lambda block: sum(map(size, block)), blocks)) <= WHOLE_BYTES
        return tuple(chain.from_iterable(pool.map(lambda block: list(map(digest, block)), blocks)))


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file; it was there when the folder was read") from None
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}); expected an image file") from None


def _sample_positions(length: int) -> list[int]:
    last = max(length - SAMPLE_BYTES, 0)
    return sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})


def _started(settings: Sequence[str]) -> Any:
    start = hashlib.blake2b(digest_size=16)
    for text in settings:
        start.update(text.encode() + b"\0")
    return start
