"""Every kind of image file to gray in [0, 1]: right values, right way up, or refused by name."""

import contextlib
import io
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from medvdm.data import convert
from medvdm.errors import DataError, InputError, MissingFileError, MissingPackageError

# No row, column or quadrant like another: every flip, turn and transposition shows.
GRAY8 = (np.arange(48, dtype=np.uint8).reshape(6, 8) * 5) ^ np.uint8(3)
GRAY8[0, :] = 255
GRAY8[:, 0] = 10
GRAY8[0, 0] = 0
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def write_dicom(path, pixels, *, kind="MONOCHROME2", bits=None, signed=0, frames=None, **tags):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    shape = pixels.shape[1:] if frames else pixels.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    if frames:
        dataset.NumberOfFrames = frames
    dataset.PhotometricInterpretation = kind
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = signed
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


# ---------------------------------------------------------------- values and orientation, format by format


def _png(path, **options):
    Image.fromarray(GRAY8).save(path, **options)


def _rgba(path):
    Image.fromarray(np.dstack([GRAY8, GRAY8, GRAY8, np.full_like(GRAY8, 255)])).save(path)


def _la(path):
    Image.merge("LA", [Image.fromarray(GRAY8), Image.new("L", (8, 6), 255)]).save(path)


def _palette(path):
    image = Image.fromarray(255 - GRAY8).copy()
    image.putpalette([255 - i for i in range(256) for _ in range(3)])  # index i shows as 255 - i
    assert image.mode == "P"
    image.save(path)


FORMATS = {
    "gray.png": _png,
    "rgb.png": lambda p: Image.fromarray(np.dstack([GRAY8] * 3)).save(p),
    "rgba.png": _rgba,
    "la.png": _la,
    "palette.png": _palette,
    "gray16.png": lambda p: Image.fromarray(GRAY8.astype(np.uint16) * 257).save(p),
    "gray.tif": lambda p: tifffile.imwrite(p, GRAY8, photometric="minisblack"),
    "gray_packed.tiff": lambda p: Image.fromarray(GRAY8).save(p, compression="tiff_lzw"),
    "white_is_zero.tif": lambda p: tifffile.imwrite(p, 255 - GRAY8, photometric="miniswhite"),
    "gray16.tif": lambda p: tifffile.imwrite(p, GRAY8.astype(np.uint16) * 257, photometric="minisblack"),
    "gray16_big_endian.tif": lambda p: tifffile.imwrite(p, GRAY8.astype(">u2") * 257, byteorder=">"),
    "white_is_zero16.tif": lambda p: tifffile.imwrite(p, (255 - GRAY8).astype(np.uint16) * 257, photometric=0),
    "float.tif": lambda p: tifffile.imwrite(p, GRAY8.astype(np.float32) / 255, photometric="minisblack"),
    "white_is_zero_float.tif": lambda p: tifffile.imwrite(p, 1 - GRAY8.astype(np.float32) / 255, photometric=0),
    "rgb.tif": lambda p: tifffile.imwrite(p, np.dstack([GRAY8] * 3), photometric="rgb"),
    "mono2.dcm": lambda p: write_dicom(p, GRAY8),
    "mono1.dcm": lambda p: write_dicom(p, 255 - GRAY8, kind="MONOCHROME1"),
    "rgb.dcm": lambda p: write_dicom(p, np.dstack([GRAY8] * 3), kind="RGB"),
    "no_suffix_of_dicom.png": lambda p: write_dicom(p, GRAY8),
}


@pytest.mark.parametrize("name", FORMATS)
def test_values_and_orientation_are_kept(tmp_path, name):
    path = tmp_path / name
    FORMATS[name](path)
    image = convert.read_image(path)
    assert image.shape == (6, 8, 1) and image.dtype == np.float32
    np.testing.assert_allclose(image[..., 0], GRAY8 / 255, atol=1e-6)
    header = convert.header(path)
    assert (header.height, header.width) == (6, 8)
    assert header.is_uint8 == (convert.read_gray(path).dtype == np.uint8)


def test_8_bit_gray_is_exact(tmp_path):
    _png(tmp_path / "a.png")
    np.testing.assert_array_equal(convert.read_gray(tmp_path / "a.png"), GRAY8)
    np.testing.assert_array_equal(
        convert.read_image(tmp_path / "a.png")[..., 0], GRAY8.astype(np.float32) / np.float32(255)
    )


def test_jpeg_has_the_right_side_up(tmp_path):
    big = np.kron(GRAY8, np.ones((16, 16), np.uint8))
    Image.fromarray(big).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(convert.read_image(tmp_path / "a.jpg")[..., 0], big / 255, atol=0.05)


def test_jpeg_is_remarked_wherever_it_is(tmp_path):
    """Its pixels cost fewer bits than those of the X-ray that it was made from."""
    picture = Image.fromarray(np.kron(GRAY8, np.ones((16, 16), np.uint8)))
    for name, options in {"a.jpg": {}, "a.tif": {"compression": "jpeg"}}.items():
        picture.save(tmp_path / name, **options)
        assert convert.header(tmp_path / name).remarks == ("lossily compressed (JPEG)",)
    for name, options in {"b.png": {}, "b.tif": {"compression": "tiff_lzw"}, "c.tif": {}, "b.bmp": {}}.items():
        picture.save(tmp_path / name, **options)
        assert convert.header(tmp_path / name).remarks == ()


