"""MedMNIST files: read as they are, checked when downloaded; nothing here goes beyond the loopback device."""

import functools
import gc
import hashlib
import http.server
import re
import threading
import warnings

import numpy as np
import pooch
import pytest

from medvdm.data import files, medmnist
from medvdm.data.convert import resize
from medvdm.errors import DataError, InputError, MissingFileError

COUNTS = {"train": 6, "val": 3, "test": 2}


def arrays(size=28, channels=1, labels=(0, 1), seed=0):
    rng = np.random.default_rng(seed)
    shape = (size, size) if channels == 1 else (size, size, channels)
    made = {}
    for split, n in COUNTS.items():
        made[f"{split}_images"] = rng.integers(0, 256, (n, *shape)).astype(np.uint8)
        made[f"{split}_labels"] = np.resize(np.array(labels, np.uint8), (n, 1))
    return made


def write(path, **changes):
    np.savez_compressed(path, **{**arrays(), **changes})
    return path


def refused(kind, *words, flag="pneumoniamnist", **options):
    with pytest.raises(kind) as error:
        medmnist.load(flag, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


# ---------------------------------------------------------------- what is loaded


def test_official_split_labels_and_values(tmp_path):
    content = arrays()
    np.savez(tmp_path / "pneumoniamnist.npz", **content)
    data = medmnist.load("pneumoniamnist", str(tmp_path))
    assert data.image_shape == (28, 28, 1)
    assert {split: of["images"] for split, of in data.counts().items()} == COUNTS
    assert data.class_names == ("normal", "pneumonia")
    for split in COUNTS:
        where = data.indices(split)
        expected = content[f"{split}_images"][..., None].astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(data.read(where), expected)  # not flipped, not reordered
        np.testing.assert_array_equal(data.labels[where].argmax(axis=1), content[f"{split}_labels"][:, 0])
    assert len(set(data.ids)) == 11 and data.ids[0] == "train_0"
    assert any("no patients" in note for note in data.notes)
    assert any("without a checksum" in note for note in data.notes)


def test_rgb_stays_rgb(tmp_path):
    content = arrays(channels=3, labels=(0, 8, 4))
    np.savez(tmp_path / "pathmnist.npz", **content)
    data = medmnist.load("pathmnist", str(tmp_path))
    assert data.image_shape == (28, 28, 3) and data.labels.shape == (11, 9)
    np.testing.assert_array_equal(data.read([0])[0], content["train_images"][0].astype(np.float32) / np.float32(255))


def test_multi_label_gets_a_class_for_no_finding(tmp_path):
    labels = {f"{split}_labels": np.zeros((n, 14), np.uint8) for split, n in COUNTS.items()}
    labels["train_labels"][0, [2, 6]] = 1
    data = medmnist.load("chestmnist", str(write(tmp_path / "chestmnist.npz", **labels)))
    assert data.class_names[-1] == "no finding" and len(data.class_names) == 15
    assert [data.class_names[i] for i in np.flatnonzero(data.labels[0])] == ["effusion", "pneumonia"]
    assert data.labels[1:].sum() == 10 and data.labels[1:, -1].all()


def test_labels_without_an_axis_are_indices_too(tmp_path):
    flat = {f"{split}_labels": np.resize(np.array([0, 1], np.uint8), n) for split, n in COUNTS.items()}
    flat_file, official_file = write(tmp_path / "a.npz", **flat), write(tmp_path / "b.npz")
    one, other = (medmnist.load("pneumoniamnist", str(path)) for path in (flat_file, official_file))
    np.testing.assert_array_equal(one.labels, other.labels)


def test_a_file_of_another_set_is_refused(tmp_path):
    """PneumoniaMNIST and BreastMNIST have the same form: only the name tells them apart."""
    for name in ("pneumoniamnist.npz", "pneumoniamnist_64.npz"):
        path = write(tmp_path / name)
        refused(DataError, path, "--data pneumoniamnist", flag="breastmnist", data_dir=str(path))


@pytest.mark.parametrize("image_size", [None, 20])
def test_what_was_read_and_its_fingerprint(tmp_path, image_size):
    content = arrays()
    content["val_images"] = np.clip(content["val_images"], 51, 204)
    for split in COUNTS:
        content[f"{split}_images"] = np.clip(content[f"{split}_images"], 51, 204)
    path = write(tmp_path / "breastmnist.npz", **content)
    data = medmnist.load("breastmnist", str(path), image_size)
    assert (data.reading.seen, data.reading.read, data.reading.stored_range) == (11, 11, (51 / 255, 204 / 255))
    assert data.fingerprint() == medmnist.load("breastmnist", str(path), image_size).fingerprint()
    content["test_images"][1, 5, 6] ^= 1
    path = write(path, **content)
    assert data.fingerprint() != medmnist.load("breastmnist", str(path), image_size).fingerprint()


def test_a_file_may_have_any_name(tmp_path):
    assert len(medmnist.load("pneumoniamnist", str(write(tmp_path / "mine.npz")))) == 11


@pytest.mark.parametrize(("image_size", "there", "taken"), [
    (None, (28, 64), 28), (None, (64, 128), 64), (28, (28, 64), 28), (64, (28, 64), 64), (32, (28, 64, 128), 64),
    (100, (28, 128, 224), 128), (100, (28, 64), 64), (256, (28, 64), 64), (20, (28, 64), 28),
])  # fmt: skip
def test_which_file_of_a_folder(tmp_path, image_size, there, taken):
    for size in there:
        np.savez(tmp_path / ("breastmnist.npz" if size == 28 else f"breastmnist_{size}.npz"), **arrays(size))
    data = medmnist.load("breastmnist", str(tmp_path), image_size)
    assert data.image_shape == (image_size or taken, image_size or taken, 1)
    source = arrays(taken)["train_images"][0][..., None].astype(np.float32) / np.float32(255)
    expected = source if image_size in (None, taken) else resize(source, image_size)
    np.testing.assert_allclose(data.read([0])[0], expected, atol=1e-6)
    assert any("resized" in note for note in data.notes) == (image_size not in (None, taken))


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_in_memory_or_at_every_read(tmp_path, monkeypatch, channels):
    flag = "breastmnist" if channels == 1 else "retinamnist"
    np.savez(tmp_path / f"{flag}.npz", **arrays(channels=channels))
    kept = medmnist.load(flag, str(tmp_path), 20)
    monkeypatch.setattr(files, "MEMORY_LIMIT", 0)
    resized = medmnist.load(flag, str(tmp_path), 20)
    np.testing.assert_array_equal(kept.read([9, 1]), resized.read([9, 1]))
    assert resized.read([]).shape == (0, 20, 20, channels)


def test_official_facts():
    """Counted from release 3.0.2; the checksums themselves can only be compared with the real files."""
    assert len(medmnist.FLAGS) == 12
    classes = {"pathmnist": 9, "chestmnist": 14, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5,
               "breastmnist": 2, "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11, "organcmnist": 11,
               "organsmnist": 11}  # fmt: skip
    checksums = [md5 for info in medmnist._FLAGS.values() for md5 in info.md5.values()]
    assert {flag: len(info.classes) for flag, info in medmnist._FLAGS.items()} == classes
    assert all(tuple(info.md5) == medmnist.SIZES for info in medmnist._FLAGS.values())
    assert len(set(checksums)) == 48 and all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in checksums)
    rgb = {flag for flag, info in medmnist._FLAGS.items() if info.channels == 3}
    assert rgb == {"pathmnist", "dermamnist", "retinamnist", "bloodmnist"}


