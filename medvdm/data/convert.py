"""One image file to gray values in [0, 1], whatever the file holds: convert by intent, or refuse by name.

The rules, so that a reader can tell what a pixel means:

- 8-bit gray: value / 255. 1-bit: 0 and 1. 2- and 4-bit gray: scaled so that the largest value is 1.
- 16-bit gray (PNG, TIFF): value / 65535; a TIFF that states fewer bits: value / (2^bits - 1).
- 32-bit float TIFF: must already lie in [0, 1]. Other integers have no known range: refused.
- Colour, palette, CMYK: to RGB, then Rec. 601 luminance rounded to 8 bits (R = G = B gives that value exactly).
- Transparency: composited on black, as a display would do on a black background.
- White-is-zero TIFF and MONOCHROME1 DICOM are inverted: large values are bright everywhere.
- EXIF/TIFF orientation is applied; nothing else turns or flips an image.
- DICOM: stored values over the whole range of BitsStored. The rescale slope and intercept are an affine map,
  which that scaling undoes, so only a negative slope matters: it inverts. No VOI window is applied: windows differ
  from image to image and clip, and a model of them would learn the operator's choice.
- Several frames in one file: refused, since one of them would have to be picked.

Resizing never overshoots [0, 1]: exact box mean where the side is a multiple of the new size, otherwise a
triangle filter widened to the scale (antialiased); neither has negative weights.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medvdm.errors import DataError, InputError, MedvdmError, MissingFileError, MissingPackageError, nearest
from medvdm.images import as_unit_float

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["pad", "crop", "stretch"]
FITS: tuple[Fit, ...] = ("pad", "crop", "stretch")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm")
MAX_PIXELS = 1 << 26  # 67 million; a chest X-ray has 1 to 20 million. More is a mistake or a decompression bomb

_EXPECTED = "expected a gray or colour PNG, JPEG, TIFF or DICOM image"
_COLOUR_MODES = ("P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_OPENING = threading.Lock()  # warnings.catch_warnings changes the whole process: one thread at a time


@dataclass(frozen=True)
class Header:
    """What a file's header says: the size as it will be read, and whether :func:`read_gray` gives uint8."""

    height: int
    width: int
    is_uint8: bool


def header(path: Path) -> Header:
    """Read the header of an image file without decoding its pixels.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file is no image that can be read.
        MissingPackageError: a DICOM file, without pydicom.
    """
    with _problems_named(path):
        if _is_dicom(path):
            dataset = _dicom_dataset(path, stop_before_pixels=True)
            return Header(int(dataset.Rows), int(dataset.Columns), is_uint8=False)
        with _opened(path) as image:
            width, height = _upright_size(image)
            return Header(height, width, is_uint8=image.mode in ("1", "L", *_COLOUR_MODES))


def read_gray(path: Path) -> np.ndarray:
    """Read an image file as (H, W): uint8 where that loses nothing, otherwise float32 in [0, 1].

    Raises: as :func:`header`; also DataError for damaged pixels and values without a known range.
    """
    with _problems_named(path):
        if _is_dicom(path):
            return _dicom_gray(path)
        with _opened(path) as image:
            return _pil_gray(image, path)


def read_image(path: Path, image_size: int | None = None, fit: Fit = "pad") -> np.ndarray:
    """Read an image file as float32 (H, W, 1) in [0, 1], of ``image_size`` x ``image_size`` pixels if given.

    Raises: as :func:`read_gray` and :func:`resize`.
    """
    gray = as_unit_float(read_gray(path), str(path))[..., None]
    if image_size is None:
        return gray
    try:
        return resize(gray, image_size, fit)
    except DataError as problem:
        raise DataError(f"{path}: {problem}") from None


