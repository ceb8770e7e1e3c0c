"""Codecs' sizes against files on disk, entropy and reference values; and what is refused."""

import csv
import math
import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from medvdm.data import split_of_patient
from medvdm.errors import DataError, InputError, InputTypeError, MissingPackageError
from medvdm.evaluation import codecs
from medvdm.evaluation.statistics import clustered_stderr

NAMES = ("png", "webp", "jpegls", "jxl")


def smooth(n, h, w, c, seed=0):
    """Uint8 images with gradients and some noise, as unlike in their parts as a picture's."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w][..., None] / max(h, w)
    waves = np.sin(7 * x + rng.uniform(0, 6, (n, 1, 1, c))) + np.cos(5 * y + rng.uniform(0, 6, (n, 1, 1, c)))
    return np.clip(127 + 50 * waves + rng.normal(0, 2, (n, h, w, c)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_are_those_of_files_on_disk(tmp_path, channels):
    """By imagecodecs' own writer for all four; PIL reads PNG and WebP back from the disk, pixel for pixel."""
    images = smooth(3, 40, 33, channels)
    got = codecs.codec_bits(images)
    for name in NAMES:
        called, settings = codecs.CODECS[name]
        bits = []
        for i, image in enumerate(images):
            stored = np.repeat(image, 3, -1) if name == "webp" and channels == 1 else image.squeeze()
            path = tmp_path / f"{i}.{called}"
            imagecodecs.imwrite(path, stored, codec=called, **settings)
            bits.append(path.stat().st_size * 8 / image.size)
            if name in ("png", "webp"):
                with Image.open(path) as opened:
                    np.testing.assert_array_equal(np.asarray(opened), stored)
        assert got[f"{name}_bpd"] == pytest.approx(np.mean(bits), rel=1e-12)
        assert got[f"{name}_bpd_stderr"] == pytest.approx(np.std(bits, ddof=1) / math.sqrt(3), rel=1e-9)


def test_sizes_are_about_those_of_another_encoder(tmp_path):
    """PIL brings its own PNG filters and its own build of libwebp, at the same settings."""
    image = smooth(1, 200, 180, 1)
    got = codecs.file_bytes(image)
    Image.fromarray(image[0, ..., 0]).save(tmp_path / "a.png", optimize=True)
    Image.fromarray(image[0, ..., 0]).save(tmp_path / "a.webp", lossless=True, quality=75, method=6)
    assert got["png"][0] == pytest.approx((tmp_path / "a.png").stat().st_size, rel=0.02)
    assert got["webp"][0] == pytest.approx((tmp_path / "a.webp").stat().st_size, rel=0.02)


