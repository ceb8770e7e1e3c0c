"""The official NIH layout: whole, in part, damaged; the label file, the split, and files kept in memory or not."""

import csv
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvdm.data import files, nih, split_of_patient
from medvdm.errors import DataError, InputError, MissingFileError

HEADER = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position"]
ROWS = [
    ("00000001_000.png", "Cardiomegaly", 1),
    ("00000001_001.png", "Pneumonia|Effusion", 1),
    ("00000002_000.png", "No Finding", 2),
    ("00000007_000.png", "Effusion", 7),
    ("00000009_000.png", "No Finding", 9),
]


def write_labels(folder: Path, rows=ROWS, name="Data_Entry_2017.csv", encoding="utf-8", quoting=csv.QUOTE_MINIMAL):
    with (folder / name).open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, quoting=quoting)
        writer.writerow(HEADER)
        writer.writerows((image, found, 0, patient, "PA") for image, found, patient in rows)


def image_of(name: str) -> np.ndarray:
    return np.random.default_rng(int(name[:8]) * 1000 + int(name[9:12])).integers(0, 256, (16, 16)).astype(np.uint8)


def write_images(folder: Path, rows=ROWS, into="images"):
    (folder / into).mkdir(parents=True, exist_ok=True)
    for name, _, _ in rows:
        Image.fromarray(image_of(name)).save(folder / into / name)


@pytest.fixture
def folder(tmp_path):
    write_labels(tmp_path)
    write_images(tmp_path)
    return tmp_path


def refused(kind, folder, *words, **options):
    with pytest.raises(kind) as error:
        nih.load(str(folder), **options)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return text


# ---------------------------------------------------------------- what is loaded