def resize(image: np.ndarray, image_size: int, fit: Fit = "pad") -> np.ndarray:
    """Bring a float32 (H, W, C) image in [0, 1] to (image_size, image_size, C), antialiased, still in [0, 1].

    Args:
        image: float32 of shape (H, W, C) in [0, 1].
        image_size: new height and width in pixels, at least 1.
        fit: for images that are not square: 'pad' adds centred black bars, 'crop' keeps the centre square,
            'stretch' changes the aspect.

    Raises:
        InputError: image_size or fit cannot be used.
        DataError: so elongated that the padded square would exceed MAX_PIXELS.
    """
    from PIL import Image

    if image_size < 1:
        raise InputError(f"image_size: {image_size}; expected at least 1")
    square = _made_square(image, fit)
    height, width, channels = square.shape
    if (height, width) == (image_size, image_size):
        return square
    whole = height % image_size == 0 and width % image_size == 0
    kernel = Image.Resampling.BOX if whole else Image.Resampling.BILINEAR
    planes = [
        np.asarray(Image.fromarray(square[..., c]).resize((image_size, image_size), kernel)) for c in range(channels)
    ]
    # No kernel here overshoots; the clip only takes off the last float32 digit of a sum of weights.
    return np.clip(np.stack(planes, axis=-1), 0.0, 1.0)


