"""Noise removed from arrays and files: sizes, bits, orientation, DICOM, low dose, names, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pydicom
import pytest
import tiny
from helpers import refused, said, tree
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import medvdm
from medvdm.cli.main import main
from medvdm.data import convert
from medvdm.errors import InputError, RunError
from medvdm.models import denoise as models_denoise
from medvdm.models import vdm
from medvdm.runs import config as config_
from medvdm.runs import denoise as denoise_
from medvdm.runs.denoise import denoise, denoise_files
from medvdm.runs.provenance import PROCESSED, PROVENANCE_CHUNK
from medvdm.runs.run import Run
from medvdm.theory.clipping import unclipped

NOISE = 0.05
SIDES = (22, 18)


def made(config, path="runs/made") -> Run:
    """A run with random weights, which nothing was trained for."""
    config = config_.change(config, image_shape=(16, 16, 1))
    params = tiny.weights(config.model, 0.1)
    record = {"version": "0.3.0", "data": {"name": "phantom", "fingerprint": "0", "class_names": []}}
    graph = vdm.graph_of(config.model)
    return Run(path=Path(path), config=config, record=record, step=12, weights="raw", graph=graph, params=params)


@pytest.fixture(scope="session")
def pixels() -> Run:
    return made(tiny.pixels(width=4, embedding_dim=4))


@pytest.fixture
def loaded(pixels, monkeypatch) -> None:
    """The command line loads this run, whatever is named."""
    monkeypatch.setattr("medvdm.runs.run.load", lambda *_, **__: pixels)


def gray(seed=0, sides=SIDES, noise=NOISE):
    """A noisy image on [0, 1], well inside the gray scale, with no symmetry."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: sides[0], : sides[1]]
    clear = 0.3 + 0.4 * rows / sides[0] + 0.1 * np.sin(columns / 4) * (rows > 5)
    return np.clip(clear + noise * rng.standard_normal(sides), 0, 1)


def bits8(seed=0):
    return np.rint(255 * gray(seed)).astype(np.uint8)


def bits16(seed=0):
    return np.rint(65535 * gray(seed)).astype(np.uint16)


def read(path):
    """A PNG's own numbers, its bits and its texts."""
    with Image.open(path) as image:
        return np.asarray(image), {"L": 8, "I;16": 16}[image.mode], dict(image.text)


def of(run, image, **settings):
    """The mean of one image (h, w) of any type."""
    return denoise(run, image[None, ..., None], **{"noise": NOISE, **settings}).mean[0, ..., 0]


# Arrays


def test_arrays_come_back_with_their_mean_draws_and_spread(pixels):
    images = np.stack([bits8(0), bits8(1)])[..., None]
    found = denoise(pixels, images, noise=NOISE, samples=3, steps=3, seed=5)
    assert found.mean.shape == (2, *SIDES, 1) and found.mean.dtype == np.float32
    assert found.draws.shape == (2, 3, *SIDES, 1) and found.noise.tolist() == [NOISE, NOISE]
    expected = models_denoise.mean(
        pixels.params, jnp.asarray(images[1:] / np.float32(255)), jnp.full((1,), NOISE), graph=pixels.graph
    )
    np.testing.assert_allclose(found.mean[1], expected[0], atol=1e-5)
    np.testing.assert_allclose(found.spread, np.std(found.draws, axis=1, ddof=1), atol=1e-6)
    assert found.spread.max() > 1e-3
    assert {"processing": "denoise", "seed": 5, "samples": 3, "noise": NOISE}.items() <= found.provenance.items()
    assert medvdm.denoise is denoise


def test_draws_in_batches_are_the_same(pixels, monkeypatch):
    settings = {"noise": NOISE, "samples": 3, "steps": 2}
    once = denoise(pixels, bits8()[None], **settings).draws
    monkeypatch.setattr(models_denoise, "WHOLE", 2 * SIDES[0] * SIDES[1])
    np.testing.assert_allclose(denoise(pixels, bits8()[None], **settings).draws, once, atol=1.01 / 255)


