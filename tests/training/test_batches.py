"""The input pipeline: the order of the images is a pure function of the seed and the step's number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from medvdm.data import ImageData, from_arrays
from medvdm.errors import DataError, InputError
from medvdm.training.batches import padded_batches, training_batches


def numbered(train: int, val: int = 3, test: int = 4) -> ImageData:
    """Images whose gray value and label tell their position, the splits mixed up."""
    splits = np.array(["train"] * train + ["val"] * val + ["test"] * test)
    np.random.default_rng(0).shuffle(splits)
    n = len(splits)
    images = np.broadcast_to((np.arange(n) / n).astype(np.float32)[:, None, None], (n, 2, 3))
    return from_arrays(images, np.arange(n) % 2, class_names=["even", "odd"], splits=splits)


def positions(data: ImageData, images: np.ndarray) -> list[int]:
    return np.rint(images[:, 0, 0, 0] * len(data)).astype(int).tolist()


def order(data: ImageData, batches: int, **options: int) -> list[list[int]]:
    stream = training_batches(data, **{"seed": 0, **options})
    return [positions(data, images) for images, _ in islice(stream, batches)]


def test_a_batch_has_the_shapes_dtypes_and_labels_of_its_images() -> None:
    data = numbered(10)
    images, labels = next(training_batches(data, batch_size=4, seed=0))
    assert images.shape == (4, 2, 3, 1) and images.dtype == np.float32
    assert labels.shape == (4, 2) and labels.dtype == np.float32
    assert labels.argmax(axis=1).tolist() == [p % 2 for p in positions(data, images)]


def test_integers_are_the_same_batches_as_gray_levels() -> None:
    """Bytes come through untouched and in memory that JAX takes without a copy; floats are rounded."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 7)).astype(np.uint8)
    for images, exact in ((pixels, True), (pixels / 300, False)):
        data = from_arrays(images, splits=["train"] * 12)
        floats = islice(training_batches(data, batch_size=5, seed=1, start=3), 4)
        levels = islice(training_batches(data, batch_size=5, seed=1, start=3, integers=True), 4)
        for (x, labels), (v, same_labels) in zip(floats, levels, strict=True):
            assert v.dtype == np.uint8 and v.shape == x.shape and v.ctypes.data % 64 == 0
            np.testing.assert_array_equal(v, np.floor(255 * x.astype(np.float64) + 0.5))
            np.testing.assert_array_equal(labels, same_labels)
            assert (v / np.float32(255) == x).all() == exact
    ((v, _), count), _ = padded_batches(from_arrays(pixels), np.array([3, 9, 4]), 2, integers=True)
    assert v.dtype == np.uint8 and count == 2
    np.testing.assert_array_equal(v[..., 0], pixels[[3, 9]])


def test_the_order_depends_on_the_seed_only() -> None:
    data = numbered(12)
    assert order(data, 9, batch_size=4) == order(data, 9, batch_size=4)
    assert order(data, 9, batch_size=4) != order(data, 9, batch_size=4, seed=1)
    assert order(data, 9, batch_size=4) == order(data, 9, batch_size=4, read_ahead=1)


@pytest.mark.parametrize(("train", "batch_size"), [(12, 4), (13, 5), (7, 7), (6, 1)])
def test_a_stream_can_start_at_any_batch(train: int, batch_size: int) -> None:
    data = numbered(train)
    whole = order(data, 12, batch_size=batch_size)
    for start in (0, 1, 2, 5, 11):
        assert order(data, 12 - start, batch_size=batch_size, start=start) == whole[start:]


def test_a_stream_can_start_far_away_at_once() -> None:
    """Step 10 million is computed, not reached by drawing all batches before it."""
    data = numbered(12)
    far = order(data, 3, batch_size=4, start=3 * 10_000_000)
    assert sorted(sum(far, [])) == data.indices("train").tolist()