def dicom_patient(path: Path) -> str:
    """PatientID of a DICOM file, stripped; '' if it has none. Raises as :func:`header`."""
    with _problems_named(path):
        dataset = _dicom_dataset(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(dataset.get("PatientID") or "").strip()


def _made_square(image: np.ndarray, fit: Fit) -> np.ndarray:
    height, width = image.shape[:2]
    if fit == "stretch" or height == width:
        square = image
    elif fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
    elif fit == "pad":
        side = max(height, width)
        if side * side > MAX_PIXELS:
            raise DataError(f"{width} x {height} pixels padded to a square; expected at most {MAX_PIXELS} pixels")
        top, left = (side - height) // 2, (side - width) // 2
        square = np.pad(image, ((top, side - height - top), (left, side - width - left), (0, 0)))
    else:
        raise InputError(f"fit: '{fit}'; {nearest(str(fit), FITS)}")
    return np.ascontiguousarray(square)


# ---------------------------------------------------------------- problems, in one line each


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into one line that names the file, what was found and what was expected."""
    try:
        yield
    except (MedvdmError, MemoryError):
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (PermissionError, IsADirectoryError) as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}); {_EXPECTED}") from None
    except Exception as problem:  # decoders raise OSError, SyntaxError, struct.error, KeyError, ...
        raise DataError(f"{path}: found {_found(path, problem)}; {_EXPECTED}") from None


def _found(path: Path, problem: Exception) -> str:
    """Say what a file that could not be decoded holds."""
    from PIL import UnidentifiedImageError

    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError:
        return f"a file that cannot be read ({problem})"
    if not start:
        return "an empty file (0 bytes)"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"text ({start.decode('ascii')!r})"
    if isinstance(problem, UnidentifiedImageError):
        return f"no image of a known kind (first bytes {start[:8].hex(' ')})"
    reason = " ".join(str(problem).split())[:160] or type(problem).__name__
    return f"a damaged image or one of an unknown kind ({reason})"


# ---------------------------------------------------------------- PNG, JPEG, TIFF


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image with PIL, header only, and refuse what cannot be one picture of a sane size."""
    from PIL import Image, ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:  # set by some other library: truncated files would read as half gray
        raise InputError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES: True; expected False, or damaged files go unnoticed")
    # From a file object, not a path: with a path PIL maps uncompressed TIFF into memory, and then scrambles an image
    # whose orientation tag swaps width and height (Pillow 13.0).
    with path.open("rb") as file:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS below is stricter
            try:
                image = Image.open(file, formats=("PNG", "JPEG", "TIFF"))
            except Image.DecompressionBombError:
                raise DataError(f"{path}: found more than {MAX_PIXELS} pixels; expected at most that") from None
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: found {image.width} x {image.height} pixels; expected at most {MAX_PIXELS}")
        frames = getattr(image, "n_frames", 1)
        if frames != 1:
            raise DataError(f"{path}: found {frames} frames; expected one image a file")
        yield image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the orientation tag is applied. PIL does that itself for TIFF."""
    # getexif() of a PNG whose eXIf chunk comes last decodes the pixels; such a file is found out when it is read.
    known = image.format == "JPEG" or "exif" in image.info
    turned = known and image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _pil_gray(image: Image.Image, path: Path) -> np.ndarray:
    from PIL import ImageOps

    # Tags first: transposing returns an image without them.
    is_tiff = image.format == "TIFF"
    bits = int(image.tag_v2.get(258, (16,))[0]) if is_tiff else 16
    white_is_zero = is_tiff and image.tag_v2.get(262) == 0
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return np.array(image.convert("L"))  # PIL has already inverted white-is-zero at 8 bits and below
    if image.mode in ("1", "L", *_COLOUR_MODES):
        return _luminance(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and not is_tiff):  # 'I': PNG in older versions of PIL
        values = np.asarray(image).astype(np.float32) / np.float32(2**bits - 1)
    elif image.mode == "F":
        values = np.array(image, dtype=np.float32)
    else:
        raise DataError(f"{path}: found pixels of kind '{image.mode}'; {_EXPECTED} of 1 to 16 bits, or float in [0, 1]")
    _check_unit_range(values, path)
    return np.float32(1.0) - values if white_is_zero else values


def _luminance(image: Image.Image) -> np.ndarray:
    """Rec. 601 luminance (0.299 R + 0.587 G + 0.114 B) rounded to uint8, transparency composited on black."""
    from PIL import Image

    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.array(image.convert("RGB").convert("L"))


def _check_unit_range(values: np.ndarray, path: Path) -> None:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
        raise DataError(f"{path}: found values from {low:g} to {high:g}; expected [0, 1]")


# ---------------------------------------------------------------- DICOM


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _pydicom(path: Path) -> Any:
    try:
        import pydicom
    except ImportError:
        raise MissingPackageError(
            f"{path}: a DICOM file needs pydicom, which is not installed; pip install 'medvdm[dicom]'"
        ) from None
    return pydicom


def _dicom_dataset(path: Path, **options: Any) -> Any:
    """The header of a DICOM file that holds one image."""
    pydicom = _pydicom(path)
    dataset = pydicom.dcmread(path, **options)
    if "specific_tags" in options:
        return dataset
    if "Rows" not in dataset or "Columns" not in dataset:
        raise DataError(f"{path}: found a DICOM file without an image (no Rows and Columns); expected one image")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise DataError(f"{path}: found {dataset.NumberOfFrames} frames; expected one image a file")
    if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
        raise DataError(f"{path}: found {dataset.Columns} x {dataset.Rows} pixels; expected at most {MAX_PIXELS}")
    return dataset


def _dicom_gray(path: Path) -> np.ndarray:
    from PIL import Image

    dataset = _dicom_dataset(path)
    kind = str(dataset.get("PhotometricInterpretation", ""))
    from pydicom.pixels import pixel_array

    pixels = pixel_array(dataset)  # YCbCr comes out as RGB
    if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8 and not kind.startswith("PALETTE"):
        return _as_dicom_float(np.array(Image.fromarray(pixels).convert("L")), 0, 255, path)
    if kind not in ("MONOCHROME1", "MONOCHROME2") or pixels.ndim != 2:
        raise DataError(
            f"{path}: found {kind or 'no photometric interpretation'}; expected MONOCHROME1, 2 or 8-bit RGB"
        )
    bits = int(dataset.BitsStored)
    low = -(2 ** (bits - 1)) if int(dataset.get("PixelRepresentation", 0)) else 0
    values = _as_dicom_float(pixels, low, low + 2**bits - 1, path)
    slope = dataset.get("RescaleSlope")
    inverted = (kind == "MONOCHROME1") != (slope is not None and float(slope) < 0)
    return np.float32(1.0) - values if inverted else values


def _as_dicom_float(pixels: np.ndarray, low: int, high: int, path: Path) -> np.ndarray:
    values = ((pixels.astype(np.float64) - low) / (high - low)).astype(np.float32)
    _check_unit_range(values, path)  # pydicom has cleared the bits above BitsStored, where old files keep overlays
    return values
