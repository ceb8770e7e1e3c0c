"""Any tree of images: labels and splits from the folders, patients from a pattern or from DICOM."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_convert import write_dicom

from medvdm.data import folder, split_of_patient
from medvdm.errors import DataError, InputError, MissingFileError, MissingPackageError


def put(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, format="PNG" if path.suffix == ".png" else None)
    return root


def picture(i: int) -> Image.Image:
    """A picture like no other: two of the same would be copies. The first pixel is 10 i, up to 250."""
    pixels = np.full((4, 4), 10 * (i % 26), np.uint8)
    pixels[3, 3] = 200 - i % 200
    return Image.fromarray(pixels)


def refused(kind, place, *words, **options):
    with pytest.raises(kind) as error:
        folder.load(str(place) if place else None, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


# ---------------------------------------------------------------- labels and splits


def test_sub_folders_are_labels(tmp_path):
    put(tmp_path, "PNEUMONIA/a.png", "NORMAL/b.png", "NORMAL/deep/er/a.jpg", "PNEUMONIA/c.TIFF")
    (tmp_path / "NORMAL" / "notes.txt").write_text("not an image")
    (tmp_path / "NORMAL" / ".hidden.png").write_text("")
    data = folder.load(str(tmp_path))
    assert data.ids == ("NORMAL/b.png", "NORMAL/deep/er/a.jpg", "PNEUMONIA/a.png", "PNEUMONIA/c.TIFF")
    assert data.class_names == ("NORMAL", "PNEUMONIA")
    np.testing.assert_array_equal(data.labels, [[1, 0], [1, 0], [0, 1], [0, 1]])
    assert list(data.splits) == [split_of_patient(name) for name in data.ids]
    assert any("patients unknown for 4 of 4" in note for note in data.notes)
    np.testing.assert_allclose(data.read([0, 2])[:, 0, 0, 0] * 255, [10, 0], atol=1e-4)


def test_flat_folder_is_one_class(tmp_path):
    data = folder.load(str(put(tmp_path, "b.png", "a.png")))
    assert data.ids == ("a.png", "b.png") and data.class_names == ("all",)
    assert data.labels.tolist() == [[1], [1]]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders_are_honoured(tmp_path, val):
    put(tmp_path, "train/N/1.png", "train/P/2.png", f"{val}/N/3.png", "test/P/4.png")
    data = folder.load(str(tmp_path))
    assert dict(zip(data.ids, data.splits, strict=True)) == {
        "train/N/1.png": "train", "train/P/2.png": "train", f"{val}/N/3.png": "val", "test/P/4.png": "test",
    }  # fmt: skip
    assert data.class_names == ("N", "P")
    assert "folders" in data.split_rule


def test_split_folders_without_labels(tmp_path):
    data = folder.load(str(put(tmp_path, "train/1.png", "val/2.png", "test/3.png")))
    assert data.class_names == ("all",) and set(data.splits) == {"train", "val", "test"}


def test_missing_validation_is_carved_out_of_train(tmp_path):
    put(tmp_path, *(f"{side}/N/p{i}_{visit}.png" for side, part in (("train", range(40)), ("test", range(40, 60)))
                    for i in part for visit in (0, 1)))  # fmt: skip
    data = folder.load(str(tmp_path), patient_pattern=r"(p\d+)_")
    expected = [
        "test" if name.startswith("test") else "val" if split_of_patient(patient) == "val" else "train"
        for name, patient in zip(data.ids, data.patients, strict=True)
    ]
    assert list(data.splits) == expected
    assert set(expected) == {"train", "val", "test"}
    assert "mod 10, is 2" in data.split_rule


def test_missing_test_folder_is_noted(tmp_path):
    data = folder.load(str(put(tmp_path, "train/1.png", "val/2.png")))
    assert any("no test folder" in note for note in data.notes)
    assert "test" not in data.splits


@pytest.mark.parametrize("names", [("a.png", "N/b.png"), ("train/a.png", "train/N/b.png", "test/N/c.png")])
def test_images_beside_label_folders_are_refused(tmp_path, names):
    refused(DataError, put(tmp_path, *names), (tmp_path / names[0]).parent, "expected all or none")


# ---------------------------------------------------------------- patients


def test_patient_pattern(tmp_path):
    put(tmp_path, *(f"N/person{i}_scan{j}.png" for i in range(30) for j in range(3)))
    data = folder.load(str(tmp_path), patient_pattern=r"person(\d+)_")
    assert len(set(data.patients)) == 30
    assert list(data.splits) == [split_of_patient(p) for p in data.patients]
    assert not any("unknown" in note for note in data.notes)


def test_patient_pattern_sees_the_relative_path(tmp_path):
    data = folder.load(str(put(tmp_path, "N/p1/a.png", "N/p2/a.png")), patient_pattern=r"^N/(p\d)/")
    assert list(data.patients) == ["p1", "p2"]


def test_patient_on_both_sides_is_refused(tmp_path):
    put(tmp_path, "train/p1_a.png", "test/p1_b.png", "val/p2.png")
    refused(DataError, tmp_path, "patient p1 is in both", patient_pattern=r"(p\d)")


@pytest.mark.parametrize("pattern", [r"q(\d)", r"p(\d)?_x|N"])
def test_pattern_that_does_not_match_names_the_file(tmp_path, pattern):
    refused(DataError, put(tmp_path, "N/p1.png"), tmp_path / "N/p1.png", "finds no patient", patient_pattern=pattern)


@pytest.mark.parametrize(("pattern", "words"), [("(", "no regular expression"), ("p", "0 groups"), ("(a)(b)", "2 gr")])
def test_pattern_that_cannot_be_used(tmp_path, pattern, words):
    refused(InputError, put(tmp_path, "a.png"), "patient_pattern", words, patient_pattern=pattern)


def test_dicom_patients(tmp_path):
    (tmp_path / "N").mkdir()
    for i, patient in enumerate(["A", "A", "B", ""]):
        write_dicom(tmp_path / "N" / f"{i}.dcm", np.full((4, 4), i, np.uint8), PatientID=patient)
    put(tmp_path, "N/4.png")
    data = folder.load(str(tmp_path))
    assert list(data.patients) == ["A", "A", "B", "N/3.dcm", "N/4.png"]
    assert any("PatientID of 3 DICOM files: 2" in note for note in data.notes)
    assert any("unknown for 2 of 5" in note for note in data.notes)
    by_pattern = folder.load(str(tmp_path), patient_pattern=r"(\d)\.")
    assert list(by_pattern.patients) == list("01234")


def test_pydicom_is_needed_for_dicom_only(tmp_path, monkeypatch):
    put(tmp_path, "a.png")
    write_dicom(tmp_path / "b.dcm", np.zeros((4, 4), np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(MissingPackageError, tmp_path, "b.dcm", "medvdm[dicom]")
    (tmp_path / "b.dcm").unlink()
    assert len(folder.load(str(tmp_path))) == 1


# ---------------------------------------------------------------- refused


def test_no_folder(tmp_path):
    refused(InputError, None, "--data-dir")
    refused(MissingFileError, tmp_path / "none", tmp_path / "none")
    refused(DataError, put(tmp_path, "a.png") / "a.png", "found a file")


def test_empty_folder(tmp_path):
    (tmp_path / "readme.txt").write_text("")
    refused(DataError, tmp_path, tmp_path, "no images", "*.png")


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", locked)  # root may read every folder, so the refusal is played
    refused(DataError, tmp_path, tmp_path, "Permission denied")


def test_damaged_images_are_refused_by_name(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    refused(DataError, tmp_path, tmp_path / "b.png", "0 bytes")


def test_sizes_that_differ(tmp_path):
    put(tmp_path, "N/a.png")
    Image.new("L", (6, 4), 255).save(tmp_path / "N/b.png")
    refused(DataError, tmp_path, "a.png", "4 x 4", "b.png", "6 x 4", "--image-size")
    fills = {"pad": 16 / 24, "crop": 1, "stretch": 1}
    for fit, filled in fills.items():
        image = folder.load(str(tmp_path), image_size=2, fit=fit).read([1])
        np.testing.assert_allclose(image.mean(), filled, atol=0.05)
