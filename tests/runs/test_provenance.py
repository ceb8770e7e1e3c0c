"""Files of samples say what they are: the numbers, the grid, and where they come from."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvdm.errors import InputError, InputTypeError, MissingFileError
from medvdm.images import default_columns
from medvdm.runs.provenance import (
    PROCESSED,
    PROVENANCE_CHUNK,
    SUFFIXES,
    SYNTHETIC,
    index_of_one,
    write_processed,
    write_samples,
)
from medvdm.runs.store import atomic

PROVENANCE = {
    "run": "first",
    "version": "0.1.0",
    "seed": 3,
    "steps": 250,
    "guidance": 0.5,
    "weights": "ema",
    "label": None,
    "step": 2000,
}
CLASSES = ("No Finding", "Pneumonia")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(5, 8, 6, 1)).astype(np.float32)


@pytest.fixture
def sample(images) -> dict[str, Any]:
    """The arguments of write_samples, other than the path."""
    findings = np.array([[1, 0], [0, 1], [0, 0], [0, 1], [1, 1]])
    return {"images": images, "findings": findings, "class_names": CLASSES, "provenance": PROVENANCE}


# --- npz ---------------------------------------------------------------------------------------------------------


def test_npz_holds_what_it_is_given_and_says_what_it_is(tmp_path, sample) -> None:
    path = tmp_path / "a.npz"
    write_samples(path, **sample)
    with np.load(path, allow_pickle=False) as f:
        assert set(f) == {
            *("images", "findings", "labels", "class_names", "synthetic", "statement", "provenance"),
            *("run", "version", "seed", "steps", "guidance", "weights"),
        }
        assert f["images"].dtype == np.float32 and np.array_equal(f["images"], sample["images"])
        assert f["labels"].dtype == np.int64 and f["labels"].tolist() == [0, 1, -1, 1, -1]
        assert f["findings"].dtype == np.uint8 and np.array_equal(f["findings"], sample["findings"])
        assert tuple(f["class_names"]) == CLASSES
        assert f["synthetic"].dtype == np.bool_ and f["synthetic"].item() is True
        assert str(f["statement"]) == SYNTHETIC
        assert json.loads(str(f["provenance"])) == PROVENANCE
        flat = {k: f[k].item() for k in ("run", "version", "seed", "steps", "guidance", "weights")}
        assert flat == {k: PROVENANCE[k] for k in flat}


def test_the_statement_says_what_it_must() -> None:
    for words in ("Synthetic", "medvdm", "not a medical image of any person", "not for clinical use"):
        assert words in SYNTHETIC


def test_npz_of_an_unknown_provenance(tmp_path, images) -> None:
    path = tmp_path / "a.npz"
    write_samples(path, images=images, findings=None, class_names=(), provenance={"run": None, "seed": None})
    with np.load(path, allow_pickle=False) as f:
        assert json.loads(str(f["provenance"])) == {"run": None, "seed": None}
        assert f["labels"].tolist() == [-1] * 5 and f["class_names"].shape == (0,)
        assert [f[k].item() for k in ("run", "version", "weights", "seed", "steps")] == ["", "", "", -1, -1]
        assert np.isnan(f["guidance"])
        assert f["synthetic"].item() is True


def test_npz_of_numpy_scalars_and_8_bit_images(tmp_path) -> None:
    path = tmp_path / "a.npz"
    gray = np.array([[[0, 51], [204, 255]]], np.uint8)
    write_samples(
        path,
        images=gray,
        findings=np.array([[False, True]]),
        class_names=CLASSES,
        provenance={"seed": np.uint32(7), "guidance": np.float32(0.5), "run": tmp_path, "times": np.arange(2)},
    )
    with np.load(path, allow_pickle=False) as f:
        np.testing.assert_allclose(f["images"][0, ..., 0], [[0, 0.2], [0.8, 1]])
        assert f["seed"].item() == 7 and f["guidance"].item() == 0.5
        assert json.loads(str(f["provenance"])) == {"seed": 7, "guidance": 0.5, "run": str(tmp_path), "times": [0, 1]}


def test_the_same_samples_give_the_same_bytes(tmp_path, sample) -> None:
    for suffix in (".npz", ".png"):
        a, b = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        write_samples(a, **sample)
        write_samples(b, **sample)
        assert a.read_bytes() == b.read_bytes()


# --- png ---------------------------------------------------------------------------------------------------------


def test_png_is_a_grid_of_the_images(tmp_path, images) -> None:
    path = tmp_path / "a.png"
    write_samples(path, images=images, findings=None, class_names=(), provenance=PROVENANCE, columns=3)
    with Image.open(path) as picture:
        assert picture.mode == "L"
        sheet = np.asarray(picture)
    gap = (sheet.shape[1] - 18) // 2
    assert sheet.shape == (16 + gap, 18 + 2 * gap)
    for i, image in enumerate(images):
        top, left = (i // 3) * (8 + gap), (i % 3) * (6 + gap)
        error = sheet[top : top + 8, left : left + 6] / 255.0 - image[..., 0]
        assert np.abs(error).max() <= 0.5 / 255 + 1e-6  # rounded, not cut off
    assert (sheet[8 : 8 + gap] == 255).all()


def test_png_of_one_rgb_image_is_the_image(tmp_path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 7, 5, 3), dtype=np.uint8)
    write_samples(tmp_path / "a.png", images=image, findings=None, class_names=(), provenance={}, columns=4)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), image[0])


def test_png_says_what_it_is(tmp_path, sample) -> None:
    path = tmp_path / "a.PNG"  # suffixes in capitals are the same suffixes
    write_samples(path, **sample)
    with Image.open(path) as picture:
        picture.load()
        text = picture.text
    assert text["Comment"] == text["Disclaimer"] == SYNTHETIC and SYNTHETIC in text["Description"]
    assert text["Title"].startswith("Synthetic")
    assert text["Software"] == "medvdm 0.1.0"
    assert text["Source"] == "medvdm: run first, seed 3, steps 250, guidance 0.5, weights ema"
    assert json.loads(text[PROVENANCE_CHUNK]) == PROVENANCE
    for label, words in (([], ""), (["Mass"], " label Mass,"), (["Mass", "a, b"], " label Mass and a, b,")):
        write_samples(path, **{**sample, "provenance": {**PROVENANCE, "label": label}})
        with Image.open(path) as picture:
            assert picture.text["Source"] == f"medvdm: run first, seed 3, steps 250,{words} guidance 0.5, weights ema"
    assert b"Synthetic image" in path.read_bytes()  # uncompressed: `strings` and `grep` find it


def test_png_has_the_iptc_term_for_generated_images(tmp_path, images) -> None:
    from xml.etree import ElementTree

    write_samples(tmp_path / "a.png", images=images, findings=None, class_names=(), provenance=PROVENANCE)
    with Image.open(tmp_path / "a.png") as picture:
        packet = ElementTree.fromstring(picture.info["XML:com.adobe.xmp"])
    (description,) = packet.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    kind = description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert kind == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert SYNTHETIC in "".join(packet.itertext())


def test_png_text_of_any_script_and_of_nothing(tmp_path, images) -> None:
    for provenance in ({"run": "Größe 胸部 \0 &<>", "version": None}, {}):
        write_samples(tmp_path / "a.png", images=images, findings=None, class_names=(), provenance=provenance)
        with Image.open(tmp_path / "a.png") as picture:
            picture.load()
            assert json.loads(picture.text[PROVENANCE_CHUNK]) == provenance
            assert picture.text["Source"] == ("medvdm: run Größe 胸部  &<>" if provenance else "medvdm")
            assert picture.text["Software"] == "medvdm"


# --- Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.dcm.gz", "a.1", "a.npz.bak"])
def test_other_suffixes_are_refused(tmp_path, sample, name) -> None:
    with pytest.raises(InputError, match=r"suffix .*\.npz, \.png, \.dcm"):
        write_samples(tmp_path / name, **sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"images": np.zeros((5, 8, 8), np.int32)}, InputTypeError, "images: dtype int32"),
        ({"images": np.full((5, 8, 8), 1.5)}, InputError, r"images: values.*expected \[0, 1\]"),
        ({"images": np.full((5, 8, 8), np.nan)}, InputError, r"images: values.*expected \[0, 1\]"),
        ({"images": np.zeros((0, 8, 8))}, InputError, "images: shape"),
        ({"images": np.zeros((8, 8))}, InputError, "images: shape"),
        ({"findings": np.zeros((4, 2), int)}, InputError, r"findings: shape \(4, 2\); expected \(5, 2\)"),
        ({"findings": np.zeros(5, int)}, InputError, r"findings: shape \(5,\)"),
        ({"findings": np.full((5, 2), 0.5)}, InputError, "findings: 0.5; expected 0 or 1"),
        ({"findings": np.array([[0, 1]] * 4 + [[2, -1]])}, InputError, "findings: 2; expected"),
        ({"findings": np.array([[0, 1]] * 4 + [[np.nan, 1]])}, InputError, "findings: nan; expected"),
        ({"provenance": {"seed": 1, "what": object()}}, InputError, "provenance"),
        ({"provenance": {"loss": float("nan")}}, InputError, "provenance"),
    ],
)
def test_bad_samples_are_refused_and_leave_nothing(tmp_path, sample, suffix, changes, error, match) -> None:
    with pytest.raises(error, match=match):
        write_samples(tmp_path / f"a{suffix}", **{**sample, **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"provenance": {"seed": "three"}}, InputError, "seed is 'three'"),
        ({"provenance": {"steps": 2.5}}, InputError, "steps is 2.5"),
        ({"provenance": {"seed": 2**70}}, InputError, "seed is"),
        ({"provenance": {"guidance": "much"}}, InputError, "guidance is 'much'"),
    ],
)
def test_npz_refuses(tmp_path, sample, changes, error, match) -> None:
    with pytest.raises(error, match=match):
        write_samples(tmp_path / "a.npz", **{**sample, **changes})
    assert not list(tmp_path.iterdir())


def test_png_refuses(tmp_path, sample) -> None:
    with pytest.raises(InputError, match="C = 1 or 3"):
        write_samples(tmp_path / "a.png", **{**sample, "images": np.repeat(sample["images"], 2, axis=-1)})
    with pytest.raises(InputError, match="columns: 0"):
        write_samples(tmp_path / "a.png", **sample, columns=0)
    assert not list(tmp_path.iterdir())


# --- All or nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_folder_is_named(tmp_path, sample, suffix) -> None:
    with pytest.raises(MissingFileError, match=re.escape(str(tmp_path / "no" / "such"))):
        write_samples(tmp_path / "no" / "such" / f"a{suffix}", **sample)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(tmp_path, sample) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write_samples(tmp_path / "a.png", **sample)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, sample, suffix) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / f"a{suffix}"
    write_samples(path, **sample)
    before = path.read_bytes()
    large = np.random.default_rng(0).uniform(size=(5, 400, 400, 1)).astype(np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # the kernel refuses to write past this
    try:
        with pytest.raises(OSError) as problem:
            write_samples(path, **{**sample, "images": large})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert problem.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.bin") as file:
        file.write(b"half")
        assert not (tmp_path / "a.bin").exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_failed_rename_leaves_nothing(tmp_path, sample, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_samples(tmp_path / "a.npz", **sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_others_may_read_the_file_as_any_other_file(tmp_path, sample) -> None:
    (tmp_path / "plain").touch()
    write_samples(tmp_path / "a.npz", **sample)
    assert stat.S_IMODE((tmp_path / "a.npz").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_the_one_label_of_an_image_is_its_only_finding() -> None:
    assert index_of_one(np.array([[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 0]])).tolist() == [-1, 2, -1, 0]
    assert index_of_one(np.zeros((2, 0))).tolist() == [-1, -1]


# --- Grids -------------------------------------------------------------------------------------------------------


def test_default_grids_are_compact() -> None:
    for n in range(1, 200):
        columns = default_columns(n)
        rows = -(-n // columns)
        assert rows <= columns <= 2 * rows + 1, n
        assert columns * rows - n < columns  # no empty row
    assert [default_columns(n) for n in (4, 6, 8, 10, 12, 16, 64, 100)] == [2, 3, 4, 5, 4, 4, 8, 10]


@pytest.mark.parametrize(
    ("bits", "top", "mode"), [(1, 255, "L"), (8, 255, "L"), (12, 65535, "I;16"), (16, 65535, "I;16")]
)
def test_a_processed_image_has_its_bits_and_says_what_was_done(bits, top, mode, tmp_path) -> None:
    gray = np.array([[0.0, 1.0, 0.5], [0.2499, -0.1, 1.1]], np.float32)
    write_processed(tmp_path / "a.png", gray, bits, title="A scan", description="Noise removed.", provenance=PROVENANCE)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode and image.text["Title"] == "A scan"
        np.testing.assert_array_equal(np.asarray(image), np.rint(np.clip(gray, 0, 1).astype(np.float64) * top))
        assert image.text["Disclaimer"] == image.text["Comment"] == PROCESSED and "invent" in PROCESSED
        assert image.text["Description"] == f"Noise removed. {PROCESSED}"
        assert json.loads(image.text[PROVENANCE_CHUNK]) == PROVENANCE
        xmp = image.text["XML:com.adobe.xmp"]
    assert "compositeWithTrainedAlgorithmicMedia" in xmp and PROCESSED in xmp
