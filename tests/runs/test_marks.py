"""Samples as DICOM, and the marks that files bear: of every kind that the library writes, of others, and of none."""

from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydicom
import pytest
from helpers import Trained, refused, said
from PIL import Image, PngImagePlugin

import medvdm
from medvdm.cli.main import main
from medvdm.data import convert
from medvdm.errors import DataError, DivergedError, InputError, MissingFileError, MissingPackageError
from medvdm.runs import dicom_samples
from medvdm.runs.config import ScoreConfig
from medvdm.runs.denoise import denoise_files
from medvdm.runs.inpaint import inpaint_file
from medvdm.runs.marks import CAUTION, Marks, marks
from medvdm.runs.provenance import PROCESSED, SYNTHETIC, write_samples
from medvdm.runs.run import Run
from medvdm.runs.sample import sample_to
from medvdm.runs.score import score_files

PROVENANCE = {"run": "first", "version": "0.3.0", "seed": 3, "label": ["Größe 胸部"], "guidance": 0.5}


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Run:
    return medvdm.load(trained.path)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydicom raises at any value that its VR does not allow, where it would warn."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.RAISE)


def images(n: int = 3, channels: int = 1) -> np.ndarray:
    """Of sides that tell rows from columns, with an odd number of pixels."""
    return np.random.default_rng(0).uniform(size=(n, 7, 5, channels)).astype(np.float32)


def write(path: str | Path, x: np.ndarray, provenance: dict[str, Any] = PROVENANCE) -> None:
    write_samples(path, images=x, findings=None, class_names=(), provenance=provenance)


# --- Samples as DICOM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_a_secondary_capture_that_says_what_it_is(strict: None, channels: int, tmp_path: Path) -> None:
    x = images(1, channels)
    write_samples(
        tmp_path / "a.dcm", images=x, findings=np.array([[0, 1]]), class_names=("A", "B"), provenance=PROVENANCE
    )
    with (tmp_path / "a.dcm").open("rb") as file:
        data = pydicom.dcmread(file)  # no `force`: preamble and file meta are whole
        for element in data.iterall():
            assert element.value is not NotImplemented  # each one is decoded, and so validated
    assert data.SOPClassUID.name == "Secondary Capture Image Storage"
    assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
    assert (data.SyntheticData, data.ConversionType, data.Modality, data.BurnedInAnnotation) == (
        "YES",
        "SYN",
        "OT",
        "NO",
    )
    assert list(data.ImageType) == ["DERIVED", "SECONDARY"]
    assert data.ImageComments == data.DerivationDescription == SYNTHETIC
    assert data.SoftwareVersions == data.ContributingEquipmentSequence[0].SoftwareVersions == "0.3.0"
    assert data.ContributingEquipmentSequence[0].Manufacturer == "medvdm"
    # What PS3.3 has as type 2 in the modules of a Secondary Capture: there, and empty.
    for name in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
        *("AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "PatientOrientation", "Laterality"),
    ):
        assert name in data and not data[name].value, name
    block = data.private_block(dicom_samples.GROUP, dicom_samples.CREATOR)
    assert json.loads(block[dicom_samples.PROVENANCE].value) == PROVENANCE | {"sample": 1, "classes": ["B"]}
    pixels = np.rint(x[0] * 255)
    assert (data.Rows, data.Columns, data.BitsStored) == (7, 5, 8)
    np.testing.assert_array_equal(data.pixel_array, pixels if channels == 3 else pixels[..., 0])
    if channels == 1:  # as training reads it
        assert data.PhotometricInterpretation == "MONOCHROME2"
        np.testing.assert_array_equal(np.rint(convert.read_image(tmp_path / "a.dcm") * 255), pixels)
        remarks = convert.header(tmp_path / "a.dcm").remarks
        assert [any(words in remark for remark in remarks) for words in ("SyntheticData", "secondary capt")] == [
            True
        ] * 2