# ---------------------------------------------------------------- files that are not what they should be


def test_no_such_place(tmp_path):
    refused(MissingFileError, tmp_path / "none", data_dir=str(tmp_path / "none"))
    refused(MissingFileError, tmp_path, "pneumoniamnist_64.npz", data_dir=str(tmp_path))
    refused(InputError, "did you mean 'pneumoniamnist'", flag="pneumonia", data_dir=str(tmp_path))


@pytest.mark.parametrize(("changes", "words"), [
    ({"val_images": np.zeros((3, 28, 28), np.float32)}, ("val_images", "float32", "uint8")),
    ({"val_images": np.zeros((3, 28, 28, 3), np.uint8)}, ("val_images", "(3, 28, 28, 3)")),
    ({"val_images": np.zeros((3, 1, 28, 28), np.uint8)}, ("val_images", "channels first?", "np.moveaxis")),
    ({"val_images": np.zeros((3, 28, 28, 1), np.uint8)}, ("val_images", "(3, 28, 28, 1)", "(N, H, W)")),
    ({"val_images": np.zeros((28, 28, 3), np.uint8)}, ("3 val_labels", "expected 28")),
    ({"val_labels": np.zeros((3, 1, 1), np.uint8)}, ("(3, 1, 1)",)),
    ({"val_labels": np.zeros((1, 3), np.uint8)}, ("1 val_labels", "expected 3")),
    ({"val_labels": np.zeros((3, 1), bool)}, ("bool", "expected integers")),
    ({"val_labels": np.full((3, 1), "0")}, ("<U1 of shape", "expected integers")),
    ({"val_images": np.zeros((3, 32, 32), np.uint8)}, ("differ in the shape",)),
    ({"val_images": np.zeros((4, 28, 28), np.uint8)}, ("3 val_labels", "expected 4")),
    ({"test_labels": np.full((2, 1), 2)}, ("0 to 2", "expected 0 to 1")),
    ({"test_labels": np.full((2, 1), -1)}, ("-1",)),
    ({"test_labels": np.zeros((2, 2), np.uint8)}, ("differ in the shape",)),
    ({"test_labels": np.zeros((2, 1), np.float32)}, ("float32", "expected integers")),
    ({"test_images": np.array([{}, {}], dtype=object)}, ("allow_pickle",)),
])  # fmt: skip
def test_wrong_arrays(tmp_path, changes, words):
    path = write(tmp_path / "pneumoniamnist.npz", **changes)
    refused(DataError, path, *words, data_dir=str(path))


