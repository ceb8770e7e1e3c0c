"""ImageData: what no source can bring in, the fingerprint that sees every pixel, and what is wrong with a split."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from typing import Any

import numpy as np
import pytest

from medvdm.data import DataConfig, ImageData, content, from_arrays, load, split_of_patient
from medvdm.errors import DataError, InputError, InputTypeError, MedvdmError, MissingFileError
from medvdm.runs.record import data_record

N = 60
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 6, 5)).astype(np.uint8)
LABELS = np.arange(N) % 2
PATIENTS = np.arange(N) // 2


def made(pixels: np.ndarray = PIXELS, **more: Any) -> ImageData:
    return from_arrays(pixels, LABELS[: len(pixels)], **{"patients": PATIENTS[: len(pixels)], **more})


def refused(kind: type[MedvdmError], *words: str, **changes: Any) -> None:
    with pytest.raises(kind) as error:
        dataclasses.replace(made(), **changes)
    for word in words:
        assert word in str(error.value)


# ---------------------------------------------------------------- checked whatever the source


def test_no_source_can_bring_in_what_is_not_sure():
    labels = np.array(made().labels)
    labels[3, 1] = 255
    refused(InputError, "255 at (3, 1)", labels=labels)
    refused(InputTypeError, "int64; expected uint8", labels=labels.astype(np.int64))
    refused(InputError, "(60, 2)", labels=labels[:, :1])
    refused(InputTypeError, "patients: dtype int64", patients=PATIENTS)
    refused(InputError, "patients: shape (59,)", patients=made().patients[1:])
    refused(DataError, "patients: '' for 0", patients=np.array(["", *made().patients[1:]]))
    refused(InputError, "'valid'", splits=np.array(["valid"] * N))
    refused(DataError, "'0' is there twice", ids=("0",) * N)
    refused(InputError, "'a' and 'A'", class_names=("a", "A"))
    refused(DataError, "is in both", splits=np.array(["train"] * (N - 1) + ["test"]))


def test_what_was_checked_cannot_change():
    for what in ("labels", "patients", "splits"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(made(), what)[0] = 0


@pytest.fixture
def alone():
    """Garbage collection does not walk through what the tests before have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_whole_of_nih_is_checked_in_time_that_grows_as_the_images(alone):
    """In processor time against that of a quarter of the images, so that a slow or busy machine does not matter."""

    def seconds(n: int) -> float:
        patients = np.array([str(i // 4) for i in range(n)])
        splits = np.array([split_of_patient(p) for p in patients])
        start = time.process_time()
        data = ImageData(
            name="x", origin="x", ids=tuple(map(str, range(n))), labels=np.ones((n, 1), np.uint8), class_names=("x",),
            patients=patients, splits=splits, split_rule="x", image_shape=(1, 1, 1), reader=lambda i: None,
            digests=lambda: tuple(i.to_bytes(16, "big") for i in range(n)),
        )  # fmt: skip
        data.check_splits()
        data.fingerprint()
        data.counts()
        return time.process_time() - start

    seconds(100)
    whole = 112_120
    assert seconds(whole) < 10 * seconds(whole // 4)  # 4 where every step is linear, 16 where one is quadratic


# ---------------------------------------------------------------- the fingerprint


def changed(where: Any, value: Any) -> np.ndarray:
    pixels = PIXELS.copy()
    pixels[where] = value
    return pixels


@pytest.mark.parametrize("pixels", [
    PIXELS[:, :, ::-1], PIXELS[:, ::-1], PIXELS[::-1], 255 - PIXELS, PIXELS.reshape(N, 5, 6),
    changed(slice(16, None), np.random.default_rng(1).integers(0, 256, (44, 6, 5))), changed((37, 2, 3), 7),
    changed((37, 2, 3), PIXELS[37, 2, 3] ^ 1), PIXELS[[1, 0, *range(2, N)]],
])  # fmt: skip
def test_other_pixels_are_other_data(pixels):
    assert made(pixels).fingerprint() != made().fingerprint()


def test_one_digit_of_one_float():
    floats = PIXELS / np.float32(300)
    nudged = floats.copy()
    nudged[5, 1, 1] = np.nextafter(nudged[5, 1, 1], np.float32(1))
    assert made(nudged).fingerprint() != made(floats).fingerprint()


def test_other_labels_patients_splits_names_are_other_data():
    prints = {
        made(**given).fingerprint()
        for given in (
            {}, {"class_names": ["a", "b"]}, {"patients": PATIENTS + 100}, {"splits": ["train"] * N}, {"name": "x"},
        )
    }  # fmt: skip
    assert len(prints) == 5
    assert from_arrays(PIXELS, 1 - LABELS, patients=PATIENTS).fingerprint() not in prints


def test_the_same_values_are_the_same_data():
    assert made(PIXELS.astype(np.float32) / np.float32(255)).fingerprint() == made().fingerprint()
    assert made(PIXELS[..., None]).fingerprint() == made().fingerprint()
    copied = dataclasses.replace(made(), reader=lambda i: PIXELS[i][..., None].astype(np.float64) / 255)
    assert copied.fingerprint() == made().fingerprint()


def test_the_fingerprint_is_the_same_on_every_machine():
    """The value itself: another order of bytes or another version of numpy must not change it."""
    data = from_arrays(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), [0, 1], patients=["7", "8"])
    assert data.fingerprint() == "94a461e209d672ea"
    thirds = from_arrays(np.full((2, 3, 4), 1 / 3, np.float32), [0, 1], patients=["7", "8"])
    assert thirds.fingerprint() == "4b0225e684570752"
    assert load(DataConfig(num_images=4, image_size=16)).fingerprint() == "014e7dbedeecb25f"


def test_pixels_are_read_once():
    reads = []
    data = made()
    counted = dataclasses.replace(data, reader=lambda i: (reads.append(len(i)), data.reader(i))[1])
    assert counted.fingerprint() == counted.fingerprint() == data.fingerprint()
    data_record(counted)
    assert sum(reads) == N


# ---------------------------------------------------------------- digests of files


def files_of(folder, contents):
    paths = [folder / f"{i}.bin" for i in range(len(contents))]
    for path, some in zip(paths, contents, strict=True):
        path.write_bytes(some)
    return paths


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_digests_of_files(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(content, "WHOLE_BYTES", limit)
    some = np.random.default_rng(0).bytes(100_000)
    contents = [some, some, some[:-1], b"\0" + some[1:], some[:-1] + b"\0", b"", b"x"]
    digests = content.of_files(files_of(tmp_path, contents))
    assert digests[0] == digests[1] and len(set(digests)) == 6
    assert content.of_files([tmp_path / "0.bin"], ["pad"]) != content.of_files([tmp_path / "0.bin"], ["crop"])
    assert content.of_files([]) == ()


def test_every_byte_counts_unless_the_files_are_very_large(tmp_path, monkeypatch):
    some = bytearray(100_000)
    (path,) = files_of(tmp_path, [some])
    whole = content.of_files([path])
    some[20_000] = 1
    path.write_bytes(some)
    assert content.of_files([path]) != whole
    monkeypatch.setattr(content, "WHOLE_BYTES", 99_999)
    assert content.of_files([path]) != whole  # by samples: another digest, which does not see that byte
    sampled = content.of_files([path])
    some[20_000] = 2
    path.write_bytes(some)
    assert content.of_files([path]) == sampled


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(MissingFileError, match=r"0\.bin"):
        content.of_files([tmp_path / "0.bin"])
    with pytest.raises(DataError, match="cannot be read"):
        content.of_files([tmp_path])


# ---------------------------------------------------------------- what is wrong with a split


def noted(data: ImageData, *words: str) -> bool:
    return any(all(word in note for word in words) for note in data.check_splits())


def test_a_good_split_has_no_notes():
    assert {"train", "val", "test"} == set(made().splits)
    assert made().check_splits() == ()


def test_one_patient_for_all():
    data = made(patients=["ANON"] * N)
    assert set(data.splits) == {"train"}
    assert noted(data, "all 60 images are of one patient, 'ANON'")
    assert noted(data, "'val' has no images") and noted(data, "'test' has no images")
    held_out = made(patients=["61b"] * N, splits=["test"] * N)
    with pytest.raises(DataError, match="'train' has no images"):
        held_out.check_splits()


def test_most_images_of_one_patient():
    patients = ["ANON"] * 40 + [str(i) for i in range(20)]
    assert noted(made(patients=patients), "'ANON' has 40 of the 60 images")
    assert not noted(made(patients=["ANON"] * 30 + [str(i) for i in range(30)]), "ANON")


def test_pictures_on_two_sides_and_with_two_labels():
    splits = np.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    given = {"patients": np.arange(N), "splits": splits}
    assert made(**given).check_splits() == ()
    twins = changed(slice(50, 52), PIXELS[[0, 3]])  # image 50 is 0, image 51 is 3: test and train, labels equal
    assert made(twins, **given).check_splits() == ("4 images have an identical copy on another side of the split",)
    same_side = changed(1, PIXELS[0])  # labels 0 and 1
    assert made(same_side, **given).check_splits() == ("2 images have an identical copy with other labels",)


def test_the_record_says_what_was_read_and_what_is_wrong():
    record = data_record(made(patients=["ANON"] * N))
    assert record["counts"]["train"] == {"images": 60, "patients": 1}
    assert record["reading"] == {
        "seen": 60, "read": 60, "skipped": {}, "stored_range": [0.0, 1.0], "guessed": [],
        "rounded_from": [],
    }  # fmt: skip
    assert any("one patient" in note for note in record["notes"])
    assert json.loads(json.dumps(record)) == record
    assert record["fingerprint"] == made(patients=["ANON"] * N).fingerprint()
    assert data_record(dataclasses.replace(made(), reading=None))["reading"] is None


def test_the_record_of_gray_levels_says_how_many_there_are():
    assert data_record(made())["level_use"] is None
    train = made().splits == "train"
    record = data_record(made(), integers=True)
    assert record["level_use"] == {
        "images": train.sum(),
        "distinct": len(np.unique(PIXELS[train])),
        "distinct_per_image": np.median([len(np.unique(image)) for image in PIXELS[train]]),
        "rounded": 0.0,
    }
    assert json.loads(json.dumps(record)) == record
