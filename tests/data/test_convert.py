"""Every kind of image file to gray in [0, 1]: right values, right way up, or refused by name."""

import contextlib
import io
import sys
import warnings

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
@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(0, 255))
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


def test_dicom_bits_above_bits_stored_are_no_values(tmp_path):
    pixels = np.array([[0, 1000], [2048, 4095]], np.uint16)
    with_overlay = pixels | np.uint16(1 << 14)  # where old files keep an overlay plane
    got = convert.read_image(write_dicom(tmp_path / "a.dcm", with_overlay, bits=12))
    np.testing.assert_allclose(got[..., 0], pixels / 4095, atol=1e-6)


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
    "int32.tif": (lambda p: tifffile.imwrite(p, np.zeros((4, 4), np.int32), photometric="minisblack"), "kind 'I'"),
    "int16.tif": (lambda p: tifffile.imwrite(p, np.zeros((4, 4), np.int16), photometric="minisblack"), "kind 'I'"),
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
