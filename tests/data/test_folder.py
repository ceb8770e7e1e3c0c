"""Any tree of images: labels and splits from the folders, patients from a pattern or from DICOM."""

import os
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from test_convert import write_dicom

from medvdm.data import files, folder, split_of_patient
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


# ---------------------------------------------------------------- what is read, and what is left out


def write(root: Path, name: str, content: bytes = b"nothing that is known") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def test_images_are_known_by_their_content(tmp_path):
    for i, name in enumerate(["B/a.bmp", "B/b.BMP", "A/png without suffix", "A/png.jpg", "A/tiff.xyz"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(i).save(tmp_path / name, format={"B": "BMP", "A": "PNG"}[name[0]] if i < 4 else "TIFF")
    for i, name in enumerate(["C/1.ima", "C/2.IMA", "C/3.dicom", "C/4.dic", "C/IM000005", "C/6.jpg"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_dicom(tmp_path / name, np.full((4, 4), i, np.uint8), PatientID=f"P{i // 2}")
    data = folder.load(str(tmp_path))
    assert len(data) == 11 and data.class_names == ("A", "B", "C")
    assert list(data.patients[5:]) == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert data.reading.seen == data.reading.read == 11 and data.reading.skipped == {}
    np.testing.assert_allclose(data.read([5, 10])[:, 0, 0, 0], [0, 4 / 255], atol=1e-6)


def test_what_is_not_read_is_counted_and_noted(tmp_path):
    put(tmp_path, "A/1.png", "A/2.png", "B/3.png")
    for name in ("A/4.gif", "A/5.webp", "A/6.nii.gz", "B/7.webp", "B/no suffix"):
        write(tmp_path, name)
    for name in ("labels.csv", "A/notes.txt", "README", "DICOMDIR", "A/.DS_Store", "B/Thumbs.db", "A/._1.png"):
        write(tmp_path, name)
    os.mkfifo(tmp_path / "A" / "pipe")  # opening it would wait for ever
    report = write_dicom(tmp_path / "A" / "report.dcm", np.zeros((4, 4), np.uint8))
    dataset = pydicom.dcmread(report)
    del dataset.Rows
    dataset.save_as(report)
    data = folder.load(str(tmp_path))
    kind = "not an image of a kind that is read: "
    assert data.reading.skipped == {
        f"{kind}*.gif": 1, f"{kind}*.webp": 2, f"{kind}*.nii.gz": 1, f"{kind}without a suffix": 1,
        "sidecar file (text, table or index)": 4, "hidden file": 3, "not a regular file": 1,
        "a DICOM file without a picture": 1,
    }  # fmt: skip
    assert data.reading.seen == 17 and data.reading.read == len(data) == 3
    (note,) = [note for note in data.notes if "not read" in note]
    assert note.startswith("7 files were not read: ") and "2 not an image of a kind that is read: *.webp" in note
    assert "sidecar" not in note and "hidden" not in note


@pytest.mark.parametrize("tree", ["{}", "train/{}", "archive/chest/train/{}"])
@pytest.mark.parametrize("rest", [["3.webp"], ["3.webp", "4.txt"], [".DS_Store"], ["deeper/3.nii"], []])
def test_a_label_folder_that_ends_empty_is_refused(tmp_path, tree, rest):
    put(tmp_path, *(f"{tree.format('A')}/{i}.png" for i in range(2)))
    empty = tmp_path / tree.format("B")
    empty.mkdir()
    for name in rest:
        write(empty, name)
    refused(DataError, tmp_path, empty, "holds no image", *(["1 not an image"] if rest and "." != rest[0][0] else []))


def test_a_split_folder_that_ends_empty_is_refused(tmp_path):
    put(tmp_path, "train/A/1.png", "test/A/2.png")
    (tmp_path / "val").mkdir()
    refused(DataError, tmp_path, tmp_path / "val", "holds no image")


def test_a_folder_of_tables_is_no_label(tmp_path):
    put(tmp_path, "images/train/A/1.png", "images/test/A/2.png")
    write(tmp_path, "labels/train/1.txt")
    write(tmp_path, "docs/paper.pdf")
    data = folder.load(str(tmp_path))
    assert data.class_names == ("A",) and list(data.splits) == ["test", "train"]


def test_a_damaged_image_is_never_skipped(tmp_path):
    put(tmp_path, "A/1.png")
    for name in ("2.bmp", "2.ima", "2.jpeg"):
        write(tmp_path, f"A/{name}")
        refused(DataError, tmp_path, tmp_path / "A" / name)
        (tmp_path / "A" / name).unlink()


@pytest.mark.parametrize("masks", [
    ["covid/masks/1.png", "normal/masks/2.png"], ["masks/covid/1.png", "lung masks/2.png"],
    ["covid/1_mask.png", "normal/2_mask_1.png"], ["covid/GroundTruth/1.png", "normal/ManualMask/leftMask/2.png"],
])  # fmt: skip
def test_masks_are_no_pictures(tmp_path, masks):
    put(tmp_path, "covid/images/1.png", "normal/images/2.png", *masks)
    data = folder.load(str(tmp_path))
    assert data.ids == ("covid/images/1.png", "normal/images/2.png") and data.class_names == ("covid", "normal")
    assert data.reading.skipped == {"a mask, by its name": 2}
    assert any("2 a mask" in note for note in data.notes)


def test_a_label_folder_that_holds_masks_only_is_refused(tmp_path):
    put(tmp_path, "covid/images/1.png", "normal/masks/1.png")
    refused(DataError, tmp_path, tmp_path / "normal", "1 a mask")


def test_a_set_of_masks_is_read(tmp_path):
    data = folder.load(str(put(tmp_path, "with_mask/1.png", "without_mask/2.png")))
    assert data.class_names == ("with_mask", "without_mask")


# ---------------------------------------------------------------- names of splits


@pytest.mark.parametrize(("train", "val", "test"), [
    ("Training", "Validation", "Testing"), ("TRAIN", "VAL", "TEST"), ("train_data", "val_data", "test_data"),
    ("train1", "dev1", "test1"), ("trainset", "valset", "testset"), ("TrainImages", "ValImages", "TestImages"),
    ("stage_2_train_images", "stage_2_val_images", "stage_2_test_images"), ("train", "dev", "holdout"),
    ("split_train", "split_val", "split_test"), ("train", "valid", "hold-out"),
    ("chest_xray_train", "val", "testdata"),
])  # fmt: skip
@pytest.mark.parametrize("tree", [
    "{side}/{label}", "archive/{side}/{label}", "a/b/{side}/{label}/deep", "{label}/{side}",
    "archive/{label}/{side}/images", "{side}/images/{label}",
])  # fmt: skip
def test_names_and_places_of_splits(tmp_path, tree, train, val, test):
    sides = {"train": train, "val": val, "test": test}
    put(tmp_path, *(f"{tree.format(side=name, label=label)}/{side}_.png" for side, name in sides.items()
                    for label in ("glioma", "no tumor")))  # fmt: skip
    data = folder.load(str(tmp_path))
    assert data.class_names == ("glioma", "no tumor")
    for name, side, label in zip(data.ids, data.splits, data.labels, strict=True):
        assert name.endswith(f"{side}_.png") and data.class_names[label.argmax()] in name
    assert "folders" in data.split_rule


@pytest.mark.parametrize("names", [
    ["fold_0", "fold_1"], ["Fold1", "Fold2"], ["train", "eval"], ["evaluation", "train"], ["cv1", "cv2"],
    ["train_covid", "train_normal"], ["test_positive", "healthy"], ["normal-train", "normal-test"],
    ["split1", "split2"], ["tr", "te"], ["imagesTr", "imagesTs"], ["trn", "tst"], ["internal", "external"],
    ["train", "other"], ["train", "test", "other"], ["NORMAL", "Training"], ["test", "NORMAL"],
])  # fmt: skip
@pytest.mark.parametrize("tree", ["{}", "archive/{}", "{}/A"])
def test_names_that_may_be_splits_are_refused(tmp_path, names, tree):
    put(tmp_path, *(f"{tree.format(name)}/{i}.png" for i, name in enumerate(names)))
    refused(DataError, tmp_path, tmp_path, "side of a split", "expected")


@pytest.mark.parametrize("name", ["untested", "contest", "Validated", "latest", "Skin fold", "devic", "trainee", "TB"])
def test_names_that_hold_such_letters_are_labels(tmp_path, name):
    assert folder.load(str(put(tmp_path, f"{name}/1.png", "other/2.png"))).class_names == tuple(sorted([name, "other"]))


@pytest.mark.parametrize(("names", "words"), [
    (["chest_xray/train/A/1.png", "chest_xray/chest_xray/train/A/1.png"], "several depths"),
    (["train/A/train/1.png", "test/A/train/2.png"], "twice"),
    (["north/train/A/1.png", "south/train/B/2.png"], "labels around the sides or inside them"),
    (["train/1.png", "2.png"], "images beside"),
    (["images_001/1.png", "images_002/2.png"], "name no labels"),
    (["train/NORMAL/1.png", "test/Normal/2.png"], "one spelling"),
    (["No Finding/1.png", "no_finding/2.png"], "one spelling"),
])  # fmt: skip
def test_trees_that_are_not_clear_are_refused(tmp_path, names, words):
    refused(DataError, put(tmp_path, *names), tmp_path, words, "expected")


@pytest.mark.parametrize("names", [("TB+", "TB-"), ("<5 mm", ">5 mm"), ("HER2+", "HER2")])
def test_labels_may_differ_in_a_sign(tmp_path, names):
    assert folder.load(str(put(tmp_path, *(f"{name}/1.png" for name in names)))).class_names == tuple(sorted(names))


def test_one_folder_around_all_is_noted(tmp_path):
    data = folder.load(str(put(tmp_path, "archive/NORMAL/1.png", "archive/PNEUMONIA/2.png")))
    assert data.class_names == ("archive",)
    assert any("'archive'" in note and "NORMAL, PNEUMONIA" in note for note in data.reading.guessed)


def test_a_folder_called_images_is_no_label(tmp_path):
    assert folder.load(str(put(tmp_path, "images/1.png", "images/2.png"))).class_names == ("all",)


def test_a_label_without_training_images_is_noted(tmp_path):
    data = folder.load(str(put(tmp_path, "train/A/1.png", "test/A/2.png", "test/B/3.png")))
    assert any("'B' is in no training folder" in note for note in data.notes)


# ---------------------------------------------------------------- the same picture twice


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize(("sides", "left_out"), [
    (["train", "test"], {"train"}), (["val", "test"], {"val"}), (["train", "val"], {"train"}),
    (["train", "val", "test"], {"train", "val"}),
])  # fmt: skip
def test_no_picture_is_on_two_stated_sides(tmp_path, monkeypatch, sides, left_out, limit):
    if limit is not None:
        monkeypatch.setattr(files, "MEMORY_LIMIT", limit)
    put(tmp_path, "train/A/1.png", "train/A/2.png", "val/A/3.png", "test/A/4.png")
    for side in sides:
        picture(9).save(tmp_path / side / "A" / "copy.png")
    data = folder.load(str(tmp_path))
    assert {name for name in data.ids if "copy" in name} == {f"{side}/A/copy.png" for side in set(sides) - left_out}
    assert data.reading.skipped == {"a copy of a picture on another side": len(left_out)}
    (note,) = [note for note in data.notes if "two sides" in note]
    assert note.startswith("1 pictures") and f"{len(left_out)} copies" in note
    np.testing.assert_allclose(data.read(np.arange(len(data)))[:, 0, 0, 0] * 255, expected_first(data), atol=1e-3)
    assert len(data._digests) == len(data) and len(set(data._digests)) == len(data)


def expected_first(data):
    order = {"train/A/1.png": 0, "train/A/2.png": 10, "val/A/3.png": 20, "test/A/4.png": 30}
    return [order.get(name, 90) for name in data.ids]


def test_a_picture_saved_anew_is_the_same_picture(tmp_path):
    put(tmp_path, "train/A/1.png", "train/A/2.png", "test/A/3.png")
    picture(1).save(tmp_path / "test" / "A" / "copy.tif", compression="tiff_lzw")
    assert "train/A/2.png" not in folder.load(str(tmp_path)).ids


@pytest.mark.parametrize("limit", [None, 0])
def test_copies_are_on_one_side_of_a_split_by_patient(tmp_path, monkeypatch, limit):
    if limit is not None:
        monkeypatch.setattr(files, "MEMORY_LIMIT", limit)
    put(tmp_path, *(f"A/{i}.png" for i in range(30)))
    for i in range(30):  # each once more, in a chain with the next
        picture(i).save(tmp_path / "A" / f"{i}_again.png")
    data = folder.load(str(tmp_path))
    assert len(data) == 60
    side = dict(zip(data.ids, data.splits, strict=True))
    assert all(side[f"A/{i}.png"] == side[f"A/{i}_again.png"] for i in range(30))
    assert len(set(data.splits)) == 3
    (note,) = [note for note in data.notes if "more than once" in note]
    moved = sum(split_of_patient(f"A/{i}.png") != split_of_patient(f"A/{i}_again.png") for i in range(30))
    assert note.startswith(f"{moved} pictures") and moved > 5


def test_patients_that_share_pictures_stay_whole(tmp_path):
    """p1 and p2 share one picture, p2 and p3 another: all images of the three go to one side."""
    put(tmp_path, *(f"A/p{p}_{i}.png" for p in range(1, 9) for i in range(2)))
    for p, i in ((1, 90), (2, 90), (2, 91), (3, 91)):
        picture(i).save(tmp_path / "A" / f"p{p}_{i}.png")
    data = folder.load(str(tmp_path), patient_pattern=r"(p\d)_")
    assert len(set(data.splits[np.isin(data.patients, ["p1", "p2", "p3"])])) == 1


# ---------------------------------------------------------------- range of stored values


def dark(root: Path, most: int = 4095, n: int = 20) -> Path:
    (root / "A").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, most, (8, 8)).astype(np.uint16)
        pixels[0, :2] = 0, most
        Image.fromarray(pixels).save(root / "A" / f"{i:02}.png")
    return root


def test_little_range_is_noted(tmp_path):
    data = folder.load(str(dark(tmp_path)))
    np.testing.assert_allclose(data.reading.stored_range, (0, 4095 / 65535))
    (note,) = [note for note in data.notes if "6.2%" in note]
    assert "0 to 4095" in note and "--window=0,4095" in note
    assert not any("%" in note for note in folder.load(str(put(tmp_path / "b", "A/1.png", "A/25.png"))).notes)


def test_little_range_of_a_part_is_noted(tmp_path):
    """8-bit files that use their whole range do not hide 16-bit files that do not."""
    dark(tmp_path)
    put(tmp_path, *(f"B/{i}.png" for i in range(27)))
    data = folder.load(str(tmp_path), image_size=4)
    (note,) = (note for note in data.notes if "of the files' range" in note)
    assert note.startswith("16 bits:") and "--window" not in note and "a folder" in note  # it would be refused
    refused(DataError, tmp_path, "one kind of stored values", window="0,4095", image_size=4)


@pytest.mark.parametrize(("window", "low", "high"), [("0,4095", 0, 4095), ("data", 0, 4095), ("1000,2000", 1000, 2000)])
def test_a_window_spreads_them(tmp_path, window, low, high):
    data = folder.load(str(dark(tmp_path)), window=window)
    stored = np.stack([np.array(Image.open(tmp_path / name)) for name in data.ids]).astype(np.float64)
    got = data.read(np.arange(len(data)))[..., 0]
    np.testing.assert_allclose(got, np.clip((stored - low) / (high - low), 0, 1), atol=1e-6)
    np.testing.assert_allclose(data.reading.stored_range, (0, 4095 / 65535))
    assert any(f"from {low} to {high} became 0 to 1" in note for note in data.notes)
    assert data.fingerprint() != folder.load(str(tmp_path)).fingerprint()


def test_the_window_of_the_data_is_that_of_the_training_images(tmp_path):
    for side, most in (("train", 1000), ("val", 2000), ("test", 3000)):
        dark(tmp_path / side, most, 3)
    data = folder.load(str(tmp_path), window="data")
    assert any("from 0 to 1000 became 0 to 1 (least and greatest value of the 9" not in note for note in data.notes)
    assert any("from 0 to 1000 became 0 to 1" in note and "the 3 training" in note for note in data.notes)
    assert data.read(data.indices("test")).max() == 1.0


def test_a_window_of_percentiles_passes_over_single_pixels(tmp_path):
    dark(tmp_path, n=40)
    hot = np.array(Image.open(tmp_path / "A/00.png"))
    hot[5, 5] = 65535  # a marker
    Image.fromarray(hot).save(tmp_path / "A/00.png")
    stored = [np.array(Image.open(path)) for path in sorted((tmp_path / "A").glob("*.png"))]
    data = folder.load(str(tmp_path), window="percentile")
    train = np.concatenate([stored[i].ravel() for i in data.indices("train")])
    low, high = np.percentile(train, (0.1, 99.9))
    got = data.read([3])[0, ..., 0]
    np.testing.assert_allclose(got, np.clip((stored[3] - low) / (high - low), 0, 1), atol=1e-6)
    assert high < 5000


def test_range_of_files_that_stay_on_disk_is_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(files, "RANGE_SAMPLE", 5)
    data = folder.load(str(dark(tmp_path)))
    np.testing.assert_allclose(data.reading.stored_range, (0, 4095 / 65535))
    assert sum("a sample of 5 of 20" in note for note in data.notes) == 2


@pytest.mark.parametrize("window", ["", "auto", "1", "1,2,3", "5,1", "2,2", "nan,1", "0,inf", "a,b"])
def test_windows_that_cannot_be_used(tmp_path, window):
    refused(InputError, put(tmp_path, "a.png"), f"window: '{window}'", "expected", window=window)


def test_windows_that_leave_nothing(tmp_path):
    refused(DataError, dark(tmp_path), "leaves nothing", "0 to 4095", window="5000,6000")
    refused(DataError, tmp_path, "leaves nothing", window="-10,0")
    put(tmp_path / "b", "a.png")
    Image.new("L", (4, 4), 9).save(tmp_path / "b" / "a.png")
    refused(DataError, tmp_path / "b", "all stored values are 9", window="data")


def test_ct_in_hounsfield_units(tmp_path):
    """Signed 16 bits, of which the values of a body use three hundredths; two scanners with other intercepts."""
    units = np.array([[-1000, -500], [0, 1000]])
    for name, intercept in (("a", -1024), ("b", 0)):
        stored = (units - intercept).astype(np.int16)
        (tmp_path / name).mkdir()
        write_dicom(tmp_path / name / "1.dcm", stored, signed=1, Modality="CT", RescaleSlope=1,
                    RescaleIntercept=intercept, PatientID=name)  # fmt: skip
    full = folder.load(str(tmp_path))
    assert any("signed 16 bits" in note and "4.6%" in note for note in full.notes)
    assert any("2 scales" in note and "--window" in note for note in full.notes)
    assert any("2 of 2 files: of modality CT" in note for note in full.notes)
    pair = folder.load(str(tmp_path), window="-1000,400").read([0, 1])[..., 0]
    expected = np.clip((units + 1000) / 1400, 0, 1)
    np.testing.assert_allclose(pair, [expected, expected], atol=1e-6)


# ---------------------------------------------------------------- names


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    put(tmp_path, "A/1.png")
    odd = os.fsencode(tmp_path) + b"/A/caf\xe9.png"
    with open(odd, "wb") as file:
        picture(1).save(file, format="PNG")
    with pytest.raises(DataError, match=r"caf\\udce9\.png.*not UTF-8") as error:
        folder.load(str(tmp_path))
    str(error.value).encode("ascii")
    os.remove(odd)
    os.rename(tmp_path / "A", os.fsencode(tmp_path) + b"/\xff")
    refused(DataError, tmp_path, "udcff", "not UTF-8")
    refused(DataError, os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "udcff", "not UTF-8")
    refused(DataError, os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"), "udcfe", "not UTF-8")  # is not there


def test_a_name_that_is_not_utf8_of_a_file_that_is_not_read(tmp_path):
    put(tmp_path, "A/1.png")
    with open(os.fsencode(tmp_path) + b"/A/caf\xe9.txt", "wb"):
        pass
    assert folder.load(str(tmp_path)).reading.skipped == {"sidecar file (text, table or index)": 1}


def test_names_beyond_ascii(tmp_path):
    data = folder.load(str(put(tmp_path, "肺炎/é.png", "正常/ö.png")))
    assert data.class_names == ("正常", "肺炎") and len(data.fingerprint()) == 16


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


@pytest.mark.parametrize("placeholder", ["", " ", "ANONYMOUS", "Anonymized", "anon", "0000", "unknown", "N/A", "xxx"])
def test_placeholders_are_no_patients(tmp_path, placeholder):
    for i in range(4):
        write_dicom(tmp_path / f"{i}.dcm", np.full((4, 4), i, np.uint8), PatientID=placeholder)
    data = folder.load(str(tmp_path))
    assert list(data.patients) == list(data.ids)
    assert any("4 of 4 DICOM files state no PatientID" in note for note in data.notes)
    assert any("unknown for 4 of 4" in note for note in data.reading.guessed)


def test_one_patient_for_all_is_noted(tmp_path):
    for i in range(4):
        write_dicom(tmp_path / f"{i}.dcm", np.full((4, 4), i, np.uint8), PatientID="H17")
    data = folder.load(str(tmp_path))
    assert set(data.patients) == {"H17"} and len(set(data.splits)) == 1
    assert any("all 4 PatientIDs are the same, 'H17'" in note for note in data.notes)


@pytest.mark.parametrize(("one", "other"), [("p1", "P1"), ("007", "7"), ("A-1", "A1"), ("a 1", "a_1")])
def test_two_spellings_of_a_patient_are_noted(tmp_path, one, other):
    for i, patient in enumerate([one, other, "Z"]):
        write_dicom(tmp_path / f"{i}.dcm", np.full((4, 4), i, np.uint8), PatientID=patient)
    assert any("1 times patients differ only in case" in note for note in folder.load(str(tmp_path)).notes)


def test_issuers_of_one_patient_are_noted(tmp_path):
    for i, issuer in enumerate(["north", "south", "south"]):
        tags = dict(PatientID="1" if i < 2 else "2", IssuerOfPatientID=issuer)
        write_dicom(tmp_path / f"{i}.dcm", np.full((4, 4), i, np.uint8), **tags)
    data = folder.load(str(tmp_path))
    assert list(data.patients) == ["1", "1", "2"]
    assert any("1 PatientIDs have more than one IssuerOfPatientID" in note for note in data.notes)


def test_a_pattern_that_disagrees_with_dicom_is_noted(tmp_path):
    for i, patient in enumerate(["A", "A", "B", "C", ""]):
        write_dicom(tmp_path / f"s{i // 3}_{i}.dcm", np.full((4, 4), i, np.uint8), PatientID=patient)
    parted = folder.load(str(tmp_path), patient_pattern=r"_(\d)")
    assert any("several patients for 1 PatientIDs" in note for note in parted.notes)
    joined = folder.load(str(tmp_path), patient_pattern=r"s(\d)_")
    assert any("one patient for several PatientIDs of the DICOM files, 1 times" in note for note in joined.notes)
    assert not any("several patients for" in note for note in joined.notes)


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