def test_cmyk_goes_through_rgb(tmp_path):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[8:, :, 3] = 255  # K: the lower half is black
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.tif")
    image = convert.read_image(tmp_path / "a.tif")[..., 0]
    assert image[:8].min() == 1.0 and image[8:].max() == 0.0


def test_1_bit(tmp_path):
    bits = GRAY8 > 100
    Image.fromarray(bits).save(tmp_path / "a.png")
    Image.fromarray(bits).save(tmp_path / "a.tif", compression="group4")
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(convert.read_image(tmp_path / name)[..., 0], bits.astype(np.float32))


def test_tiff_that_states_12_bits(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GRAY8.astype(np.uint16), photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages[0].tags["BitsPerSample"].overwrite(12)
        data = file.pages[0].dataoffsets[0]
    packed = bytearray()  # two values in three bytes
    values = (GRAY8.astype(np.int64) * 4095 // 255).ravel()
    for a, b in values.reshape(-1, 2):
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    raw[data : data + len(packed)] = packed
    (tmp_path / "a.tif").write_bytes(raw)
    got = convert.read_image(tmp_path / "a.tif")[..., 0]
    np.testing.assert_allclose(got.ravel(), values / 4095, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "png16", "jpg", "tif", "tif16"])
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    """The stored pixels are the upright image, transformed back by numpy: an oracle apart from PIL's."""
    turned_back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a),  # 6: to be shown turned 90 degrees clockwise
        7: lambda a: np.rot90(a.T, 2),
        8: lambda a: np.rot90(a, -1),
    }
    upright = np.kron(GRAY8, np.ones((8, 8), np.uint8))
    stored = np.ascontiguousarray(turned_back[orientation](upright))
    if kind.endswith("16"):
        stored = stored.astype(np.uint16) * 257
    path = tmp_path / f"a.{kind[:3]}"
    if kind.startswith("tif"):
        tifffile.imwrite(path, stored, photometric="minisblack", extratags=[(274, "H", 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(path, exif=exif, **({"quality": 95} if kind == "jpg" else {}))
    header = convert.header(path)
    assert (header.height, header.width) == upright.shape
    np.testing.assert_allclose(convert.read_image(path)[..., 0], upright / 255, atol=0.06 if kind == "jpg" else 1e-6)


@quick
@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4))
def test_16_bit_is_scaled_by_65535_and_monotone(tmp_path, values):
    pixels = np.array(values, np.uint16).reshape(2, 2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    for name in ("a.png", "a.tif"):
        got = convert.read_image(tmp_path / name)[..., 0]
        np.testing.assert_allclose(got, pixels / 65535, atol=1e-7)
        assert np.all(np.diff(got.ravel()[np.argsort(pixels, axis=None)]) >= 0)
        assert (got[0, 0] < got[1, 1]) == (pixels[0, 0] < pixels[1, 1])  # 16 bits stay 16 bits


@quick
@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 255))
def test_luminance_and_alpha_on_black(tmp_path, rgb, alpha):
    r, g, b = rgb
    luminance = 0.299 * r + 0.587 * g + 0.114 * b
    Image.new("RGB", (2, 2), rgb).save(tmp_path / "a.png")
    got = convert.read_image(tmp_path / "a.png")
    np.testing.assert_allclose(got, luminance / 255, atol=0.51 / 255)
    assert min(rgb) / 255 - 1e-6 <= got.min() and got.max() <= max(rgb) / 255 + 1e-6
    Image.new("RGBA", (2, 2), (*rgb, alpha)).save(tmp_path / "b.png")
    np.testing.assert_allclose(convert.read_image(tmp_path / "b.png"), luminance * alpha / 255**2, atol=1.6 / 255)
    Image.new("LA", (2, 2), (r, alpha)).save(tmp_path / "c.png")
    np.testing.assert_allclose(convert.read_image(tmp_path / "c.png"), r * alpha / 255**2, atol=1.1 / 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_picture_that_is_transparent_everywhere_is_refused(tmp_path, kind):
    Image.new("RGBA", (4, 4), (200, 200, 200, 0)).save(tmp_path / "a", format=kind)
    with pytest.raises(DataError, match="transparent everywhere") as error:
        convert.read_image(tmp_path / "a")
    one_line(error)


def test_transparent_palette_and_gray_entries_are_black(tmp_path):
    gray = Image.fromarray(np.array([[200, 100]], np.uint8))
    gray.save(tmp_path / "gray.png", transparency=200)
    gray.convert("P").save(tmp_path / "palette.png", transparency=200)
    for name in ("gray.png", "palette.png"):
        np.testing.assert_allclose(convert.read_image(tmp_path / name).ravel() * 255, [0, 100], atol=1e-4)


# ---------------------------------------------------------------- DICOM


def test_dicom_is_scaled_by_bits_stored(tmp_path):
    pixels = np.array([[0, 1000], [2048, 4095]], np.uint16)
    got = convert.read_image(write_dicom(tmp_path / "a.dcm", pixels, bits=12))
    np.testing.assert_allclose(got[..., 0], pixels / 4095, atol=1e-6)


def test_dicom_overlay_bits_are_no_values(tmp_path):
    """Old files keep an overlay plane in the unused bits; OverlayBitPosition says in which."""
    pixels = np.array([[0, 1000], [2048, 4095]], np.uint16)
    with_overlay = pixels | np.uint16(1 << 14)
    path = write_dicom(tmp_path / "a.dcm", with_overlay, bits=12)
    with pytest.raises(DataError, match="BitsStored 12"):
        convert.read_image(path)
    dataset = pydicom.dcmread(path)
    dataset.add_new((0x6000, 0x0100), "US", 16)
    dataset.add_new((0x6000, 0x0102), "US", 14)
    dataset.save_as(path)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], pixels / 4095, atol=1e-6)
    assert any("overlay" in remark for remark in convert.header(path).remarks)