@pytest.mark.parametrize(("train", "batch_size"), [(12, 4), (7, 7), (1, 1), (6, 1)])
def test_an_epoch_holds_each_training_image_once(train: int, batch_size: int) -> None:
    data = numbered(train)
    per_epoch = train // batch_size
    batches = order(data, 4 * per_epoch, batch_size=batch_size)
    epochs = [sum(batches[e * per_epoch : (e + 1) * per_epoch], []) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == data.indices("train").tolist()


def test_no_image_is_lost_where_the_batch_does_not_divide_the_images() -> None:
    """Batches run on over the end of an epoch: after k epochs' worth of images each was seen k times."""
    data = numbered(10)
    seen = sum(order(data, 20, batch_size=3), [])  # 60 images, six epochs of 10
    for epoch in range(6):
        assert sorted(seen[epoch * 10 : (epoch + 1) * 10]) == data.indices("train").tolist()


def test_each_epoch_has_an_order_of_its_own() -> None:
    epochs = [tuple(epoch) for epoch in order(numbered(12), 6, batch_size=12)]
    assert len(set(epochs)) == 6
    assert tuple(sorted(epochs[0])) not in epochs


def test_shuffling_is_uniform() -> None:
    """Each image is as likely as any other to come first: 90 epochs of 3 images, chi-square with 2 degrees."""
    data = numbered(3)
    first = [batch[0] for batch in order(data, 90, batch_size=3)]
    counts = np.array([first.count(p) for p in data.indices("train")])
    assert ((counts - 30) ** 2 / 30).sum() < 13.8  # p = 0.001


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_the_processes_make_up_the_global_batch(processes: int) -> None:
    data = numbered(11)
    share = 8 // processes

    def stream(rows: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return islice(training_batches(data, batch_size=8, seed=3, start=2, rows=rows), 4)

    parts = [stream(slice(i * share, (i + 1) * share)) for i in range(processes)]
    for whole, *shares in zip(stream(slice(None)), *parts, strict=True):
        for item in (0, 1):  # images, labels
            np.testing.assert_array_equal(np.concatenate([part[item] for part in shares]), whole[item])


def test_only_the_rows_asked_for_are_read() -> None:
    read: list[int] = []
    data = numbered(12)
    inner = data.reader
    object.__setattr__(data, "reader", lambda i: (read.append(len(i)), inner(i))[1])
    next(training_batches(data, batch_size=8, seed=0, rows=slice(2, 5)))
    assert set(read) == {3}


def test_validation_and_test_images_are_never_trained_on() -> None:
    data = numbered(9, val=20, test=20)
    seen = set(sum(order(data, 50, batch_size=4), []))
    assert seen == set(data.indices("train").tolist())


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size: 10; expected at most 9"):
        training_batches(numbered(9, val=20), batch_size=10, seed=0)
    with pytest.raises(DataError, match="'train' has no images"):
        training_batches(numbered(0), batch_size=1, seed=0)


def test_a_damaged_image_is_reported_as_itself() -> None:
    """An error in a background thread reaches the loop as it was raised, naming the file."""

    def broken(_: np.ndarray) -> np.ndarray:
        raise DataError("scan-7.png: truncated")

    data = numbered(8)
    object.__setattr__(data, "reader", broken)
    with pytest.raises(DataError, match=r"scan-7\.png: truncated"):
        next(training_batches(data, batch_size=4, seed=0))


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (6, 3), (1, 4), (5, 1)])
def test_padded_batches_are_of_one_size_and_hold_each_image_once_in_order(n: int, batch_size: int) -> None:
    data = numbered(n, val=0, test=0)
    indices = np.arange(n)[::-1]
    real, sizes = [], set()
    for (images, labels), count in padded_batches(data, indices, batch_size):
        sizes.add(len(images))
        assert len(labels) == len(images) and labels.dtype == np.float32
        here = positions(data, images)
        assert labels.argmax(axis=1).tolist() == [p % 2 for p in here]
        assert here[count:] == [here[0]] * (batch_size - count)
        real += here[:count]
    assert sizes == {batch_size}
    assert real == indices.tolist()