def test_several_files_of_one_series_and_a_folder(tmp_path: Path) -> None:
    x = images(3)
    write(tmp_path / "a.DCM", x)
    write(tmp_path / "new", x)
    write(f"{tmp_path / 'v0.2'}/", x)
    (tmp_path / "old.d").mkdir()
    write(tmp_path / "old.d", x)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.[dD][cC][mM]")} == {
        *(f"a-{i}.DCM" for i in (1, 2, 3)),
        *(f"{folder}/sample-000{i}.dcm" for folder in ("new", "v0.2", "old.d") for i in (1, 2, 3)),
    }
    found = [pydicom.dcmread(path) for path in sorted((tmp_path / "new").iterdir())]
    assert [one.InstanceNumber for one in found] == [1, 2, 3]
    assert len({one.SOPInstanceUID for one in found}) == 3
    assert len({one.SeriesInstanceUID for one in found}) == len({one.StudyInstanceUID for one in found}) == 1
    for i in (1, 2, 3):  # the same samples are the same bytes, wherever they lie
        assert (tmp_path / f"a-{i}.DCM").read_bytes() == (tmp_path / f"new/sample-000{i}.dcm").read_bytes()


def test_no_two_different_samples_share_a_uid(tmp_path: Path) -> None:
    """Other pixels (another run of the same name), another seed, and another number; and all are of the root 2.25."""
    x = images(1)
    pixels = np.rint(x[0] * 255).astype(np.uint8)
    uids = set()
    other = pixels.copy()
    other[0, 0] ^= 1
    for kind in ("instance", "series", "study"):
        for text in ('{"seed": 1}', '{"seed": 2}'):
            for image in (pixels, other, pixels.reshape(5, 7, 1)):
                uids.add(dicom_samples.uid(kind, text, image))
                assert dicom_samples.uid(kind, text, image.copy()) in uids
    assert len(uids) == 18
    assert all(pydicom.uid.UID(uid).is_valid and uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)
    write(tmp_path / "a.dcm", np.concatenate([x, x]))
    assert len({pydicom.dcmread(tmp_path / f"a-{i}.dcm").SOPInstanceUID for i in (1, 2)}) == 2


def test_a_run_draws_into_dicom_files_what_it_draws_into_an_archive(loaded: Run, tmp_path: Path) -> None:
    settings = {"steps": 3, "seed": 7, "label": "Pneumonia", "batch_size": 2}
    sample_to(tmp_path / "out", loaded, 3, **settings)
    sample_to(tmp_path / "a.npz", loaded, 3, **settings)
    expected = np.rint(np.load(tmp_path / "a.npz")["images"][..., 0] * 255)
    for i, image in enumerate(expected, 1):
        np.testing.assert_array_equal(pydicom.dcmread(tmp_path / f"out/sample-{i:04d}.dcm").pixel_array, image)
    found = marks(tmp_path / "out/sample-0003.dcm")
    assert found.provenance == json.loads(str(np.load(tmp_path / "a.npz")["provenance"])) | {
        "sample": 3,
        "classes": ["Pneumonia"],
    }


def test_failures_leave_whole_files_or_nothing(loaded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(loaded, params=jax.tree.map(lambda p: p * np.nan, loaded.params))
    for place in ("out", "a.dcm"):
        with pytest.raises(DivergedError):
            sample_to(tmp_path / place, broken, 2, steps=2)
    with pytest.raises(InputError, match="C = 1 or 3"):
        write(tmp_path / "out", images(2, 2))
    wide = dataclasses.replace(loaded.config.model, image_shape=(16, 16, 2))
    with pytest.raises(InputError, match="2 channels"):
        two = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=wide))
        sample_to(tmp_path / "out", two, 2, steps=2)
    assert os.listdir(tmp_path) == []

    def parts(n: int) -> dict[str, Any]:
        findings = np.zeros((n, 0), np.uint8)
        return {"images": iter([images(2)]), "findings": findings, "class_names": (), "provenance": PROVENANCE}

    for n, words in ((3, "2 in all parts; expected 3"), (1, "more than 1")):
        with pytest.raises(InputError, match=words):
            write_samples(tmp_path / f"part{n}", **parts(n))
        assert len(os.listdir(tmp_path / f"part{n}")) == min(n, 2)  # what was finished stays, and is whole
        assert all(pydicom.dcmread(path).pixel_array.shape == (7, 5) for path in (tmp_path / f"part{n}").iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "full", images())
    assert not (tmp_path / "full").exists()