def test_signed_dicom(tmp_path):
    pixels = np.array([[-2048, 0], [1000, 2047]], np.int16)
    got = convert.read_image(write_dicom(tmp_path / "a.dcm", pixels, bits=12, signed=1))
    np.testing.assert_allclose(got[..., 0], (pixels + 2048) / 4095, atol=1e-6)


@pytest.mark.parametrize(("kind", "slope", "inverted"), [
    ("MONOCHROME2", 1, False), ("MONOCHROME2", 2.5, False), ("MONOCHROME2", -1, True),
    ("MONOCHROME1", 1, True), ("MONOCHROME1", -1, False),
])  # fmt: skip
def test_dicom_polarity(tmp_path, kind, slope, inverted):
    path = write_dicom(
        tmp_path / "a.dcm", GRAY8, kind=kind, RescaleSlope=slope, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=9
    )
    expected = 1 - GRAY8 / 255 if inverted else GRAY8 / 255
    np.testing.assert_allclose(convert.read_image(path)[..., 0], expected, atol=1e-6)


@pytest.mark.parametrize(("make", "words"), [
    (lambda p: write_dicom(p, np.zeros((3, 4, 4), np.uint8), frames=3), "3 frames"),
    (lambda p: write_dicom(p, GRAY8, kind="PALETTE COLOR"), "PALETTE"),
    (lambda p: p.write_bytes(b"\0" * 200), "damaged"),
    (lambda p: p.write_text("hello, I am text, not an image"), "text ('hello"),
    (lambda p: p.write_bytes(b""), "empty file"),
])  # fmt: skip
def test_dicom_refused(tmp_path, make, words):
    path = tmp_path / "a.dcm"
    make(path)
    with pytest.raises(DataError) as error:
        convert.read_image(path)
    assert str(path) in one_line(error) and words in str(error.value)


WORDS = np.array([[0, 1000], [2048, 4095]], np.uint16)


@pytest.mark.parametrize("top", [11, 12, 15])
def test_dicom_high_bit(tmp_path, top):
    path = write_dicom(tmp_path / "a.dcm", WORDS << (top - 11), bits=12, HighBit=top)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], WORDS / 4095, atol=1e-6)


@pytest.mark.parametrize("top", [11, 15])
def test_dicom_signed_high_bit(tmp_path, top):
    values = np.array([[-2048, -1], [0, 2047]], np.int16)
    path = write_dicom(tmp_path / "a.dcm", values << (top - 11), bits=12, signed=1, HighBit=top)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], (values + 2048.0) / 4095, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint8, 6), (np.uint16, 10), (np.uint32, 20)])
def test_dicom_words_of_all_lengths(tmp_path, dtype, bits):
    pixels = np.linspace(0, 2**bits - 1, 12).astype(dtype).reshape(3, 4)
    path = write_dicom(tmp_path / "a.dcm", pixels, bits=bits)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], pixels / (2.0**bits - 1), atol=1e-6)


def test_dicom_of_single_bits(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((4, 8), np.uint8))
    dataset = pydicom.dcmread(path)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 1, 0
    bits = np.random.default_rng(0).integers(0, 2, (4, 8)).astype(np.uint8)
    dataset.PixelData = np.packbits(bits, axis=None, bitorder="little").tobytes()
    dataset.save_as(path)
    np.testing.assert_array_equal(convert.read_image(path)[..., 0], bits)


