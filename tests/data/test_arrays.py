"""Arrays as images: each form of images, labels, patients and splits has one meaning, or is refused with the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medvdm.data import from_arrays, split_of_patient
from medvdm.errors import DataError, InputError, InputTypeError, MedvdmError

N = 6
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 5, 6)).astype(np.uint8)


def refused(kind: type[MedvdmError], *words: str, images: Any = IMAGES, **given: Any) -> None:
    with pytest.raises(kind) as error:
        from_arrays(images, **given)
    text = str(error.value)
    assert type(error.value) is kind and "\n" not in text
    for word in words:
        assert word in text


# ---------------------------------------------------------------- images


def test_values_and_shape_of_both_dtypes():
    for images in (IMAGES, IMAGES[..., None], IMAGES.astype(np.float32) / np.float32(255)):
        data = from_arrays(images)
        assert data.image_shape == (5, 6, 1)
        np.testing.assert_array_equal(data.read([4])[0, ..., 0], IMAGES[4].astype(np.float32) / np.float32(255))
    rgb = np.stack([IMAGES, IMAGES // 2, IMAGES // 3], axis=-1)
    np.testing.assert_array_equal(from_arrays(rgb).read([1])[0], rgb[1].astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(("shape", "words"), [
    ((60, 3, 16, 17), ("Axis 1", "np.moveaxis(images, 1, -1)")),
    ((60, 1, 16, 16), ("Axis 1",)),
    ((3, 60, 16, 17), ("Axis 0", "np.moveaxis(images, 0, -1)")),
    ((16, 17, 3, 60), ("Axis 2", "np.moveaxis(images, -1, 0)")),
    ((60, 16, 16, 4), ("alpha",)),
    ((60, 16, 16, 2), ("C = 1 or 3",)),
    ((60, 16, 16, 16), ("No axis is 1 or 3",)),
    ((16, 17), ("One image? images[None]",)),
    ((16, 17, 3), ("One image (H, W, C)? images[None]",)),
    ((16, 17, 1), ("One image",)),
    ((16, 16, 60), ("(H, W, N)?", "np.moveaxis(images, -1, 0)", "images[..., None]")),
    ((2, 4, 8, 8, 1), ("(2, 4, 8, 8, 1)",)),
    ((0, 8, 8), ("none of them 0",)),
    ((4, 0, 8), ("none of them 0",)),
    ((), ("shape ()",)),
])  # fmt: skip
def test_layouts_that_are_not_images_last(shape, words):
    refused(InputError, str(shape), *words, images=np.zeros(shape, np.uint8))


def test_the_remedies_give_the_images():
    first = np.moveaxis(np.stack([IMAGES] * 3, axis=1), 1, -1)
    np.testing.assert_array_equal(from_arrays(first).read([2])[0, ..., 1] * 255, IMAGES[2])
    square = np.zeros((16, 16, 60), np.uint8)
    assert from_arrays(square[..., None]).image_shape == (16, 60, 1)
    assert len(from_arrays(np.moveaxis(square, -1, 0))) == 60


@pytest.mark.parametrize(("images", "kind", "words"), [
    (IMAGES.astype(np.uint16), InputTypeError, ("uint16", "divide by the largest value", "4095")),
    (IMAGES.astype(np.int16), InputTypeError, ("int16", "divide by")),
    (IMAGES > 100, InputTypeError, ("bool",)),
    (IMAGES.astype(object), InputTypeError, ("object",)),
    (IMAGES.astype(np.float32), InputError, ("0 to 2", "dividing by 255")),
    (IMAGES / 255 - 0.5, InputError, ("expected [0, 1]",)),
    (np.where(IMAGES > 250, np.nan, 0.5), InputError, ("nan",)),
    (np.where(IMAGES > 250, np.inf, 0.5), InputError, ("inf",)),
    (np.ma.masked_greater(IMAGES, 250), InputError, ("masked", "without a mask")),
    ([[[0.1, 0.2], [0.3]]], InputError, ("different lengths",)),
])  # fmt: skip
def test_values_without_a_known_meaning(images, kind, words):
    refused(kind, *words, images=images)


def test_dark_images_are_noted():
    for dark in (IMAGES // 255, (IMAGES / 255 / 255).astype(np.float32)):  # cast to bytes; divided twice
        data = from_arrays(dark)
        assert any("dark" in note and "0.00392" in note for note in data.notes)
    assert not any("dark" in note for note in from_arrays(IMAGES).notes)


def test_three_gray_images_or_one_with_three_channels():
    assert "not the channels of one" in from_arrays(IMAGES[:3]).reading.guessed[0]
    assert from_arrays(IMAGES[:3], [0, 1, 1]).reading.guessed == ()  # three labels: three images
    assert from_arrays(IMAGES[:3, ..., None]).reading.guessed == ()
    assert from_arrays(IMAGES[:4]).reading.guessed == ()


def test_later_changes_of_the_arrays_do_not_reach_the_data():
    for images in (IMAGES.copy(), IMAGES.astype(np.float32) / 255):
        labels = np.array([[1, 0]] * N, np.uint8)
        data = from_arrays(images, labels)
        before, print_ = data.read(range(N)), data.fingerprint()
        images[:], labels[:] = 0, 0
        np.testing.assert_array_equal(data.read(range(N)), before)
        assert data.labels[:, 0].all() and data.fingerprint() == print_


def test_an_array_that_cannot_change_is_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = from_arrays(mapped)
    assert any(np.shares_memory(cell.cell_contents, mapped) for cell in data.reader.__closure__)


def test_what_was_read_is_recorded():
    data = from_arrays(np.array([[[51, 102]], [[51, 204]]], np.uint8))
    assert (data.reading.seen, data.reading.read, data.reading.skipped) == (2, 2, {})
    assert data.reading.stored_range == (51 / 255, 204 / 255)


# ---------------------------------------------------------------- labels

HOT = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]]
INDEX = [0, 2, 1, 0, 1, 2]


@pytest.mark.parametrize("form", [
    np.array, lambda v: np.array(v)[:, None], lambda v: [[i] for i in v], lambda v: v, lambda v: np.array(v, np.uint8),
    lambda v: np.array(v, np.uint64), lambda v: [np.int8(i) for i in v], lambda v: np.ma.array(v),
])  # fmt: skip
def test_class_indices(form):
    data = from_arrays(IMAGES, form(INDEX))
    np.testing.assert_array_equal(data.labels, np.eye(3)[INDEX])
    assert data.labels.dtype == np.uint8 and data.class_names == ("0", "1", "2")
    named = from_arrays(IMAGES, form(INDEX), class_names=["a", "b", "c", "d"])
    np.testing.assert_array_equal(named.labels, np.eye(4)[INDEX])
    assert any("without an image: d" in note for note in named.notes)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64, bool])
def test_multi_hot(dtype):
    data = from_arrays(IMAGES, np.array(HOT, dtype), class_names=["a", "b", "c"])
    np.testing.assert_array_equal(data.labels, HOT)
    assert data.labels.dtype == np.uint8 and any("1 of 6 images carry none" in note for note in data.notes)


def test_one_hot_means_the_same_as_indices():
    np.testing.assert_array_equal(from_arrays(IMAGES, np.eye(3)[INDEX]).labels, from_arrays(IMAGES, INDEX).labels)


@pytest.mark.parametrize("form", [list, np.array, lambda v: np.array(v, object), lambda v: np.array(v)[:, None]])
def test_names_of_classes(form):
    words = ["None", "True", "-x", "None", "True", "-x"]  # a name is a text, whatever it says
    data = from_arrays(IMAGES, form(words))
    assert data.class_names == ("-x", "None", "True")
    np.testing.assert_array_equal(data.labels.argmax(axis=1), [1, 2, 0, 1, 2, 0])
    assert from_arrays(IMAGES, form(words), class_names=["True", "None", "-x"]).labels[0].tolist() == [0, 1, 0]


def test_bool_is_an_index_of_two_classes():
    yes = np.array([0, 1, 1, 0, 1, 0], bool)
    np.testing.assert_array_equal(from_arrays(IMAGES, yes).labels, np.eye(2)[yes.astype(int)])
    np.testing.assert_array_equal(from_arrays(IMAGES, yes[:, None]).labels, np.eye(2)[yes.astype(int)])


def test_no_labels_is_one_class():
    data = from_arrays(IMAGES)
    assert data.class_names == ("0",) and data.labels.all() and data.labels.shape == (N, 1)
    assert from_arrays(IMAGES, class_names=["chest"]).class_names == ("chest",)
    refused(InputError, "2 without labels", class_names=["a", "b"])


def with_(value: Any, dtype: Any = float) -> np.ndarray:
    labels = np.array(HOT, dtype)
    labels[3, 1] = value
    return labels


@pytest.mark.parametrize(("labels", "words"), [
    (with_(-1), ("-1.0 at (3, 1)", "'uncertain'", "CheXpert", "expected 0 or 1")),
    (with_(-1, np.int64), ("-1 at (3, 1)", "'uncertain'")),
    (with_(np.nan), ("nan at (3, 1)", "'not mentioned'")),
    (with_(0.5), ("0.5 at (3, 1)", "threshold")),
    (with_(256, np.int64), ("256 at (3, 1)", "one of 1 values")),
    (with_(255, np.uint8), ("255 at (3, 1)",)),
    (with_(np.inf), ("inf at (3, 1)",)),
    (with_(None, object), ("None at (3, 1)", "'not mentioned'")),
    ([0, 1, -1, 0, 1, 0], ("-1 at 2", "'uncertain'")),
    ([0, 1, -100, 0, 1, 0], ("-100 at 2",)),
    ([0.0, 1, np.nan, 0, 1, 0], ("nan at 2", "'not mentioned'")),
    (np.array([0, 2**64 - 1, 0, 0, 0, 0], np.uint64), ("at 1",)),
    ([0, 255, 0, 255, 0, 255], ("up to 255", "none of 1", "class_names")),
    ([1, 2, 3, 1, 2, 3], ("none of 0",)),
    (["a", "b", "", "a", "b", "a"], ("'' at 2",)),
    (["a", "b", None, "a", "b", "a"], ("None at 2",)),
    (np.array(["a", "b", "nan", "a", "b", "a"]), ("'nan' at 2",)),
    (np.array(["a", "b", "<NA>", "a", "b", "a"]), ("'<NA>' at 2",)),
    (["a", "b", float("nan"), "a", "b", "a"], ("nan at 2",) ),
    (np.ma.masked_equal(INDEX, 2), ("2 masked",)),
    ([[0], [0, 1], [1], [], [0], [1]], ("different lengths",)),
    ([INDEX], ("(1, 6)", "transposed?", "(6,), (6, 1) or (6, K)")),
    (np.array(HOT).T, ("(3, 6)", "transposed?")),
    (np.array(HOT)[..., None], ("(6, 3, 1)",)),
    (np.array(INDEX)[:, None, None], ("(6, 1, 1)",)),
    (INDEX[:5], ("(5,)", "6 images")),
    (1, ("shape ()",)),
    ("abcdef", ("shape ()",)),
    (np.zeros((N, 0), int), ("none",)),
])  # fmt: skip
def test_labels_that_are_not_sure(labels, words):
    refused(InputError, *words, labels=labels)


@pytest.mark.parametrize(("labels", "words"), [
    ([0.0, 1, 2, 0, 1, 2], ("float64", ".astype(int)")),
    (np.array(INDEX, complex), ("complex",)),
    (np.array(INDEX, "datetime64[D]"), ("datetime64",)),
    (np.array(INDEX, object), ("object with 0 at 0", ".astype(int)")),
    (np.array(HOT, str), ("<U1", "0 and 1")),
    ([{"a"}] * N, ("object",)),
])  # fmt: skip
def test_labels_of_a_wrong_type(labels, words):
    refused(InputTypeError, *words, labels=labels)


def test_labels_and_class_names_fit():
    refused(InputError, "3 columns; expected 2", labels=HOT, class_names=["a", "b"])
    refused(InputError, "index 2; expected less than 2", labels=INDEX, class_names=["a", "b"])
    refused(InputError, "two class names", labels=[0, 1] * 3, class_names=["Pneumonia"])
    refused(InputError, "two class names", labels=np.array([0, 1] * 3)[:, None], class_names=["Pneumonia"])
    refused(InputError, "did you mean 'pneumonia'", labels=["Pneumona"] * N, class_names=["pneumonia", "normal"])
    refused(InputTypeError, "the string 'abc'", labels=HOT, class_names="abc")
    refused(InputTypeError, "1; expected strings", labels=HOT, class_names=[1, 2, 3])
    refused(InputTypeError, "None; expected strings", labels=HOT, class_names=["a", None, "c"])
    refused(InputError, "not blank", labels=HOT, class_names=["a", " ", "c"])
    refused(InputError, "'a' and 'A '", labels=HOT, class_names=["a", "A ", "c"])


# ---------------------------------------------------------------- patients and splits


@pytest.mark.parametrize("patients", [
    [1, 1, 2, 3, 3, 4], ["1", " 1", "2 ", "3", "3", "4"], np.array([1, 1, 2, 3, 3, 4], np.uint8),
    [b"1", "1", 2, np.int64(3), "3", 4], np.array([b"1", b"1", b"2", b"3", b"3", b"4"]),
])  # fmt: skip
def test_patients_are_text(patients):
    data = from_arrays(IMAGES, patients=patients)
    assert data.patients.tolist() == ["1", "1", "2", "3", "3", "4"]
    assert data.splits.tolist() == [split_of_patient(p) for p in "112334"]


@pytest.mark.parametrize(("kind", "patients", "words"), [
    (InputError, ["a", "b", None, "c", "d", "e"], ("None at 2", "blank")),
    (InputError, ["a", "b", float("nan"), "c", "d", "e"], ("nan at 2",)),
    (InputError, ["a", "b", " ", "c", "d", "e"], ("' ' at 2",)),
    (InputError, np.array([1, 2, 3, 4, 5, np.nan]), ("nan at 5",)),
    (InputError, ["01", "1", "2", "3", "4", "5"], ("'01' and '1'", "one spelling")),
    (InputError, ["01", 1, 2, 3, 4, 5], ("'01' and '1'",)),
    (InputError, ["7", "7.0", "2", "3", "4", "5"], ("'7' and '7.0'", "one spelling")),
    (InputError, np.array(["a", "nan", "2", "3", "4", "5"]), ("'nan' at 1",)),
    (InputError, [b"a", b" ", "2", "3", "4", "5"], ("b' ' at 1",)),
    (InputError, ["None", "1", "2", "3", "4", "5"], ("'None' at 0",)),
    (InputError, np.array([1, 2, 3, 4, 5, "NaT"], "datetime64[D]"), ("at 5",)),
    (InputError, ["a"] * 5, ("(5,)", "(6,)")),
    (InputTypeError, [["a"]] * 6, ("['a'] at 0",)),
    (InputError, np.array([["a"]] * 6), ("(6, 1)", "one per image")),
    (InputTypeError, [1.0, 2, 3, 4, 5, 6], ("1.0 at 0", "whole numbers")),
    (InputTypeError, [True] * 6, ("True at 0",)),
    (InputTypeError, [("a",)] * 6, ("('a',) at 0",)),
    (InputTypeError, "abcdef", ("the string 'abcdef'",)),
])  # fmt: skip
def test_patients_that_are_not_sure(kind, patients, words):
    refused(kind, "patients", *words, patients=patients)


def test_patients_that_differ_in_case_are_noted():
    data = from_arrays(IMAGES, patients=["p1", "P1", "p2", "P2", "p3", "p1"])
    assert len(set(data.patients)) == 5 and any("'p1' and 'P1'" in note for note in data.notes)


def test_patients_unknown_is_noted():
    assert any("no patients given" in note for note in from_arrays(IMAGES).notes)
    assert not any("patients" in note for note in from_arrays(IMAGES, patients=range(N)).notes)


@pytest.mark.parametrize(("splits", "words"), [
    (["train"] * 5 + ["valid"], ("'valid'", "'train', 'val' or 'test'")),
    (["Train"] * N, ("'Train'",)),
    (["train"] * 5 + [None], ("None at 5",)),
    (["train"] * 5, ("(5,)",)),
    ([0, 1, 2, 0, 1, 2], ("'0', '1', '2'",)),
])  # fmt: skip
def test_splits_that_are_not_sure(splits, words):
    refused(InputError, "splits", *words, splits=splits)


@pytest.mark.parametrize("what", ["class_names", "patients", "splits"])
@pytest.mark.parametrize(("value", "words"), [
    ("train", "the string 'train'"), (3, "a int"), ({"b": 1, "a": 0}, "a dict"), ({"a"}, "a set"), (b"a", "a bytes"),
])  # fmt: skip
def test_what_has_no_order_is_refused(what, value, words):
    """{'b': 1, 'a': 0} is torchvision's class_to_idx: in the order of its keys, the names would be swapped."""
    refused(InputTypeError, what, words, "a sequence", labels=INDEX, **{what: value})


def test_sequences_of_any_kind():
    data = from_arrays(IMAGES, INDEX, class_names=(c for c in "abc"), patients=(i for i in range(N)))
    assert data.class_names == ("a", "b", "c") and data.patients.tolist() == list("012345")


def test_a_patient_in_two_splits():
    refused(DataError, "patient 7 is in both 'train' and 'test'", patients=[7] * N, splits=["train"] * 5 + ["test"])