def test_noise_of_floats_may_lead_out_of_the_gray_scale_but_not_far(pixels):
    y = gray()
    y[0, 0], y[1, 1] = -3 * NOISE, 1 + 3 * NOISE
    assert np.isfinite(of(pixels, y)).all()
    for wrong in (255 * y, np.where(y > 0.6, np.nan, y), y - 1):
        with pytest.raises(InputError, match="^images: values from .*; expected 0 to 1 and what noise of 0.05 adds"):
            of(pixels, wrong)


def test_noise_that_was_cut_off_at_black_is_made_good(pixels):
    """By the inverse of its mean, where the image reaches an end of the scale and nowhere exceeds it."""

    def network(y):
        y = jnp.asarray(y, jnp.float32)[None, ..., None]
        found = models_denoise.mean(pixels.params, y, jnp.full((1,), NOISE), graph=pixels.graph, rounding=False)
        return np.asarray(found)[0, ..., 0]

    free = gray() - 0.3
    assert free.min() < 0
    np.testing.assert_allclose(of(pixels, free), network(free), atol=1e-5)
    cut = np.clip(free, 0, 1)
    np.testing.assert_allclose(of(pixels, cut), unclipped(network(cut), NOISE), atol=1e-5)
    assert np.abs(of(pixels, cut) - network(cut)).max() > NOISE / 10


def test_noise_is_estimated_in_each_image(pixels):
    y = np.stack([gray(sides=(64, 64), noise=noise) for noise in (0.03, 0.1)])
    found = denoise(pixels, y[..., None]).noise
    np.testing.assert_allclose(found, [0.03, 0.1], rtol=0.2)


def test_an_image_in_which_no_noise_is_found_comes_back_as_it_is(pixels):
    y = np.full((1, 20, 20, 1), 77, np.uint8)
    found = denoise(pixels, y, samples=2)
    assert found.noise.tolist() == [0]
    np.testing.assert_array_equal(np.rint(255 * found.mean), y)
    assert not found.spread.any()