def test_the_memory_of_dicom_files_is_that_of_a_part(tmp_path: Path) -> None:
    """12 parts of 1 MiB."""
    one = np.full((4, 256, 256, 1), 0.25, np.float32)
    findings = np.zeros((48, 0), np.uint8)
    write(tmp_path / "first.dcm", one[:1])  # imports
    tracemalloc.start()
    write_samples(
        tmp_path / "out", images=(one for _ in range(12)), findings=findings, class_names=(), provenance=PROVENANCE
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * one.nbytes and len(os.listdir(tmp_path / "out")) == 48


def test_without_pydicom_the_remedy_is_named_before_anything_is_drawn(
    loaded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.dcm", images(1))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    for act in (lambda: sample_to(tmp_path / "b.dcm", loaded, 2), lambda: marks(tmp_path / "a.dcm")):
        with pytest.raises(MissingPackageError, match=r"\.dcm: .*pip install 'medvdm\[dicom\]'"):
            act()


# --- What verify says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a.dcm"])
def test_samples_are_synthetic_by_each_of_their_marks(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, images(1))
    found = marks(tmp_path / name)
    assert (found.synthetic, found.statement) == ("yes", SYNTHETIC)
    assert {k: found.provenance[k] for k in PROVENANCE} == PROVENANCE
    expected = {
        "a.npz": ("key synthetic", "key statement", "key provenance"),
        "a.png": (
            *("text Disclaimer", "text Comment", "text medvdm:provenance"),
            "XMP digital source type trainedAlgorithmicMedia",
        ),
        "a.dcm": (
            *("SyntheticData YES", "ConversionType SYN", "ImageComments", "DerivationDescription"),
            *("ContributingEquipmentSequence", "private block medvdm"),
        ),
    }
    assert found.marks == expected[name]
    assert found == medvdm.marks(str(tmp_path / name))
    assert json.loads(json.dumps(found.to_json()))["synthetic"] == "yes"


def test_what_a_model_has_changed_is_partly_synthetic_and_a_map_is_neither(
    trained_pixels: Path, tmp_path: Path
) -> None:
    run = medvdm.load(trained_pixels)
    gray = np.random.default_rng(0).integers(60, 200, (16, 16), dtype=np.uint8)
    mask = np.zeros_like(gray)
    mask[4:8, 4:8] = 255
    Image.fromarray(gray).save(tmp_path / "film.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    dicom_file(tmp_path / "scan.dcm", gray)
    inpaint_file(run, tmp_path / "film.png", tmp_path / "mask.png", tmp_path / "filled.png", steps=2)
    clear = denoise_files(run, [tmp_path / "scan.dcm"], tmp_path / "clear", noise=0.1, samples=2, steps=2)
    written = [tmp_path / "filled.png", *clear[0].written]
    names = "filled.png scan-sample-1.png scan-sample-2.png scan-std.png scan.dcm scan.png"
    assert sorted(path.name for path in written) == names.split()
    for path in written:
        found = marks(path)
        assert found.synthetic == "partly", path
        if path.suffix == ".png":
            assert found.statement == PROCESSED and found.provenance["run"] == "run"
        else:
            assert found.statement.startswith("Denoised by medvdm")
    for path in (tmp_path / "film.png", tmp_path / "scan.dcm"):
        assert marks(path) == Marks(file=path, kind=marks(path).kind)
    few = ScoreConfig(draws=2, held_out=4, share=0.3)
    score_files(run, [tmp_path / "film.png"], few, maps=tmp_path / "maps", save=False)
    found = marks(tmp_path / "maps/film-bits.png")
    assert found.synthetic == "not said" and found.provenance["run"] == "run"
    assert "Not an image of a person: a map" in found.statement


def dicom_file(path: Path, gray: np.ndarray, **tags: Any) -> None:
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", pydicom.uid.generate_uid()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.set_pixel_data(gray, "MONOCHROME2", 8)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


def test_marks_of_other_programs_and_single_ones(tmp_path: Path) -> None:
    """Each mark by itself is enough, also where the others have been taken off."""
    gray = np.zeros((4, 4), np.uint8)
    address = "http://cv.iptc.org/newscodes/digitalsourcetype/"
    for kind, answer in (
        ("trainedAlgorithmicMedia", "yes"),
        ("compositeWithTrainedAlgorithmicMedia", "partly"),
        ("digitalCapture", "not said"),
    ):
        for form in (f'Iptc4xmpExt:DigitalSourceType="{address}{kind}"', f"<x:DigitalSourceType>{address}{kind}</x>"):
            info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", form)
            Image.fromarray(gray).save(tmp_path / "a.png", pnginfo=info)
            Image.fromarray(gray).save(tmp_path / "a.jpg", xmp=form.encode())
            assert [marks(tmp_path / name).synthetic for name in ("a.png", "a.jpg")] == [answer] * 2
    for tags, answer in (
        ({"SyntheticData": "YES"}, "yes"),
        ({"SyntheticData": "NO", "ConversionType": "DI"}, "not said"),
        ({"ConversionType": "SYN"}, "yes"),
        ({"ImageComments": SYNTHETIC}, "yes"),
        ({"ImageComments": "a synthetic hip joint"}, "not said"),  # no mark: a person may have one
    ):
        dicom_file(tmp_path / "a.dcm", gray, **tags)
        assert marks(tmp_path / "a.dcm").synthetic == answer, tags
    for arrays, answer in (
        ({"synthetic": np.array(True)}, "yes"),
        ({"synthetic": np.array(False)}, "not said"),
        ({"synthetic": np.ones(3)}, "not said"),
        ({"statement": np.array(SYNTHETIC)}, "yes"),
        ({"provenance": np.array("no JSON")}, "not said"),
        ({"images": gray}, "not said"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        assert marks(tmp_path / "a.npz").synthetic == answer, arrays
    Image.fromarray(gray).save(tmp_path / "a.tif")
    assert marks(tmp_path / "a.tif") == Marks(file=tmp_path / "a.tif", kind="TIFF")


def damaged(folder: Path) -> dict[str, Path]:
    """Files that cannot be read."""
    for name in ("whole.png", "whole.npz", "whole.dcm"):
        write(folder / name, images(1))
    content = {name: (folder / f"whole.{name}").read_bytes() for name in ("png", "npz", "dcm")}
    broken = {
        "half.png": content["png"][: len(content["png"]) // 4],
        "half.npz": content["npz"][: len(content["npz"]) // 2],
        "text.npz": b"not an archive",
        "text.dcm": b"not a DICOM file" * 20,
        "text.txt": b"a text",
        "empty.png": b"",
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    with zipfile.ZipFile(folder / "crc.npz", "w") as archive:
        archive.writestr("synthetic.npy", b"\x93NUMPY cut short")
    np.savez(folder / "pickle.npz", statement=np.array([{}], dtype=object))
    (folder / "folder").mkdir()
    return {name: folder / name for name in (*broken, "crc.npz", "pickle.npz", "folder", "missing.png")}


def test_what_cannot_be_read_is_told_in_a_line_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = damaged(tmp_path)
    for name, path in files.items():
        with pytest.raises(MissingFileError if name == "missing.png" else DataError) as problem:
            marks(path)
        assert str(path) in str(problem.value) and "\n" not in str(problem.value)
    assert main(["verify", str(tmp_path / "whole.png"), *map(str, files.values())]) == 1
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == len(files) and all(line.startswith("medvdm: ") for line in err.splitlines())
    assert out.startswith(f"{tmp_path / 'whole.png'}: synthetic\n")


def test_the_command_says_it_in_plain_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.npz", images(1))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "film.png")
    out, err = said(capfd, "verify", tmp_path / "a.npz", tmp_path / "film.png")
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'a.npz'}: synthetic"
    assert "run first, version 0.3.0, seed 3" in out and SYNTHETIC.split(";")[0] in out
    assert f"{tmp_path / 'film.png'}: no mark found, which proves nothing" in lines
    assert " ".join(out.split()).endswith(CAUTION) and "signed" in CAUTION
    out, _ = said(capfd, "verify", tmp_path / "a.npz", tmp_path / "film.png", "--json")
    found = json.loads(out)
    assert [one["synthetic"] for one in found["files"]] == ["yes", "not said"] and found["failed"] == []
    assert found["files"][0]["provenance"] == PROVENANCE
    refused(capfd, "verify", names=["FILE"])


def test_what_a_file_says_cannot_write_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.npz", images(1), {"run": "x\x1b[31m\nfilm.png: no mark", "version": "0"})
    out, _ = said(capfd, "verify", tmp_path / "a.npz")
    assert "\x1b" not in out and not any(line.startswith("film.png") for line in out.splitlines())