def test_images_labels_patients_and_split(folder):
    data = nih.load(str(folder))
    assert data.ids == tuple(name for name, _, _ in ROWS)
    assert data.class_names == ("Cardiomegaly", "Effusion", "No Finding", "Pneumonia")
    np.testing.assert_array_equal(data.labels, [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    assert list(data.patients) == ["1", "1", "2", "7", "9"]
    assert list(data.splits) == [split_of_patient(p) for p in data.patients]
    assert "Patient ID" in data.split_rule
    assert data.notes == ()
    assert data.image_shape == (16, 16, 1)
    got = data.read([3, 0])
    assert got.dtype == np.float32
    for image, name in zip(got, ("00000007_000.png", "00000001_000.png"), strict=True):
        np.testing.assert_array_equal(image[..., 0], image_of(name).astype(np.float32) / np.float32(255))


def test_zero_padded_patient_is_the_same_patient(folder):
    write_labels(folder, [(name, found, f"{patient:08d}") for name, found, patient in ROWS])
    assert list(nih.load(str(folder)).patients) == ["1", "1", "2", "7", "9"]


def test_a_finding_named_twice_is_there_once(folder):
    write_labels(folder, [(ROWS[0][0], "Mass|Mass| Mass", 1), *ROWS[1:]])
    data = nih.load(str(folder))
    assert data.class_names == ("Effusion", "Mass", "No Finding", "Pneumonia")
    assert data.labels[0].tolist() == [0, 1, 0, 0]


def test_two_spellings_of_a_finding_are_refused(folder):
    write_labels(folder, [(ROWS[0][0], "effusion", 1), *ROWS[1:]])
    refused(InputError, folder, "'Effusion' and 'effusion'")


def test_what_was_read_and_skipped(folder):
    write_images(folder, [("00000099_000.png", "", 99), ("00000098_000.png", "", 98)])
    write_lists(folder, [row[0] for row in ROWS[:2]], [ROWS[2][0]])
    reading = nih.load(str(folder)).reading
    assert (reading.seen, reading.read) == (7, 3)
    assert reading.skipped == {"no row in the label file": 2, "on neither official list": 2}


def test_one_changed_file_is_other_data(folder):
    before = nih.load(str(folder)).fingerprint()
    assert nih.load(str(folder)).fingerprint() == before
    pixels = image_of(ROWS[3][0])
    pixels[7, 7] ^= 1
    Image.fromarray(pixels).save(folder / "images" / ROWS[3][0])
    assert nih.load(str(folder)).fingerprint() != before
    Image.fromarray(image_of(ROWS[3][0])).save(folder / "images" / ROWS[3][0])
    assert nih.load(str(folder)).fingerprint() == before
    assert nih.load(str(folder), image_size=8).fingerprint() != before


def test_how_images_are_made_square_is_part_of_the_fingerprint(folder):
    Image.fromarray(np.zeros((16, 20), np.uint8)).save(folder / "images" / ROWS[3][0])
    prints = {nih.load(str(folder), 16, fit).fingerprint() for fit in ("pad", "crop", "stretch")}
    assert len(prints) == 3


def test_partial_download_is_noted(folder):
    write_labels(folder, [*ROWS, ("00000010_000.png", "Hernia", 10), ("00000011_000.png", "No Finding", 11)])
    data = nih.load(str(folder))
    assert len(data) == 5 and "Hernia" not in data.class_names
    assert any("2 of the 7 images" in note and "5 used" in note for note in data.notes)


def test_images_without_a_row_are_ignored_and_noted(folder):
    write_images(folder, [("00000099_000.png", "", 99)])
    data = nih.load(str(folder))
    assert len(data) == 5 and "00000099_000.png" not in data.ids
    assert any(note.startswith("1 images without a row") for note in data.notes)


def test_official_folders_and_skipped_ones(tmp_path):
    write_labels(tmp_path)
    write_images(tmp_path, ROWS[:2], into="images_001/images")
    write_images(tmp_path, ROWS[2:], into="images_002/images")
    write_images(tmp_path, ROWS, into="__MACOSX/images_001")
    write_images(tmp_path, ROWS, into=".cache")
    (tmp_path / "images_001/images/._00000001_000.png").write_bytes(b"resource fork")
    assert len(nih.load(str(tmp_path))) == 5


def test_a_link_to_the_images_is_followed_once(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "folder"
    folder.mkdir()
    write_images(store)
    write_labels(folder)
    (folder / "images").symlink_to(store / "images")
    (store / "images" / "up").symlink_to(folder)  # a loop
    assert len(nih.load(str(folder))) == 5


@pytest.mark.parametrize("options", [
    {"encoding": "utf-8-sig"}, {"quoting": csv.QUOTE_ALL}, {"name": "Data_Entry_2017_v2020.csv"},
])  # fmt: skip
def test_bom_quotes_and_the_other_name(tmp_path, options):
    write_images(tmp_path)
    write_labels(tmp_path, **options)
    data = nih.load(str(tmp_path))
    assert len(data) == 5
    assert options.get("name", "Data_Entry_2017.csv") in data.origin


def test_rgba_images_are_read_by_luminance(folder):
    name = ROWS[0][0]
    Image.fromarray(image_of(name)).convert("RGBA").save(folder / "images" / name)
    got = nih.load(str(folder)).read([0])[0, ..., 0]
    np.testing.assert_array_equal(got, image_of(name).astype(np.float32) / np.float32(255))


def test_fingerprint_does_not_depend_on_the_folder(folder, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "b" / "elsewhere")
    shutil.copy(folder / "Data_Entry_2017.csv", tmp_path / "b")
    assert nih.load(str(tmp_path / "b")).fingerprint() == _without(folder, tmp_path / "b").fingerprint()


def _without(folder, other):
    shutil.move(other, other.parent.parent / "moved_away")
    return nih.load(str(folder))


# ---------------------------------------------------------------- the official split lists


def write_lists(folder, train_val, test):
    (folder / "train_val_list.txt").write_text("\n".join(train_val) + "\n")
    (folder / "test_list.txt").write_text("\r\n".join(test) + "\r\n")


def _many(count=60):
    return [(f"{patient:08d}_{visit:03d}.png", "No Finding", patient) for patient in range(count) for visit in (0, 1)]


def test_official_lists(tmp_path):
    rows = _many()
    write_labels(tmp_path, rows)
    write_images(tmp_path, rows)
    write_lists(tmp_path, [n for n, _, p in rows if p % 3], [n for n, _, p in rows if p % 3 == 0])
    data = nih.load(str(tmp_path))
    for split, patient in zip(data.splits, data.patients, strict=True):
        if int(patient) % 3 == 0:
            assert split == "test"
        else:
            assert split == ("val" if split_of_patient(patient) == "val" else "train")
    assert {split_of_patient(p) for p in data.patients[data.splits == "train"]} == {"train", "test"}
    assert set(data.splits) == {"train", "val", "test"}
    assert "official" in data.split_rule
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(data.patients[data.splits == one]) & set(data.patients[data.splits == other])


def test_images_on_neither_list_are_left_out_and_noted(folder):
    write_lists(folder, [ROWS[0][0], ROWS[1][0]], [ROWS[2][0]])
    data = nih.load(str(folder))
    assert data.ids == tuple(name for name, _, _ in ROWS[:3])
    assert any("2 images are on neither official list" in note for note in data.notes)


def test_lists_that_name_none_of_the_images(folder):
    write_lists(folder, ["a.png"], ["b.png"])
    refused(DataError, folder, "test_list.txt", "none of the 5 images")


@pytest.mark.parametrize("only", ["train_val_list.txt", "test_list.txt"])
def test_only_one_list_is_refused(folder, only):
    (folder / only).write_text(ROWS[0][0])
    refused(MissingFileError, folder, "train_val_list.txt", "test_list.txt", "both")


def test_image_on_both_lists_is_refused(folder):
    names = [name for name, _, _ in ROWS]
    write_lists(folder, names[:3], names[2:])
    refused(DataError, folder, "test_list.txt", names[2])


def test_patient_on_both_sides_is_refused(folder):
    names = [name for name, _, _ in ROWS]
    write_lists(folder, names[1:], names[:1])
    refused(DataError, folder, "patient 1 ")


# ---------------------------------------------------------------- refused


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="--data-dir"):
        nih.load(None)
    refused(MissingFileError, tmp_path / "none", "none", "no such folder")
    (tmp_path / "file").write_text("")
    refused(DataError, tmp_path / "file", "found a file")


def test_label_file_missing_names_both(tmp_path):
    write_images(tmp_path)
    refused(MissingFileError, tmp_path, tmp_path, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")


def test_label_file_that_names_none_of_the_images(folder):
    write_labels(folder, [("other.png", "No Finding", 1)])
    refused(DataError, folder, "Data_Entry_2017.csv", "none of the 5 images")


def test_no_images_at_all(tmp_path):
    write_labels(tmp_path)
    refused(DataError, tmp_path, "none of the 0 images")


@pytest.mark.parametrize(("content", "words"), [
    ("Image Index,Finding Labels\na.png,x\n", ("Patient ID", "found Image Index, Finding Labels")),
    ("Image Index;Finding Labels;Patient ID\n", ("lacks", "Image Index;", "expected commas")),
    ("Image Index\tFinding Labels\tPatient ID\n", ("lacks", "expected commas")),
    ("Image Index,Finding Labels,Patient ID,Patient ID\n", ("'Patient ID' 2 times",)),
    ("Image Index,Finding Labels,Patient ID\na.png,No Finding|Mass,1\n", ("line 2", "'No Finding|Mass'", "alone")),
    ("Image Index,Finding Labels,Patient ID\n00000013_005.png,Mass,14\n", ("line 2", "00000013_005.png", "'14'", "13")),
    ("Image Index,Finding Labels,Patient ID\na.png,x,\n", ("line 2", "''", "whole number")),
    ("Image Index,Finding Labels,Patient ID\na.png,x,nan\n", ("line 2", "'nan'")),
    ("Image Index,Finding Labels,Patient ID\na.png,x,-1\n", ("line 2", "'-1'")),
    ("Image Index,Finding Labels,Patient ID\na.png,x|,1\n", ("line 2", "empty finding")),
    ("", ("lacks", "found nothing")),
    ("Image Index,Finding Labels,Patient ID\na.png,x,1\nb.png,y,one\n", ("line 3", "'one'")),
    ("Image Index,Finding Labels,Patient ID\na.png,x,1.0\n", ("line 2", "'1.0'")),
    ("Image Index,Finding Labels,Patient ID\na.png,x\n", ("line 2", "2 cells")),
    ("Image Index,Finding Labels,Patient ID\na.png,,1\n", ("line 2", "empty finding")),
    ("Image Index,Finding Labels,Patient ID\na.png,x,1\nb.png,x,1\na.png,x,1\n", ("line 4", "after line 2", "a.png")),
])  # fmt: skip
def test_damaged_label_file(folder, content, words):
    (folder / "Data_Entry_2017.csv").write_text(content)
    refused(DataError, folder, folder / "Data_Entry_2017.csv", *words)


def test_label_file_that_is_no_text(folder):
    (folder / "Data_Entry_2017.csv").write_bytes(b"\xff\xfe\x00\x80PK")
    refused(DataError, folder, "Data_Entry_2017.csv", "UTF-8")


def test_one_name_in_two_folders(folder):
    write_images(folder, ROWS[:1], into="images_002")
    refused(DataError, folder, "00000001_000.png", "images_002", "twice")


def test_folder_that_cannot_be_listed(folder, monkeypatch):
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "images":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)  # root may read every folder, so the refusal is played
    refused(DataError, folder, folder / "images", "Permission denied")


def test_sizes_that_differ(folder):
    Image.new("L", (16, 20)).save(folder / "images" / ROWS[3][0])
    refused(DataError, folder, ROWS[0][0], "16 x 16", ROWS[3][0], "16 x 20", "--image-size")
    data = nih.load(str(folder), image_size=8)
    assert data.image_shape == (8, 8, 1)
    assert any("1 of 5 images are not square: padded" in note for note in data.notes)


# ---------------------------------------------------------------- in memory or not: the same values


@pytest.mark.parametrize("image_size", [None, 8, 11])
@pytest.mark.parametrize("deep", [False, True])
def test_memory_and_disk_give_the_same(folder, monkeypatch, image_size, deep):
    if deep:  # 16 bits cannot be kept as uint8
        for name, _, _ in ROWS:
            Image.fromarray(image_of(name).astype(np.uint16) * 251).save(folder / "images" / name)
    kept = nih.load(str(folder), image_size=image_size)
    monkeypatch.setattr(files, "MEMORY_LIMIT", 0)
    decoded = nih.load(str(folder), image_size=image_size)
    shutil.rmtree(folder / "images")
    order = [4, 0, 0, 2]
    images = kept.read(order)
    assert images.dtype == np.float32 and images.shape == (4, *kept.image_shape)
    np.testing.assert_array_equal(images[1], images[2])
    with pytest.raises(MissingFileError, match=ROWS[4][0]):
        decoded.read(order)
    write_images(folder)
    if deep:
        for name, _, _ in ROWS:
            Image.fromarray(image_of(name).astype(np.uint16) * 251).save(folder / "images" / name)
    np.testing.assert_array_equal(decoded.read(order), images)
    assert decoded.fingerprint() == kept.fingerprint()
    assert decoded.read([]).shape == (0, *kept.image_shape)


def test_truncated_file_is_found_at_load_in_memory_and_at_read_otherwise(folder, monkeypatch):
    path = folder / "images" / ROWS[2][0]
    path.write_bytes(path.read_bytes()[:120])
    refused(DataError, folder, path)
    monkeypatch.setattr(files, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(files, "RANGE_SAMPLE", 2)  # the first and the last file
    data = nih.load(str(folder))
    data.read([0, 1])
    with pytest.raises(DataError, match=ROWS[2][0]):
        data.read([1, 2])


def test_a_file_that_changed_after_loading(folder, monkeypatch):
    monkeypatch.setattr(files, "MEMORY_LIMIT", 0)
    data = nih.load(str(folder))
    Image.new("L", (9, 9)).save(folder / "images" / ROWS[0][0])
    with pytest.raises(DataError, match="found 9 x 9 pixels of uint8; expected 16 x 16"):
        data.read([0])
    Image.fromarray(np.full((16, 16), 30_000, np.uint16)).save(folder / "images" / ROWS[1][0])
    with pytest.raises(DataError, match="of float32; expected 16 x 16 of uint8"):  # a cast would give a black image
        data.read([1])


def test_8_bit_images_are_kept_as_bytes(folder, monkeypatch):
    monkeypatch.setattr(files, "MEMORY_LIMIT", 5 * 16 * 16)  # enough for bytes, not for float32
    data = nih.load(str(folder))
    shutil.rmtree(folder / "images")
    assert data.read([0]).shape == (1, 16, 16, 1)


# ---------------------------------------------------------------- size and the real data


def test_the_whole_label_file_is_read_in_time(tmp_path):
    write_labels(tmp_path, [(f"{i // 4:08d}_{i % 4:03d}.png", "Effusion|Mass", i // 4) for i in range(112_120)])
    write_images(tmp_path, [("00000005_002.png", "", 5)])
    start = time.process_time()
    with next(tmp_path.glob("Data_Entry*.csv")).open(newline="") as file:
        rows = sum(1 for _ in csv.DictReader(file))
    plain = time.process_time() - start
    start = time.process_time()
    data = nih.load(str(tmp_path))
    # A ratio of processor times, so that a busy machine does not matter; a quadratic look-up would be thousands.
    assert rows == 112_120 and time.process_time() - start < 15 * plain
    assert any("112,119 of the 112,120" in note for note in data.notes)


def test_real_data(real_data):
    folder = real_data / "nih-chestxray8-256"
    data = nih.load(str(folder))
    assert {split: tuple(of.values()) for split, of in data.counts().items()} == {
        "train": (538, 364), "val": (70, 47), "test": (192, 125),
    }  # fmt: skip
    assert data.class_names == ("No Finding", "Pneumonia")
    assert data.labels.sum(axis=0).tolist() == [404, 396]
    assert data.image_shape == (256, 256, 1)
    first = np.asarray(Image.open(folder / "images" / data.ids[0]))
    np.testing.assert_array_equal(data.read([0])[0, ..., 0], first / np.float32(255))
