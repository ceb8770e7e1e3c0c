"""The input pipeline: which images a step sees, as a pure function of the seed and the step's number.

Built on grain. The order is a random-access sequence (shuffled anew each epoch), so its whole state is the number of
the next batch: a resumed run starts it there, on any number of processes. Reading runs ahead in background threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from medvdm.data import ImageData
from medvdm.errors import InputError

Batch = tuple[np.ndarray, np.ndarray]


def training_indices(data: ImageData, batch_size: int) -> np.ndarray:
    """Positions of the training images; raises InputError if the batch is larger than their number."""
    indices = data.indices("train")
    if batch_size > len(indices):
        raise InputError(f"batch_size: {batch_size}; expected at most {len(indices)}, the number of training images")
    return indices


def training_batches(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: slice = slice(None),
    read_ahead: int = 4,
    integers: bool = False,
) -> Iterator[Batch]:
    """Endless batches of the training split: images (b, h, w, c) float32 in [0, 1], labels (b, k) float32.

    Args:
        data: where the images come from.
        batch_size: of the global batch.
        seed: of the order.
        start: the number of the first batch, which is the number of steps already taken.
        rows: which rows of each global batch to read (one process's share); all by default.
        read_ahead: batches kept ready.
        integers: images as uint8 gray levels (:meth:`medvdm.data.ImageData.levels`), for an 8-bit likelihood.

    Raises:
        InputError: the batch is larger than the training split.
    """
    indices = training_indices(data, batch_size)
    images_at = data.levels if integers else data.read
    # A number of epochs that no run reaches: an endless repeat overflows with batches of one image.
    order = grain.MapDataset.range(len(indices)).seed(seed).shuffle().repeat(2**31).batch(batch_size)

    def read(positions: np.ndarray) -> Batch:
        mine = indices[positions[rows]]
        return _aligned(images_at(mine)), data.labels[mine].astype(np.float32)

    ready = grain.ReadOptions(num_threads=2, prefetch_buffer_size=read_ahead)
    batches = iter(order.map(read).to_iter_dataset(ready))
    batches.set_state({"next_index": start})
    return batches


def training_patients(data: ImageData, batch_size: int) -> list[np.ndarray]:
    """Positions of the images of each training patient; raises InputError if there are fewer of them than a batch."""
    indices = data.indices("train")
    _, patient = np.unique(data.patients[indices], return_inverse=True)
    by_patient = np.argsort(patient, kind="stable")
    images = np.split(indices[by_patient], np.cumsum(np.bincount(patient))[:-1])
    if batch_size > len(images):
        raise InputError(
            f"batch_size: {batch_size} with dp_noise; expected at most {len(images)}, the number of training patients"
        )
    return images


def draw(patients: list[np.ndarray], batch_size: int, *, secret: int, step: int) -> np.ndarray:
    """The images of a step, counted from 0: one of each of ``batch_size`` patients, uniform over sets, then images."""
    rng = np.random.default_rng([secret, step])
    chosen = rng.choice(len(patients), batch_size, replace=False)
    return np.array([rng.choice(patients[i]) for i in chosen])


def private_batches(
    data: ImageData,
    *,
    batch_size: int,
    secret: int,
    start: int = 0,
    rows: slice = slice(None),
    read_ahead: int = 4,
    integers: bool = False,
) -> Iterator[Batch]:
    """Endless batches of one image of each of ``batch_size`` patients; a batch depends on the secret and its number.

    Arguments and batches are as of :func:`training_batches`, the secret in place of its seed.

    Raises:
        InputError: the batch is larger than the number of training patients.
    """
    patients = training_patients(data, batch_size)
    images_at = data.levels if integers else data.read

    def read(step: int) -> Batch:
        mine = draw(patients, batch_size, secret=secret, step=step)[rows]
        return _aligned(images_at(mine)), data.labels[mine].astype(np.float32)

    ready = grain.ReadOptions(num_threads=2, prefetch_buffer_size=read_ahead)
    batches = iter(grain.MapDataset.range(2**31).map(read).to_iter_dataset(ready))
    batches.set_state({"next_index": start})
    return batches


def _aligned(images: np.ndarray) -> np.ndarray:
    """The same images in memory that starts at a multiple of 64 bytes, which JAX uses on a CPU without a copy."""
    if images.ctypes.data % 64 == 0:
        return images
    memory = np.empty(images.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + images.nbytes].view(images.dtype).reshape(images.shape)
    aligned[...] = images
    return aligned


def padded_rows(n: int, batch_size: int) -> list[np.ndarray]:
    """Positions 0, 1, ... n - 1 in batches of one size, so that nothing is compiled anew.

    The last batch is filled up by repeating its first position; the caller drops the rows past n.
    """
    firsts = range(0, n, batch_size)
    return [np.where(np.arange(f, f + batch_size) < n, np.arange(f, f + batch_size), f) for f in firsts]


def padded_batches(
    data: ImageData, indices: np.ndarray, batch_size: int, *, integers: bool = False
) -> Iterator[tuple[Batch, int]]:
    """``indices`` in order, in batches as of :func:`padded_rows`, each with its number of real rows.

    Images and labels are as of :func:`training_batches`.
    """
    images_at = data.levels if integers else data.read
    for number, rows in enumerate(padded_rows(len(indices), batch_size)):
        filled = indices[rows]
        left = len(indices) - number * batch_size
        yield (images_at(filled), data.labels[filled].astype(np.float32)), min(left, batch_size)