def test_low_dose_is_denoised_where_its_noise_is_the_same_everywhere(pixels):
    """Against the formulas of the transform and its inverse, written out; the network is told the noise there, 1."""
    gain, electronic = 0.01, 0.02
    y = gray()
    root = lambda y: 2 / gain * np.sqrt(gain * y + 0.375 * gain**2 + electronic**2)  # noqa: E731
    low, high = root(0.0), root(1.0)
    u = jnp.asarray((root(y) - low) / (high - low), jnp.float32)[None, ..., None]
    d = models_denoise.mean(
        pixels.params, u, jnp.full((1,), 1 / (high - low), jnp.float32), graph=pixels.graph, rounding=False
    )
    d = low + (high - low) * np.asarray(d, np.float64)[0, ..., 0]
    r = math.sqrt(1.5)
    x = gain * (d**2 / 4 + r / 4 / d - 11 / 8 / d**2 + 5 * r / 8 / d**3 - 1 / 8 - (electronic / gain) ** 2)
    found = of(pixels, y, gain=gain, noise=electronic)
    np.testing.assert_allclose(found, np.clip(x, 0, 1), atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"noise": 7.0}, r"noise: 7; expected a deviation from 0.00075 to 6.1 in gray values on \[0, 1\]"),
        ({"noise": 0.0}, "noise: 0; expected a deviation from 0.00075"),
        ({"noise": math.nan}, "noise: nan; expected a deviation from"),
        ({"noise": "some"}, "noise: 'some'; expected a number, or 'auto'"),
        ({"gain": 0.01}, "noise: 'auto' with gain 0.01; expected the deviation of the electronic noise"),
        ({"gain": -1.0, "noise": 0.1}, "gain: -1.0; expected gray values per photon"),
        ({"gain": 1e-8, "noise": 0.0}, "gain: 1e-08 with noise 0 is noise of 5e-05 on the stabilised gray scale"),
        ({"gain": 0.01, "noise": -0.1}, "noise: -0.1; expected 0 or more"),
        ({"samples": -1}, "samples: -1; expected 0 to"),
        ({"steps": 0}, "steps: 0; expected 1 to"),
        ({"seed": -1}, "seed: -1; expected 0 to"),
        ({"sample": 2}, "setting: 'sample' is unknown; did you mean 'samples'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, says, pixels):
    with pytest.raises(InputError, match=f"^{says}") as no:
        denoise(pixels, bits8()[None], **settings)
    assert "\n" not in str(no.value)


def test_runs_that_are_no_denoisers_are_refused(pixels):
    with pytest.raises(RunError, match="^runs/latent: a diffusion in latent space .*; expected one on pixels"):
        denoise(made(tiny.config(conditional=False), "runs/latent"), bits8()[None])
    conditional = dataclasses.replace(
        pixels,
        config=config_.change(pixels.config, classes=2, label_dropout=0.0),
    )
    with pytest.raises(RunError, match="its null .* was not trained"):
        denoise(conditional, bits8()[None])
    windowed = dataclasses.replace(pixels, config=config_.change(pixels.config, window="-1000,400"))
    with pytest.raises(RunError, match="trained on images under the window '-1000,400'"):
        denoise_files(windowed, ["a.png"], "out")


def test_arrays_that_do_not_fit_are_refused(pixels):
    with pytest.raises(InputError, match="expected 1 channels"):
        denoise(pixels, np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match=r"One image\? images\[None\]"):
        denoise(pixels, bits8())
    one = denoise(pixels, bits8()[None], noise=NOISE, samples=1, steps=2)
    with pytest.raises(InputError, match="^samples: 1; expected at least 2"):
        _ = one.spread


# Files


def test_a_file_gets_its_mean_draws_and_map_of_doubt(pixels, tmp_path):
    Image.fromarray(bits8()).save(tmp_path / "a.b.png")
    [result] = denoise_files(pixels, [tmp_path / "a.b.png"], tmp_path / "out", noise=NOISE, samples=2, steps=3, seed=4)
    names = ["a.b-sample-1.png", "a.b-sample-2.png", "a.b-std.png", "a.b.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert [p.name for p in result.written] == names and result.error is None and result.noise == NOISE
    expected = denoise(pixels, bits8()[None], noise=NOISE, samples=2, steps=3, seed=4)
    whole = {name: read(tmp_path / "out" / name) for name in names}
    assert all(bits == 8 for _, bits, _ in whole.values())
    np.testing.assert_array_equal(whole["a.b.png"][0], np.rint(255 * expected.mean[0, ..., 0]))
    for i in (1, 2):
        np.testing.assert_array_equal(whole[f"a.b-sample-{i}.png"][0], np.rint(255 * expected.draws[0, i - 1, ..., 0]))
    std, _, texts = whole["a.b-std.png"]
    record = json.loads(texts[PROVENANCE_CHUNK])
    np.testing.assert_allclose(std / 255 * record["white"], expected.spread[0, ..., 0], atol=record["white"] / 500)
    assert std.max() == 255 and f"white is {record['white']:.6g} on the gray scale" in texts["Description"]
    for name, (_, _, texts) in whole.items():
        assert texts["Disclaimer"] == PROCESSED, name
        record = json.loads(texts[PROVENANCE_CHUNK])
        assert record["source"] == "a.b.png" and record["removed_noise"] == NOISE and record["run"] == "made"
    assert {json.loads(texts[PROVENANCE_CHUNK])["what"] for _, _, texts in whole.values()} == {
        *("posterior mean", "posterior draw", "posterior standard deviation")
    }


def _white_is_zero(path):
    import tifffile

    tifffile.imwrite(path, 65535 - bits16(), photometric="miniswhite")


def _turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(np.rot90(bits8())).save(path, exif=exif)


FILES = {
    "8 bits": ("a.png", lambda p: Image.fromarray(bits8()).save(p), bits8() / 255, 8),
    "16 bits": ("a.png", lambda p: Image.fromarray(bits16()).save(p), bits16() / 65535, 16),
    "TIFF": ("a.tif", lambda p: Image.fromarray(bits16()).save(p), bits16() / 65535, 16),
    "float TIFF": ("a.tif", lambda p: Image.fromarray(gray().astype(np.float32)).save(p), gray(), 16),
    "white is zero": ("a.tif", _white_is_zero, bits16() / 65535, 16),
    "turned": ("a.png", _turned, bits8() / 255, 8),
    "colour": ("a.png", lambda p: Image.fromarray(np.dstack([bits8()] * 3)).save(p), bits8() / 255, 8),
}


@pytest.mark.parametrize("kind", FILES)
def test_size_bits_and_orientation_are_kept(kind, pixels, tmp_path):
    name, write, upright, bits = FILES[kind]
    write(tmp_path / name)
    np.testing.assert_allclose(convert.read_image(tmp_path / name)[..., 0], upright, atol=1e-6)
    [result] = denoise_files(pixels, [tmp_path / name], tmp_path / "out", noise=NOISE)
    assert result.error is None
    found, found_bits, _ = read(tmp_path / "out" / "a.png")
    y = np.rint(255 * upright).astype(np.uint8) if bits == 8 else upright
    assert found_bits == bits and found.shape == SIDES
    np.testing.assert_allclose(found / (2**bits - 1), of(pixels, y), atol=1.1 / (2**bits - 1))


def test_sixteen_bits_are_not_rounded_to_eight(pixels, tmp_path):
    """With little noise, where an image of 8 bits is rounded to its levels."""
    Image.fromarray(bits16()).save(tmp_path / "a.png")
    denoise_files(pixels, [tmp_path / "a.png"], tmp_path / "out", noise=0.002)
    found = read(tmp_path / "out" / "a.png")[0].astype(float)
    assert np.abs(found / 257 - np.rint(found / 257)).mean() > 0.15
    np.testing.assert_allclose(found, bits16(), atol=0.02 * 65535)


def test_what_is_below_the_noise_of_the_model_is_left_as_it_was(pixels, tmp_path):
    flat = np.full((20, 20), 12345, np.uint16)
    Image.fromarray(flat).save(tmp_path / "a.png")
    [result] = denoise_files(pixels, [tmp_path / "a.png"], tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.png")[0], flat)
    assert any("left as it was" in note for note in result.notes)
    assert "left as it was" in read(tmp_path / "out" / "a.png")[2][PROVENANCE_CHUNK]


# DICOM


def write_dicom(path, words, *, kind="MONOCHROME2", bits=12, signed=0, **tags):
    """A DX image of a patient, with a window."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    settings = {
        **{"SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID},
        **{"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "SeriesNumber": 2, "Modality": "DX"},
        **{"PatientID": "p1", "PatientName": "A^B", "ImageType": ["ORIGINAL", "PRIMARY", "LEFT"]},
        **{"Rows": words.shape[0], "Columns": words.shape[1], "SamplesPerPixel": 1, "BitsStored": bits},
        **{"BitsAllocated": 8 * words.dtype.itemsize, "HighBit": bits - 1, "PixelRepresentation": signed},
        **{"PhotometricInterpretation": kind, "WindowCenter": "2000", "WindowWidth": "1500"},
        **{"SmallestImagePixelValue": int(words.min()), "SeriesDescription": "chest", **tags},
    }
    for name, value in settings.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.PixelData = words.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def twelve():
    return np.rint(4095 * gray()).astype(np.uint16)


DICOMS = {
    "unsigned": {},
    "dark is large": {"kind": "MONOCHROME1"},
    "rescaled": {"RescaleSlope": "2", "RescaleIntercept": "-1024"},
    "negative slope": {"RescaleSlope": "-1", "RescaleIntercept": "4095"},
    "both": {"kind": "MONOCHROME1", "RescaleSlope": "-0.5", "RescaleIntercept": "10"},
    "signed": {"signed": 1},
}


@pytest.mark.parametrize("kind", DICOMS)
def test_a_dicom_file_becomes_a_derived_one_of_the_same_kind(kind, pixels, tmp_path):
    words = twelve()
    if kind == "signed":
        words = (words.astype(np.int32) - 2048).astype(np.int16)
    path = write_dicom(tmp_path / "a.dcm", words, **DICOMS[kind])
    [result] = denoise_files(pixels, [path], tmp_path / "out", noise=NOISE)
    assert result.error is None and [p.name for p in result.written] == ["a.dcm", "a.png"]
    before, after = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "out" / "a.dcm")
    kept = (
        *("PatientID", "PatientName", "StudyInstanceUID", "Modality", "Rows", "Columns", "BitsAllocated", "BitsStored"),
        *("HighBit", "PixelRepresentation", "PhotometricInterpretation", "WindowCenter", "WindowWidth", "SOPClassUID"),
        *("RescaleSlope", "RescaleIntercept", "SamplesPerPixel"),
    )
    assert [after.get(name) for name in kept] == [before.get(name) for name in kept]
    # As the library reads it, it is the mean, in the file's own steps of gray.
    y = convert.read_image(path)[..., 0]
    expected = of(pixels, y)
    np.testing.assert_allclose(convert.read_image(tmp_path / "out" / "a.dcm")[..., 0], expected, atol=0.6 / 4095)
    found, bits, _ = read(tmp_path / "out" / "a.png")
    assert bits == 16
    np.testing.assert_allclose(found / 65535, expected, atol=1.1 / 65535)
    # As pydicom reads it, it is near the source, with less noise.
    assert after.pixel_array.dtype == before.pixel_array.dtype
    assert np.abs(after.pixel_array.astype(float) - before.pixel_array).mean() < 4095 * 2 * NOISE


def test_a_derived_file_says_what_it_is(pixels, tmp_path):
    path = write_dicom(tmp_path / "a.dcm", twelve())
    other = write_dicom(tmp_path / "b.dcm", twelve())
    denoise_files(pixels, [path, other], tmp_path / "out", noise=NOISE)
    before, after = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "out" / "a.dcm")
    assert list(after.ImageType) == ["DERIVED", "SECONDARY", "LEFT"]
    assert after.SOPInstanceUID not in (before.SOPInstanceUID, "") and after.SeriesInstanceUID != "1.2.3.4"
    assert after.SOPInstanceUID == after.file_meta.MediaStorageSOPInstanceUID and after.SOPInstanceUID.is_valid
    beside = pydicom.dcmread(tmp_path / "out" / "b.dcm")
    assert beside.SeriesInstanceUID == after.SeriesInstanceUID and beside.SOPInstanceUID != after.SOPInstanceUID
    [source] = after.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == before.SOPInstanceUID
    assert source.ReferencedSOPClassUID == before.SOPClassUID
    assert after.DerivationDescription.startswith("Denoised by medvdm") and "clinical" in after.DerivationDescription
    assert after.DerivationCodeSequence[0].CodeValue == "113087"
    assert after.ContributingEquipmentSequence[-1].Manufacturer == "medvdm"
    assert "SmallestImagePixelValue" not in after and after.SeriesDescription == "chest denoised"
    assert "LossyImageCompression" not in after
    assert (
        "secondary captures or derived copies, not as the detector gave them"
        in convert.header(tmp_path / "out" / "a.dcm").remarks
    )


def test_a_source_that_was_compressed_with_loss_stays_so(pixels, tmp_path):
    path = write_dicom(tmp_path / "a.dcm", twelve(), LossyImageCompression="01", LossyImageCompressionRatio="9")
    denoise_files(pixels, [path], tmp_path / "out", noise=NOISE)
    after = pydicom.dcmread(tmp_path / "out" / "a.dcm")
    assert (after.LossyImageCompression, after.LossyImageCompressionRatio) == ("01", 9)


def test_padded_pixels_stay_and_embedded_overlays_go(pixels, tmp_path):
    words = twelve()
    words[:3] = 0
    path = write_dicom(tmp_path / "a.dcm", words, PixelPaddingValue=0)
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x60000102, "US", 15)
    dataset.save_as(path)
    denoise_files(pixels, [path], tmp_path / "out", noise=NOISE)
    after = pydicom.dcmread(tmp_path / "out" / "a.dcm")
    assert not after.pixel_array[:3].any() and after.pixel_array[3:].all()
    assert (0x6000, 0x0102) not in after


@pytest.mark.parametrize(
    ("tags", "says"),
    [({"SOPInstanceUID": None}, "has no SOPInstanceUID"), ({"SharedFunctionalGroupsSequence": []}, "enhanced one")],
)
def test_where_no_derived_file_can_be_made_a_note_says_why(tags, says, pixels, tmp_path):
    path = write_dicom(tmp_path / "a.dcm", twelve(), **tags)
    [result] = denoise_files(pixels, [path], tmp_path / "out", noise=NOISE)
    assert [p.name for p in result.written] == ["a.png"]
    assert any(note.startswith("no DICOM file is written: ") and says in note for note in result.notes)


# Many files, and the command line


def test_one_bad_file_among_many_is_named_and_the_others_are_done(loaded, tmp_path, capfd):
    Image.fromarray(bits8(0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    Image.fromarray(bits8(1)).save(tmp_path / "c.png")
    files = [str(tmp_path / name) for name in ("a.png", "b.png", "gone.png", "c.png")]
    assert main(["denoise", "r", *files, "--noise", "0.05", "--out", str(tmp_path / "out")]) == 1
    out, err = capfd.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    bad = [line for line in err.splitlines() if line.startswith("medvdm: ")]
    assert len(bad) == 2 and "b.png: found a damaged image" in bad[0] and "gone.png: no such file" in bad[1]
    assert len(out.splitlines()) == 2 and f"{files[0]}: {tmp_path / 'out' / 'a.png'}" in out


def test_the_command_line_gives_what_python_gives(loaded, pixels, tmp_path, capfd):
    Image.fromarray(bits8()).save(tmp_path / "a.png")
    options = ["--noise", "0.05", "--samples", "2", "--steps", "2", "--seed", "3"]
    out, err = said(capfd, "denoise", "r", tmp_path / "a.png", "--out", tmp_path / "one", *options)
    assert "22 pixels, the run's images have 16 x 16" in err and "std.png" in out
    denoise_files(pixels, [tmp_path / "a.png"], tmp_path / "two", noise=0.05, samples=2, steps=2, seed=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_names_that_would_meet_are_refused_before_anything_is_written(loaded, tmp_path, capfd):
    for name in ("a/x.png", "b/X.tif", "b/x-std.png", "x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(bits8()).save(tmp_path / name)
    before = tree(tmp_path)
    out = ["--out", tmp_path / "out"]
    refused(
        capfd,
        "denoise",
        "r",
        tmp_path / "a/x.png",
        tmp_path / "b/X.tif",
        *out,
        names=["would both be written as X.png"],
    )
    refused(capfd, "denoise", "r", tmp_path / "x.png", tmp_path / "x.png", "--samples", "2", *out, names=["x.png"])
    refused(
        capfd,
        *("denoise", "r", tmp_path / "b/x-std.png", tmp_path / "x.png", "--samples", "2", *out),
        names=["would both be written as x-std.png"],
    )
    refused(capfd, "denoise", "r", tmp_path / "x.png", "--out", tmp_path, names=["is one of the files to be read"])
    refused(capfd, "denoise", "r", *out, names=["FILE: none given"])
    refused(capfd, "denoise", "r", tmp_path / "x.png", "--out", tmp_path / "x.png", names=["is a file"])
    refused(capfd, "denoise", "r", tmp_path / "x.png", "--out", tmp_path / "no/such", names=["is not there"])
    refused(capfd, "denoise", "r", tmp_path / "x.png", "--noise", "9", *out, names=["noise: 9"])
    refused(capfd, "denoise", "r", tmp_path / "x.png", "--noise", "much", *out, names=["--noise", "much"])
    assert tree(tmp_path) == before


def test_a_result_that_cannot_be_written_leaves_nothing_half_done(pixels, tmp_path, monkeypatch):
    Image.fromarray(bits8()).save(tmp_path / "a.png")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        denoise_files(pixels, [tmp_path / "a.png"], tmp_path / "out", noise=NOISE)
    assert not list((tmp_path / "out").iterdir())


def test_noise_beyond_the_model_is_the_fault_of_one_file(pixels, tmp_path, monkeypatch):
    """An estimate of one file is refused like an unreadable file; a number that was given, for all."""
    monkeypatch.setattr(denoise_, "estimated", lambda image: 9.0)
    Image.fromarray(bits8()).save(tmp_path / "a.png")
    [result] = denoise_files(pixels, [tmp_path / "a.png"], tmp_path / "out")
    assert str(result.error).startswith(f"{tmp_path / 'a.png'}: noise: 9, as estimated; expected at most 6.0")
    assert not (tmp_path / "out").exists()