def test_missing_arrays(tmp_path):
    path = tmp_path / "pneumoniamnist.npz"
    content = arrays()
    del content["val_labels"]
    np.savez(path, **content)
    refused(DataError, path, "lacks val_labels", "train_images", data_dir=str(path))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_archive(tmp_path, keep):
    path = write(tmp_path / "pneumoniamnist.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    refused(DataError, path, "expected a MedMNIST .npz", data_dir=str(path))


def test_damaged_in_the_middle(tmp_path):
    path = write(tmp_path / "pneumoniamnist.npz")
    whole = bytearray(path.read_bytes())
    whole[500:1500] = bytes(1000)
    path.write_bytes(whole)
    refused(DataError, path, data_dir=str(path))


def test_not_an_archive(tmp_path):
    path = tmp_path / "pneumoniamnist.npz"
    path.write_text("<html>404</html>")
    refused(DataError, path, data_dir=str(path))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    refused(DataError, path, "single array", data_dir=str(path))


def test_too_large_for_memory_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "pneumoniamnist.npz")

    def load(*args, **kwargs):
        raise MemoryError("Unable to allocate 15 GiB")

    monkeypatch.setattr(np, "load", load)
    refused(DataError, path, "15 GiB", "--image-size", data_dir=str(path))


# ---------------------------------------------------------------- downloads, from a server on this machine


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server in place of Zenodo; the folder that it serves. Its log of requests is ``served.requests``."""
    place = tmp_path / "served"
    place.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(place)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(medmnist, "_URL", f"http://127.0.0.1:{server.server_port}/{{file}}?download=1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    yield place, requests
    server.shutdown()
    server.server_close()
    with warnings.catch_warnings():  # pooch leaves the connection of a failed download to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def official(monkeypatch, path, size=28, flag="pneumoniamnist"):
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist._FLAGS[flag].md5, size, md5)


def test_download_is_checked_and_cached(served, monkeypatch):
    place, requests = served
    official(monkeypatch, write(place / "pneumoniamnist.npz"))
    data = medmnist.load("pneumoniamnist")
    assert len(data) == 11 and len(requests) == 1
    assert not any("checksum" in note for note in data.notes)
    medmnist.load("pneumoniamnist")
    assert len(requests) == 1  # from the cache


def test_download_of_the_size_that_fits(served, monkeypatch):
    place, _ = served
    np.savez(place / "pneumoniamnist_64.npz", **arrays(64))
    official(monkeypatch, place / "pneumoniamnist_64.npz", 64)
    assert medmnist.load("pneumoniamnist", image_size=40).image_shape == (40, 40, 1)


def test_download_with_another_checksum(served):
    place, _ = served
    write(place / "pneumoniamnist.npz")  # the official MD5 stays
    refused(DataError, "pneumoniamnist.npz", "checksum", "--data-dir")
    assert not (place.parent / "cache" / "medvdm" / "pneumoniamnist.npz").exists()


def test_download_that_fails(served, monkeypatch):
    refused(MissingFileError, "pneumoniamnist.npz", "404", "by hand", "--data-dir")
    monkeypatch.setattr(medmnist, "_URL", "http://127.0.0.1:9/{file}")  # nothing listens there
    refused(MissingFileError, "pneumoniamnist.npz", "by hand", "--data-dir")


def test_cache_that_cannot_be_written(served, monkeypatch, tmp_path):
    (tmp_path / "blocked").write_text("a file where the cache folder should be")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "blocked" / project)
    refused(MissingFileError, "pneumoniamnist.npz", "--data-dir")


def test_the_address_is_zenodo():
    assert medmnist._URL.format(file="x_64.npz") == "https://zenodo.org/records/10519652/files/x_64.npz?download=1"


def test_real_data(real_data):
    data = medmnist.load("pneumoniamnist", str(real_data / "medmnist"))
    assert {split: of["images"] for split, of in data.counts().items()} == {"train": 2428, "val": 270, "test": 234}
    assert data.image_shape == (28, 28, 1)
    with np.load(real_data / "medmnist" / "pneumoniamnist.npz") as archive:
        np.testing.assert_array_equal(
            data.read(data.indices("test"))[..., 0], archive["test_images"].astype(np.float32) / np.float32(255)
        )