def test_one_gray_value_costs_headers_only():
    got = codecs.codec_bits(np.full((2, 256, 256, 1), 77, np.uint8))
    for name in NAMES:
        assert 0 < got[f"{name}_bpd"] < 0.1
        assert got[f"{name}_sheet_bpd"] is None


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_costs_its_eight_bits(channels):
    """Never less, but for chance: no code can. JPEG-LS and JPEG XL have no way out and pay about one bit more."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 128, 128, channels), dtype=np.uint8)
    got = codecs.codec_bits(noise)
    assert all(8.0 < got[f"{name}_bpd"] < limit for name, limit in zip(NAMES, (8.2, 8.2, 9.5, 9.5), strict=True))


def test_no_code_is_shorter_than_the_entropy():
    """Independent pixels of four gray values: 1.75 bits each, within five standard errors of the sample."""
    p = np.array([0.5, 0.25, 0.125, 0.125])
    pixels = np.random.default_rng(1).choice(np.array([10, 90, 91, 200], np.uint8), (1, 200, 200, 1), p=p)
    bits = -np.log2(p)
    least = 1.75 - 5 * math.sqrt(float(np.sum(p * bits**2)) - 1.75**2) / 200
    got = codecs.codec_bits(pixels)
    assert all(got[f"{name}_bpd"] > least for name in NAMES)
    assert got["webp_bpd"] < 1.85 and got["jxl_bpd"] < 1.85  # these two learn which values there are


def test_errors_count_patients():
    images = smooth(5, 70, 65, 1)
    images[:3] //= 8  # one patient's images are alike
    patients = np.array(["a", "a", "a", "b", "c"])
    got, sizes = codecs.codec_bits(images, patients), codecs.file_bytes(images)
    for name in NAMES:
        bits = sizes[name] * 8 / (70 * 65)
        assert got[f"{name}_bpd"] == pytest.approx(bits.mean())
        assert got[f"{name}_bpd_stderr"] == pytest.approx(clustered_stderr(bits, patients))
        assert got[f"{name}_bpd_stderr"] > 1.2 * bits.std(ddof=1) / math.sqrt(5)
    assert codecs.codec_bits(images[:3], patients[:3])["jxl_bpd_stderr"] is None


@pytest.mark.parametrize(("n", "shape"), [(1, (4, 5)), (7, (4, 5)), (10, (6, 3)), (18, (5, 4))])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_every_image_once(n, shape, channels):
    h, w = shape
    images = np.random.default_rng(n).integers(1, 256, (n, h, w, channels), dtype=np.uint8)
    (sheet,) = codecs.sheets(images)
    rows, columns = sheet.shape[0] // h, sheet.shape[1] // w
    assert sheet.shape == (rows * h, columns * w, channels) and sheet.dtype == np.uint8
    assert math.sqrt(n) <= columns <= 4 / 3 * (math.sqrt(n) + 1) + 1 and n <= rows * columns < n + columns
    for i in range(rows * columns):
        top, left = i // columns * h, i % columns * w
        cell = sheet[top : top + h, left : left + w]
        np.testing.assert_array_equal(cell, images[i] if i < n else np.zeros_like(cell))


def test_many_images_make_several_sheets(monkeypatch):
    monkeypatch.setattr(codecs, "SHEET_PIXELS", 12 * 20)
    images = np.random.default_rng(0).integers(1, 256, (29, 4, 5, 1), dtype=np.uint8)
    made = codecs.sheets(images)
    assert [s.size for s in made] == [240, 240, 120]
    assert sum(int(s.sum()) for s in made) == int(images.sum())
    assert len(codecs.sheets(np.ones((2, 40, 50, 1), np.uint8))) == 2  # an image larger than a sheet is its own


def test_sheet_bits_are_of_the_images_pixels():
    """Seven images leave one cell of eight empty, which are in the file and not in the number of pixels."""
    images = smooth(7, 28, 28, 1)
    got, sheet = codecs.codec_bits(images), codecs.file_bytes(codecs.sheets(images))
    for name in NAMES:
        assert got[f"{name}_sheet_bpd"] == pytest.approx(sheet[name].sum() * 8 / images.size)
        assert got[f"{name}_sheet_bpd"] < got[f"{name}_bpd"] - 0.1  # headers


def test_sheets_are_for_small_images():
    assert all(codecs.codec_bits(smooth(2, 64, 70, 1))[f"{name}_sheet_bpd"] > 0 for name in NAMES)
    assert all(codecs.codec_bits(smooth(2, 65, 70, 1))[f"{name}_sheet_bpd"] is None for name in NAMES)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3), (5, 3), (5, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images_are_not_mistaken_for_others(shape, channels):
    """(5, 3) gray is no row of RGB pixels, (5, 4) no RGBA: every file is compared with its image."""
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, channels), dtype=np.uint8)
    assert all(len(sizes) == 2 and sizes.min() > 20 for sizes in codecs.file_bytes(images).values())


def test_images_that_lie_in_memory_in_another_order():
    images = smooth(3, 40, 33, 3)
    apart = np.moveaxis(np.ascontiguousarray(np.moveaxis(images, -1, 0)), 0, -1)[:, ::-1][:, ::-1]
    assert codecs.codec_bits(apart) == codecs.codec_bits(images)


def test_gray_may_lack_its_axis():
    images = smooth(3, 20, 22, 1)
    assert codecs.codec_bits(images[..., 0]) == codecs.codec_bits(images)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("webp", {"lossless": False}), ("jxl", {"lossless": False, "distance": 1.0}), ("jpegls", {"level": 3})],
)
def test_a_codec_that_loses_something_is_an_error(monkeypatch, name, changes):
    called, settings = codecs.CODECS[name]
    monkeypatch.setitem(codecs.CODECS, name, (called, settings | changes))
    with pytest.raises(DataError, match=rf"^{name}: image \d, 40x33x1, .* expected a lossless codec$"):
        codecs.codec_bits(smooth(3, 40, 33, 1))


def test_an_image_that_a_format_cannot_hold():
    with pytest.raises(DataError, match=r"^webp: cannot store image 0, 1x16384x1: [^\n]+$"):
        codecs.codec_bits(np.zeros((1, 1, 16384, 1), np.uint8))


@pytest.mark.parametrize("use", [codecs.codec_bits, codecs.file_bytes])
@pytest.mark.parametrize(
    ("levels", "error", "match"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), InputTypeError, "levels: dtype float32; expected uint8"),
        (np.zeros((2, 8, 8, 1), np.uint16), InputTypeError, "levels: dtype uint16; expected uint8"),
        (np.zeros((2, 8, 8, 1), bool), InputTypeError, "levels: dtype bool; expected uint8"),
        (np.zeros((2, 8, 8, 4), np.uint8), InputError, r"levels: shape \(\d, 8, 8, 4\); expected .* alpha"),
        (np.zeros((2, 3, 8, 8), np.uint8), InputError, r"levels: shape \(\d, 3, 8, 8\); expected .* np.moveaxis"),
        (np.zeros((2, 0, 8, 1), np.uint8), InputError, r"levels: shape \(\d, 0, 8, 1\); expected"),
        (np.zeros((0, 8, 8, 1), np.uint8), InputError, r"levels: shape \(0, .*; expected"),
        (np.zeros((2,), np.uint8), InputError, r"levels: shape .*; expected"),
    ],
)
def test_what_is_no_8_bit_image_is_refused(use, levels, error, match):
    with pytest.raises(error, match=match) as raised:
        use(levels)
    assert "\n" not in str(raised.value)


def test_patients_must_fit():
    with pytest.raises(InputError, match=r"^patients: shape \(2,\); expected \(3,\), one per image$"):
        codecs.codec_bits(smooth(3, 8, 8, 1), ["a", "b"])


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(MissingPackageError, match=r"^codecs: .*imagecodecs.*pip install 'medvdm\[codecs\]'$"):
        codecs.codec_bits(smooth(1, 8, 8, 1))


def test_a_library_built_without_a_codec(monkeypatch):
    monkeypatch.setattr(imagecodecs.JPEGXL, "available", False)
    with pytest.raises(MissingPackageError, match=r"^codecs: imagecodecs [\d.]+ has no jpegxl; pip install [^\n]+$"):
        codecs.codec_bits(smooth(1, 8, 8, 1))


def test_nih_costs_what_was_measured_elsewhere(real_data):
    """16 images of test patients against the values of 200 others, within three standard errors of the difference."""
    folder = real_data / "nih-chestxray8-256"
    with open(folder / "Data_Entry_2017.csv", newline="") as table:
        rows = [row for row in csv.DictReader(table) if split_of_patient(row["Patient ID"]) == "test"]
    first = {row["Patient ID"]: row["Image Index"] for row in rows}  # one image per patient
    levels = np.stack([np.asarray(Image.open(folder / "images" / name)) for name in list(first.values())[:16]])
    got = codecs.codec_bits(levels[..., None])
    for name, expected in zip(NAMES, (3.29, 2.75, 2.75, 2.57), strict=True):
        stderr = got[f"{name}_bpd_stderr"] * math.sqrt(1 + 16 / 200)
        assert stderr < 0.15
        assert got[f"{name}_bpd"] == pytest.approx(expected, abs=3 * stderr)


def test_pneumoniamnist_costs_what_was_measured_elsewhere(real_data):
    with np.load(real_data / "medmnist" / "pneumoniamnist.npz") as arrays:
        got = codecs.codec_bits(arrays["test_images"][..., None])
    for name, expected in (("png", 5.40), ("jpegls", 5.09), ("jxl", 4.93)):
        assert got[f"{name}_sheet_bpd"] == pytest.approx(expected, abs=0.1)
    assert got["jxl_bpd"] == pytest.approx(5.42, abs=0.1) and got["png_bpd"] == pytest.approx(6.43, abs=0.1)