def test_dicom_planar_colour(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    write_dicom(tmp_path / "a.dcm", colour, kind="RGB")
    planar = np.ascontiguousarray(colour.transpose(2, 0, 1)).reshape(4, 6, 3)
    write_dicom(tmp_path / "b.dcm", planar, kind="RGB", PlanarConfiguration=1)
    Image.fromarray(colour).save(tmp_path / "c.png")
    for name in ("a.dcm", "b.dcm"):
        np.testing.assert_array_equal(convert.read_gray(tmp_path / name), convert.read_gray(tmp_path / "c.png"))


def test_dicom_rescale_inside_functional_groups(tmp_path):
    """An enhanced file of one frame keeps slope and intercept there; a negative slope inverts."""
    rescale = pydicom.Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = -1, 0
    group = pydicom.Dataset()
    group.PixelValueTransformationSequence = [rescale]
    path = write_dicom(tmp_path / "a.dcm", GRAY8, NumberOfFrames=1, SharedFunctionalGroupsSequence=[group])
    np.testing.assert_allclose(convert.read_image(path)[..., 0], 1 - GRAY8 / 255, atol=1e-6)


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
def test_a_window_is_in_hounsfield_units(tmp_path, kind):
    units = np.array([[-3000, -1000, -300], [0, 400, 3000]])
    stored = ((units + 1024) / 2).astype(np.int16)
    path = write_dicom(tmp_path / "a.dcm", stored, signed=1, kind=kind, RescaleSlope=2, RescaleIntercept=-1024)
    got = convert.read_image(path, window=(-1000, 400))[..., 0]
    expected = np.clip((units + 1000) / 1400, 0, 1)
    np.testing.assert_allclose(got, 1 - expected if kind == "MONOCHROME1" else expected, atol=1e-6)


@pytest.mark.parametrize(("suffix", "make"), [
    ("png", lambda p, v: Image.fromarray(v.astype(np.uint16)).save(p)),
    ("tif", lambda p, v: tifffile.imwrite(p, v.astype(np.uint16))),
    ("tiff", lambda p, v: tifffile.imwrite(p, v.astype(np.float32))),
    ("TIF", lambda p, v: tifffile.imwrite(p, v.astype(np.int32))),
])  # fmt: skip
def test_a_window_of_other_files(tmp_path, suffix, make):
    values = np.array([[0, 100, 500], [1000, 4095, 5000]])
    make(tmp_path / f"a.{suffix}", values)
    got = convert.read_image(tmp_path / f"a.{suffix}", window=(100, 4095))[..., 0]
    np.testing.assert_allclose(got, np.clip((values - 100) / 3995, 0, 1), atol=1e-6)


DICOM_REFUSED = {
    "BitsStored": dict(pixels=WORDS, bits=8),
    "HighBit 15": dict(pixels=WORDS, bits=12, HighBit=15),  # the lower bits are not empty
    "HighBit 10": dict(pixels=WORDS, bits=12, HighBit=10),
    "HighBit 16": dict(pixels=WORDS, bits=12, HighBit=16),
    "BitsStored 17": dict(pixels=WORDS, bits=17),
    "BitsAllocated 24": dict(pixels=WORDS, BitsAllocated=24),
    "PixelRepresentation 1": dict(pixels=WORDS, bits=12, signed=1),
    "ModalityLUTSequence": dict(pixels=GRAY8, ModalityLUTSequence=[pydicom.Dataset()]),
    "RescaleSlope 0": dict(pixels=GRAY8, RescaleSlope="0"),
    "RescaleSlope nan": dict(pixels=GRAY8, RescaleSlope=float("nan")),
    "RescaleIntercept inf": dict(pixels=GRAY8, RescaleIntercept=float("inf")),
    "INVERSE": dict(pixels=GRAY8, PresentationLUTShape="INVERSE"),
    "IDENTITY": dict(pixels=GRAY8, kind="MONOCHROME1", PresentationLUTShape="IDENTITY"),
    "bytes of PixelData": dict(pixels=GRAY8, Rows=5),
    "48 bytes of PixelData": dict(pixels=GRAY8, Rows=7),
    "PALETTE COLOR": dict(pixels=GRAY8, kind="PALETTE COLOR"),
    "RGB with SamplesPerPixel 1": dict(pixels=GRAY8, kind="RGB"),
    "RGB of BitsStored 16": dict(pixels=np.zeros((2, 2, 3), np.uint16), kind="RGB"),
}


@pytest.mark.parametrize("words", DICOM_REFUSED)
def test_dicom_attribute_refused_by_name(tmp_path, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of values that it is asked to write
        path = write_dicom(tmp_path / "a.dcm", **DICOM_REFUSED[words])
    with pytest.raises(DataError) as error:
        convert.read_image(path)
    assert str(path) in one_line(error) and words in str(error.value) and "expected" in str(error.value)


def test_dicom_float_pixels_are_refused(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", GRAY8)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = GRAY8.astype(np.float32).tobytes()
    dataset.save_as(path)
    with pytest.raises(DataError, match="no BitsStored.*integer pixels"):
        convert.header(path)


@pytest.mark.parametrize(("words", "tags"), [
    ("lossily compressed", dict(LossyImageCompression="01")),
    ("SyntheticData YES", dict(SyntheticData="YES")),
    ("BurnedInAnnotation", dict(BurnedInAnnotation="YES")),
    ("secondary captures", dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")),
    ("secondary captures", dict(ImageType=["DERIVED", "SECONDARY"])),
    ("for processing", dict(PresentationIntentType="FOR PROCESSING")),
    ("not square", dict(PixelSpacing=[0.2, 0.1])),
    ("not square", dict(PixelAspectRatio=[2, 1])),
    ("PixelPaddingValue", dict(PixelPaddingValue=0)),
    ("PatientOrientation R/F", dict(PatientOrientation=["R", "F"])),
    ("PixelPresentation", dict(PixelPresentation="COLOR")),
    ("modality CT", dict(Modality="CT")),
])  # fmt: skip
def test_dicom_attribute_remarked(tmp_path, words, tags):
    path = write_dicom(tmp_path / "a.dcm", GRAY8, **tags)
    assert [words in remark for remark in convert.header(path).remarks] == [True]
    np.testing.assert_allclose(convert.read_image(path)[..., 0], GRAY8 / 255, atol=1e-6)


def test_an_ordinary_dicom_has_no_remarks(tmp_path):
    path = write_dicom(
        tmp_path / "a.dcm", GRAY8, Modality="DX", PatientOrientation=["L", "F"], PixelSpacing=[0.14, 0.14],
        PresentationLUTShape="IDENTITY", PresentationIntentType="FOR PRESENTATION", BurnedInAnnotation="NO",
        SyntheticData="NO", ImageType=["DERIVED", "PRIMARY"], LossyImageCompression="00",
    )  # fmt: skip
    assert convert.header(path).remarks == ()


def _compressed(path, syntax, pixels, bits, **tags):
    import imagecodecs
    from pydicom import uid
    from pydicom.encaps import encapsulate

    encoders = {
        "JPEGLossless": lambda a: imagecodecs.ljpeg_encode(a, bitspersample=bits),
        "JPEGLosslessSV1": lambda a: imagecodecs.ljpeg_encode(a, bitspersample=bits),
        "JPEGLSLossless": imagecodecs.jpegls_encode,
        "JPEG2000Lossless": lambda a: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, codecformat="j2k"),
        "JPEGBaseline8Bit": lambda a: imagecodecs.jpeg_encode(a, level=95),
        "JPEGExtended12Bit": lambda a: imagecodecs.jpeg_encode(a, level=95, bitspersample=bits),
    }
    dataset = pydicom.dcmread(write_dicom(path, pixels, bits=bits, **tags))
    if syntax == "RLELossless":
        dataset.compress(uid.RLELossless)
    else:
        dataset.PixelData = encapsulate([encoders[syntax](pixels)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    dataset.save_as(path)
    return path


SYNTAXES = ["JPEGLossless", "JPEGLosslessSV1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"]


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_compressed_dicom(tmp_path, syntax, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    pixels = np.random.default_rng(0).integers(0, 2**bits, (20, 30)).astype(dtype)
    path = _compressed(tmp_path / "a.dcm", syntax, pixels, bits)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], pixels / (2**bits - 1), atol=1e-6)
    assert not convert.header(path).remarks


@pytest.mark.parametrize(("syntax", "bits"), [("JPEGBaseline8Bit", 8), ("JPEGExtended12Bit", 12)])
def test_lossily_compressed_dicom(tmp_path, syntax, bits):
    smooth = np.add.outer(np.arange(32), np.arange(48)) * (2**bits - 1) // 78
    path = _compressed(tmp_path / "a.dcm", syntax, smooth.astype(np.uint8 if bits == 8 else np.uint16), bits)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], smooth / (2**bits - 1), atol=0.02)
    assert "lossily" in convert.header(path).remarks[0]


@pytest.mark.parametrize("syntax", ["JPEGLosslessSV1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressed_dicom_that_its_header_contradicts(tmp_path, syntax):
    pixels = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
    path = _compressed(tmp_path / "a.dcm", syntax, pixels, 12, Columns=20, Rows=30)
    with pytest.raises(DataError, match=r"\(20, 30\); expected \(30, 20\)"):
        convert.read_image(path)
    path = _compressed(tmp_path / "a.dcm", syntax, pixels, 12, BitsStored=10, HighBit=9)
    with pytest.raises(DataError, match="BitsStored 10"):
        convert.read_image(path)


@pytest.mark.parametrize("syntax", SYNTAXES[:4])
def test_compressed_dicom_without_a_decoder_names_the_remedy(tmp_path, syntax, monkeypatch):
    path = _compressed(tmp_path / "a.dcm", syntax, GRAY8, bits=8)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(MissingPackageError, match=r"a\.dcm.*pip install 'medvdm\[dicom\]'") as error:
        convert.header(path)
    one_line(error)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_damaged_compressed_dicom(tmp_path, syntax, capfd):
    """One line or a picture; the process lives, and no decoder prints."""
    pixels = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)
    path = _compressed(tmp_path / "a.dcm", syntax, pixels, bits=12)
    whole = path.read_bytes()
    start = len(whole) - 500
    for got in _flips(path, whole, range(8 * start, 8 * len(whole), 97)):
        assert got is None or (got.shape == (20, 30) and got.min() >= 0 and got.max() <= 1)
    assert capfd.readouterr() == ("", "")


def test_dicom_without_image(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", GRAY8)
    dataset = pydicom.dcmread(path)
    del dataset.Rows
    dataset.save_as(path)
    with pytest.raises(DataError, match="without an image"):
        convert.header(path)


def test_dicom_cut_short(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.tile(GRAY8, (20, 20)))
    path.write_bytes(path.read_bytes()[:-5000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as error:
            convert.read_image(path)
    assert str(path) in one_line(error)


def test_dicom_without_pydicom_names_the_extra(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", GRAY8)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingPackageError, match=r"a\.dcm.*medvdm\[dicom\]") as error:
        convert.header(path)
    one_line(error)


def test_dicom_patient(tmp_path):
    assert convert.dicom_patient(write_dicom(tmp_path / "a.dcm", GRAY8, PatientID=" P7 ")) == "P7"
    assert convert.dicom_patient(write_dicom(tmp_path / "b.dcm", GRAY8)) == ""


# ---------------------------------------------------------------- refused, in one line


def _frames(path):
    tifffile.imwrite(path, np.zeros((3, 8, 8), np.uint8), photometric="minisblack")


def _animated(path):
    first, second = Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 9)
    first.save(path, save_all=True, append_images=[second])


def _gif(path):
    Image.new("L", (4, 4)).save(path, format="GIF")


REFUSED = {
    "empty.png": (lambda p: p.write_bytes(b""), "empty file (0 bytes)"),
    "text.png": (lambda p: p.write_text("Image Index,Finding Labels"), "text ('Image Index"),
    "gif_inside.png": (_gif, "no image of a known kind"),
    "frames.tif": (_frames, "3 frames"),
    "animated.png": (_animated, "2 frames"),
    "int32.tif": (lambda p: tifffile.imwrite(p, np.zeros((4, 4), np.int32), photometric="minisblack"), "a known range"),
    "int16.tif": (lambda p: tifffile.imwrite(p, np.zeros((4, 4), np.int16), photometric="minisblack"), "a known range"),
    "above.tif": (lambda p: tifffile.imwrite(p, np.full((4, 4), 200, np.float32)), "from 200 to 200"),
    "nan.tif": (lambda p: tifffile.imwrite(p, np.full((4, 4), np.nan, np.float32)), "nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    make, words = REFUSED[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError) as error:
        convert.read_image(path)
    assert str(path) in one_line(error) and words in str(error.value) and "expected" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match="none.png"):
        convert.header(tmp_path / "none.png")


def _saved(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    out = io.BytesIO()
    if kind == "TIFF16":
        tifffile.imwrite(out, pixels.astype(np.uint16) * 257, photometric="minisblack")
    else:
        Image.fromarray(pixels).save(out, format=kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "TIFF16"])
@quick
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_or_complete(tmp_path, kind, part):
    """Cutting off a trailer may do no harm, but no pixel may ever be made up."""
    whole = _saved(kind)
    path = tmp_path / f"a.{kind[:4].lower()}"
    path.write_bytes(whole)
    expected = convert.read_gray(path)
    path.write_bytes(whole[: int(part * len(whole))])
    with warnings.catch_warnings(), contextlib.suppress(DataError):
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(convert.read_gray(path), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "TIFF16"])
def test_half_a_file_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind[:4].lower()}"
    path.write_bytes(_saved(kind)[:900])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as error:
            convert.read_gray(path)
    assert str(path) in one_line(error)


def _flips(path, whole, positions):
    """What is read after each bit is flipped: None where the file is refused by its name."""
    for position in positions:
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            yield convert.read_gray(path)
        except DataError as problem:
            assert str(path) in str(problem) and "\n" not in str(problem)
            yield None


SMOOTH = np.add.outer(np.arange(12), np.arange(16) * 12).astype(np.uint8)


@pytest.mark.parametrize("kind", ["gray", "16", "palette", "rgba", "interlaced"])
def test_no_flipped_bit_of_a_png_goes_unnoticed(tmp_path, kind):
    path = tmp_path / "a.png"
    image = Image.fromarray(SMOOTH.astype(np.uint16) * 200 if kind == "16" else SMOOTH)
    image = image.convert({"palette": "P", "rgba": "RGBA"}.get(kind, image.mode))
    image.save(path)
    whole = path.read_bytes()
    expected = convert.read_gray(path)
    for got in _flips(path, whole, range(0, 8 * len(whole), 3 if kind == "gray" else 23)):
        if got is not None:
            np.testing.assert_array_equal(got, expected)


def test_png_with_a_wrong_checksum_only(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(SMOOTH).save(path)
    whole = path.read_bytes()
    for name in (b"IHDR", b"IDAT", b"IEND"):
        at = whole.index(name)
        crc = at + 4 + int.from_bytes(whole[at - 4 : at], "big")
        path.write_bytes(whole[:crc] + bytes([whole[crc] ^ 1]) + whole[crc + 1 :])
        with pytest.raises(DataError, match=r"a\.png") as error:
            convert.read_gray(path)
        one_line(error)


@pytest.mark.parametrize("options", [dict(), dict(tile=(16, 16)), dict(predictor=True), dict(rowsperstrip=3)])
def test_no_flipped_pixel_of_a_deflate_tiff_goes_unnoticed(tmp_path, options):
    """Its tags have no checksum: those are left alone here."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, SMOOTH, compression="zlib", photometric="minisblack", **options)
    whole = path.read_bytes()
    expected = convert.read_gray(path)
    with tifffile.TiffFile(path) as file:
        parts = list(zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True))
    bits = [bit for start, size in parts for bit in range(8 * start, 8 * (start + size), 11)]
    for got in _flips(path, whole, bits):
        if got is not None:
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "TIFF"])
def test_a_flipped_bit_elsewhere_gives_one_line_or_a_picture(tmp_path, kind):
    """No checksum there, so the picture may be another; but it is one in [0, 1], and no error is longer than a line."""
    path = tmp_path / f"a.{kind.lower()}"
    whole = _saved(kind)
    for got in _flips(path, whole, range(0, 8 * len(whole), 61)):
        if got is not None:
            assert got.dtype == np.uint8 or (got.min() >= 0 and got.max() <= 1)


def test_nothing_of_other_libraries_is_printed(tmp_path, capfd):
    """libtiff prints on the process's standard error; pydicom and PIL warn, which would be an error in these tests."""
    Image.fromarray(np.tile(SMOOTH, (4, 4))).save(tmp_path / "a.tif", compression="tiff_lzw")
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[:8] + bytes(200) + whole[208:])
    path = write_dicom(tmp_path / "b.dcm", GRAY8)
    path.write_bytes(path.read_bytes()[:-9])
    tifffile.imwrite(tmp_path / "c.tif", SMOOTH)
    with tifffile.TiffFile(tmp_path / "c.tif", mode="r+") as file:
        file.pages[0].tags["SamplesPerPixel"].overwrite(129)
    for name in ("a.tif", "b.dcm", "c.tif"):
        with pytest.raises(DataError) as error:
            convert.read_gray(tmp_path / name)
        one_line(error)
    assert capfd.readouterr() == ("", "")


def test_warnings_of_the_caller_are_left_as_they_were(tmp_path):
    _png(tmp_path / "a.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: convert.read_gray(tmp_path / "a.png"), range(50)))
    assert list(warnings.filters) == before


# ---------------------------------------------------------------- what a file is, and which picture in it


@pytest.mark.parametrize("name", ["a.ima", "a.dicom", "a.dic", "a", "a.IMA", "a.jpg"])
def test_dicom_by_any_name(tmp_path, name):
    path = write_dicom(tmp_path / name, GRAY8, PatientID="P7")
    assert convert.kind_of(path) == "DICOM" and convert.dicom_patient(path) == "P7"
    header = convert.header(path)
    assert (header.patient, header.height, header.width) == ("P7", 6, 8)
    np.testing.assert_allclose(convert.read_image(path)[..., 0], GRAY8 / 255, atol=1e-6)


@pytest.mark.parametrize("name", ["a", "a.dcm"])
def test_dicom_without_a_preamble(tmp_path, name):
    """Read if its transfer syntax is stated, refused otherwise: byte order and compression would be a guess."""
    made = write_dicom(tmp_path / "whole", GRAY8, SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1")
    whole = made.read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[132:])
    assert convert.kind_of(path) == "DICOM"
    np.testing.assert_allclose(convert.read_image(path)[..., 0], GRAY8 / 255, atol=1e-6)
    path.write_bytes(whole[whole.index(b"\x08\0\x16\0") :])
    assert convert.kind_of(path) == "DICOM"
    with pytest.raises(DataError, match="no TransferSyntaxUID") as error:
        convert.read_image(path)
    one_line(error)


@pytest.mark.parametrize(("kind", "name"), [("PNG", "a.jpg"), ("BMP", "a.bmp"), ("BMP", "a.png"), ("TIFF", "a")])
def test_other_kinds_by_any_name(tmp_path, kind, name):
    Image.fromarray(GRAY8).save(tmp_path / name, format=kind)
    assert convert.kind_of(tmp_path / name) == kind
    np.testing.assert_array_equal(convert.read_gray(tmp_path / name), GRAY8)


@pytest.mark.parametrize("start", [b"", b"BM", b"BM are my initials and this is text", b"GIF89a", b"RIFF....WEBP"])
def test_no_image_by_its_first_bytes(tmp_path, start):
    (tmp_path / "a").write_bytes(start)
    assert convert.kind_of(tmp_path / "a") is None


def test_the_first_picture_of_a_camera_jpeg(tmp_path):
    big = np.kron(GRAY8, np.ones((16, 16), np.uint8))
    small = Image.fromarray(255 - big[::4, ::4])
    Image.fromarray(big).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small], quality=95)
    raw = (tmp_path / "a.jpg").read_bytes()
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    Image.fromarray(big).save(tmp_path / "b.jpg", quality=95)
    np.testing.assert_array_equal(convert.read_gray(tmp_path / "a.jpg"), convert.read_gray(tmp_path / "b.jpg"))
    assert "further pictures" in convert.header(tmp_path / "a.jpg").remarks[0]
    primary, panorama = ((kind).to_bytes(4, "little") for kind in (0x030000, 0x020001))
    at = raw.rindex(primary, 0, raw.index(b"MPF\0") + 120)  # in the list of pictures, which comes last
    panorama = raw[:at] + panorama + raw[at + 4 :]
    (tmp_path / "a.jpg").write_bytes(panorama)
    with pytest.raises(DataError, match="2 frames"):
        convert.header(tmp_path / "a.jpg")


@pytest.mark.parametrize("first", ["picture", "thumbnail", "mask"])
def test_the_page_of_a_tiff_that_is_no_thumbnail(tmp_path, first):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        if first == "picture":
            file.write(GRAY8, photometric="minisblack")
        file.write(GRAY8[::2, ::2], photometric="minisblack", subfiletype=1)
        if first != "picture":
            file.write(GRAY8, photometric="minisblack")
    if first == "mask":
        with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
            file.pages[0].tags["NewSubfileType"].overwrite(4)
    np.testing.assert_array_equal(convert.read_gray(tmp_path / "a.tif"), GRAY8)
    header = convert.header(tmp_path / "a.tif")
    assert (header.height, header.width) == (6, 8) and "further pictures" in header.remarks[0]


def test_load_truncated_images_is_refused(tmp_path, monkeypatch):
    _png(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(InputError, match="LOAD_TRUNCATED_IMAGES"):
        convert.read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "side", [9000, 20000]
)  # PIL only warns at the first, and raises an error of its own at the other
def test_decompression_bomb(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="pixels; expected at most") as error:
            convert.header(tmp_path / "a.png")
    assert "a.png" in one_line(error)


# ---------------------------------------------------------------- resizing


def test_whole_number_reduction_is_the_box_mean():
    image = np.random.default_rng(0).random((24, 24, 1), np.float32)
    expected = image.reshape(6, 4, 6, 4).mean(axis=(1, 3))[..., None]
    np.testing.assert_allclose(convert.resize(image, 6), expected, atol=1e-6)


@quick
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 50),
    fit=st.sampled_from(convert.FITS),
    seed=st.integers(0, 9),
)
def test_resize_never_overshoots(height, width, size, fit, seed):
    image = np.random.default_rng(seed).integers(0, 2, (height, width, 3)).astype(np.float32)  # the sharpest edges
    got = convert.resize(image, size, fit)
    assert got.shape == (size, size, 3) and got.dtype == np.float32
    assert got.min() >= 0.0 and got.max() <= 1.0
    np.testing.assert_allclose(convert.resize(np.ones_like(image), size, "stretch"), 1.0, atol=1e-6)


def test_no_kernel_overshoots_before_the_clip(monkeypatch):
    monkeypatch.setattr(np, "clip", lambda image, low, high: image)
    step = np.zeros((31, 31, 1), np.float32)
    step[:, 15:] = 1
    got = convert.resize(step, 20)
    assert got.min() >= -1e-6 and got.max() <= 1 + 1e-6


def test_resize_is_antialiased():
    checkers = np.indices((50, 50)).sum(axis=0) % 2
    got = convert.resize(checkers[..., None].astype(np.float32), 12)
    assert np.abs(got - 0.5).max() < 0.1  # picking single pixels would give zeros and ones


@pytest.mark.parametrize("size", [3, 8, 12, 17, 40])
def test_resize_keeps_the_right_side_up(size):
    """The centre of mass stays where it was, in both directions."""
    image = np.zeros((24, 24, 1), np.float32)
    image[2:10, 14:22] = 1  # top right; centre at 6/24 from the top, 18/24 from the left
    got = convert.resize(image, size)[..., 0]
    rows, columns = np.indices(got.shape) + 0.5
    centre = (rows * got).sum() / got.sum() / size, (columns * got).sum() / got.sum() / size
    np.testing.assert_allclose(centre, (6 / 24, 18 / 24), atol=0.03)


def test_pad_crop_and_stretch():
    image = np.full((2, 6, 1), 1.0, np.float32)
    image[:, 2:4] = 0.5
    padded = convert.resize(image, 6, "pad")[..., 0]
    assert padded[:2].max() == 0 and padded[4:].max() == 0
    np.testing.assert_array_equal(padded[2:4], image[..., 0])
    np.testing.assert_array_equal(convert.resize(image, 2, "crop")[..., 0], np.full((2, 2), 0.5))
    stretched = convert.resize(image, 6, "stretch")[..., 0]
    np.testing.assert_allclose(stretched, np.tile(image[:1, :, 0], (6, 1)))


def test_pad_and_crop_of_upright_images():
    image = np.zeros((7, 4, 1), np.float32)
    image[1:5] = np.arange(16, dtype=np.float32).reshape(4, 4, 1) / 15
    np.testing.assert_array_equal(convert.resize(image, 4, "crop"), image[1:5])
    padded = convert.resize(image, 7, "pad")
    np.testing.assert_array_equal(padded[:, 1:5], image)
    assert padded[:, 0].max() == 0 and padded[:, 5:].max() == 0


def test_resize_refuses():
    image = np.zeros((4, 4, 1), np.float32)
    with pytest.raises(InputError, match="image_size: 0"):
        convert.resize(image, 0)
    with pytest.raises(InputError, match="did you mean 'crop'"):
        convert.resize(image[:3], 4, "crp")


def test_too_elongated_to_pad(tmp_path):
    Image.new("L", (9000, 1)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 9000 x 1 pixels padded"):
        convert.read_image(tmp_path / "a.png", 8)
