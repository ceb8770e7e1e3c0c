"""One image file to gray values in [0, 1], whatever the file holds: convert by intent, or refuse by name.

The rules, so that a reader can tell what a pixel means:

- What a file is, is told by its first bytes and not by its name: PNG, JPEG, TIFF, BMP or DICOM.
- 8-bit gray: value / 255. 1-bit: 0 and 1. 2- and 4-bit gray: scaled so that the largest value is 1.
- 16-bit gray (PNG, TIFF): value / 65535; a TIFF that states fewer bits: value / (2^bits - 1).
- 32-bit float TIFF: must already lie in [0, 1]. Other integers have no known range: refused without a window.
- A window (low, high) replaces those ranges: low becomes 0, high becomes 1, what lies beyond is clipped.
- Colour, palette, CMYK: to RGB, then Rec. 601 luminance rounded to 8 bits (R = G = B gives that value exactly).
- Transparency: composited on black, as a display would do on a black background; all of it transparent: refused.
- White-is-zero TIFF and MONOCHROME1 DICOM are inverted: large values are bright everywhere.
- EXIF/TIFF orientation is applied; nothing else turns or flips an image.
- DICOM: values in the modality's units over the range that BitsStored could hold, so that of slope and intercept
  only a negative slope shows: it inverts. No VOI window of the file is applied: windows differ from image to image and
  clip, and a model of them would learn the operator's choice. All attributes: :mod:`medvdm.data.dicom`.
- Several pictures in one file: the primary one if the file says which it is (the first of a camera's JPEG; the only
  page of a TIFF that is no thumbnail and no mask), otherwise refused, since one would have to be picked.

Damage: every bit of a PNG is covered by a checksum, and so are the pixels of a TIFF with deflate compression; both are
checked. The other kinds have no checksum. A file cut short is refused, but a changed bit of a JPEG, of an uncompressed,
LZW or PackBits TIFF, of a BMP or of a DICOM file may read as another picture, and nothing in the file tells.

Resizing never overshoots [0, 1]: exact box mean where the side is a multiple of the new size, otherwise a
triangle filter widened to the scale (antialiased); neither has negative weights.
"""

from __future__ import annotations

import ctypes
import io
import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np

from medvdm.data import dicom
from medvdm.data.stored import MAX_PIXELS, Header, Stored, Window
from medvdm.errors import DataError, InputError, MedvdmError, MissingFileError, nearest
from medvdm.images import as_unit_float

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["pad", "crop", "stretch"]
FITS: tuple[Fit, ...] = ("pad", "crop", "stretch")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", *dicom.SUFFIXES)

_EXPECTED = "expected a gray or colour PNG, JPEG, TIFF, BMP or DICOM image"
_COLOUR_MODES = ("P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_START = 132  # bytes that tell what a file is


def kind_of(path: Path) -> str | None:
    """'PNG', 'JPEG', 'TIFF', 'BMP' or 'DICOM' by the first bytes of a file; None if it is none of them.

    Raises: as :func:`header`.
    """
    with problems_named(path), path.open("rb") as file:
        return _kind(file.read(_START), path)


def header(path: Path) -> Header:
    """Read the header of an image file without decoding its pixels.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file is no image that can be read.
        MissingPackageError: a DICOM file, without pydicom or a decoder of its compression.
    """
    with problems_named(path), _QUIET, path.open("rb") as file:
        if _kind(file.read(_START), path) == "DICOM":
            return dicom.header(path)
        with _opened(file, path) as image:
            width, height = _upright_size(image)
            is_uint8 = image.mode in ("1", "L", *_COLOUR_MODES)
            unit = "8 bits" if is_uint8 else f"{_bits(image)} bits" if image.mode != "F" else "float"
            remarks = {
                "hold further pictures, which are not read": getattr(image, "n_frames", 1) > 1,
                "lossily compressed (JPEG)": _is_jpeg(image),
            }
            return Header(height, width, is_uint8, unit, tuple(text for text, true in remarks.items() if true))


def read_stored(path: Path) -> Stored:
    """Read an image file as the gray values that it stores, with the range that it could hold.

    Raises: as :func:`header`; also DataError for damaged pixels and values that are not finite.
    """
    with problems_named(path), _QUIET:
        data = path.read_bytes()
        if _kind(data[:_START], path) == "DICOM":
            return dicom.stored(path)
        if data.startswith(_PNG):
            _check_png(data, path)
        with _opened(io.BytesIO(data), path) as image:
            if image.format == "TIFF":
                _check_deflate(image, data, path)
            return _pil_stored(image, path)


def read_gray(path: Path, window: Window | None = None) -> np.ndarray:
    """Read an image file as (H, W): uint8 where that loses nothing, otherwise float32 in [0, 1].

    Args:
        path: the file.
        window: stored values that become 0 and 1, instead of the file's whole range.

    Raises: as :func:`read_stored`; also DataError for values without a known range.
    """
    return read_stored(path).gray(str(path), window)


def read_image(path: Path, image_size: int | None = None, fit: Fit = "pad", window: Window | None = None) -> np.ndarray:
    """Read an image file as float32 (H, W, 1) in [0, 1], of ``image_size`` x ``image_size`` pixels if given.

    Raises: as :func:`read_gray` and :func:`resize`.
    """
    return as_image(read_gray(path, window), path, image_size, fit)


def as_image(gray: np.ndarray, path: Path, image_size: int | None = None, fit: Fit = "pad") -> np.ndarray:
    """What :func:`read_gray` gave, as float32 (H, W, 1) in [0, 1], of ``image_size`` x ``image_size`` if given.

    Raises: as :func:`resize`, with the name of the file.
    """
    image = as_unit_float(gray, str(path))[..., None]
    if image_size is None:
        return image
    try:
        return resize(image, image_size, fit)
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
    with problems_named(path), _QUIET:
        return dicom.patient(path)


def not_derivable(path: Path) -> str:
    """Why no derived file can be made of a DICOM file; '' if one can. Raises as :func:`header`."""
    with problems_named(path), _QUIET:
        return dicom.not_derivable(path)


def derived_dicom(path: Path, gray: np.ndarray, description: str, series: dict[str, str]) -> bytes:
    """See :func:`medvdm.data.dicom.derived`. Raises as :func:`header`."""
    with problems_named(path), _QUIET:
        return dicom.derived(path, gray, description, series)


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
def problems_named(path: Path) -> Iterator[None]:
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
    reason = " ".join(str(problem).split())[:300] or type(problem).__name__
    return f"a damaged image or one of an unknown kind ({reason})"


class _Quiet:
    """Hide warnings of PIL and pydicom while any thread is inside.

    ``warnings.catch_warnings`` changes the whole process, so the first thread in enters it and the last one leaves it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"(PIL|pydicom)(\.|$)")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__()


_QUIET = _Quiet()


# ---------------------------------------------------------------- PNG, JPEG, TIFF, BMP

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_DEFLATE, _JPEG = (8, 32946), (6, 7)  # kinds of compression


def _kind(start: bytes, path: Path) -> str | None:
    if dicom.is_dicom(start) or path.suffix.lower() in dicom.SUFFIXES:
        return "DICOM"
    if start.startswith(_PNG):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(_TIFF):
        return "TIFF"
    if start.startswith(b"BM") and int.from_bytes(start[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return None


@contextmanager
def _opened(file: BinaryIO, path: Path) -> Iterator[Image.Image]:
    """Open an image with PIL, header only, at its primary picture; refuse what is not one picture of a sane size."""
    from PIL import Image, ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:  # set by some other library: truncated files would read as half gray
        raise InputError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES: True; expected False, or damaged files go unnoticed")
    _silence_pil()
    file.seek(0)
    # From a file object, not a path: with a path PIL maps uncompressed TIFF into memory, and then scrambles an image
    # whose orientation tag swaps width and height (Pillow 13.0).
    try:
        image = Image.open(file, formats=("PNG", "JPEG", "TIFF", "BMP"))
    except Image.DecompressionBombError:
        raise DataError(f"{path}: found more than {MAX_PIXELS} pixels; expected at most that") from None
    with image:
        _go_to_primary(image, path)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: found {image.width} x {image.height} pixels; expected at most {MAX_PIXELS}")
        yield image


def _go_to_primary(image: Image.Image, path: Path) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames == 1:
        return
    if image.format == "MPO":  # the first picture is the primary one; the others may be views of equal rank
        kinds = {str(entry["Attribute"]["MPType"]) for entry in image.mpinfo[0xB002]}
        primary = [] if any(kind.startswith("Multi-Frame") for kind in kinds) else [0]
    elif image.format == "TIFF":
        primary = [page for page in range(frames) if not _subfile_type(image, page) & (_REDUCED | _MASK)]
    else:
        primary = []
    if len(primary) != 1:
        raise DataError(f"{path}: found {frames} frames; expected one image per file")
    image.seek(primary[0])


def _subfile_type(image: Image.Image, page: int) -> int:
    image.seek(page)
    older = {2: _REDUCED}.get(image.tag_v2.get(255, 1), 0)  # SubfileType, which NewSubfileType has replaced
    return int(image.tag_v2.get(254, older))


@cache
def _silence_pil() -> None:
    """Stop PIL's log and its libtiff from printing on standard error; PIL raises an exception all the same.

    PIL has no switch for libtiff. Where its libtiff cannot be reached, the line is printed.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # without any handler, logging prints
    from PIL import _imaging

    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    set_handler(None)


def _check_png(data: bytes, path: Path) -> None:
    """Refuse a PNG with a chunk that its CRC does not fit; PIL does not check those of the pixels."""
    at = len(_PNG)
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        name, crc = data[at + 4 : at + 8], data[at + 8 + size : at + 12 + size]
        if len(crc) < 4 or zlib.crc32(data[at + 4 : at + 8 + size]) != int.from_bytes(crc, "big"):
            raise DataError(
                f"{path}: found a damaged image (the checksum of PNG chunk {name!r} is wrong); expected it whole"
            )
        at += 12 + size
        if name == b"IEND":
            return
    raise DataError(f"{path}: found a damaged image (a PNG without its end); expected it whole")


def _check_deflate(image: Image.Image, data: bytes, path: Path) -> None:
    """Refuse a deflate TIFF with a strip or tile that its checksum does not fit; libtiff stops short of it."""
    tags = image.tag_v2
    if tags.get(259) not in _DEFLATE or tags.get(266, 1) != 1:
        return
    starts, sizes = (tags.get(273), tags.get(279)) if 273 in tags else (tags.get(324), tags.get(325))
    for start, size in zip(starts or (), sizes or (), strict=True):
        inflate = zlib.decompressobj()
        try:
            inflate.decompress(data[start : start + size], 16 * MAX_PIXELS)
            problem = "" if inflate.eof else "cut short"
        except zlib.error as error:
            problem = str(error)
        if problem:
            raise DataError(f"{path}: found a damaged image (TIFF: {problem}); expected it whole")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the orientation tag is applied. PIL does that itself for TIFF."""
    # getexif() of a PNG whose eXIf chunk comes last decodes the pixels; such a file is found out when it is read.
    known = image.format in ("JPEG", "MPO") or "exif" in image.info
    turned = known and image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") or (image.format == "TIFF" and image.tag_v2.get(259) in _JPEG)


def _bits(image: Image.Image) -> int:
    return int(image.tag_v2.get(258, (16,))[0]) if image.format == "TIFF" else 16


def _pil_stored(image: Image.Image, path: Path) -> Stored:
    from PIL import ImageOps

    # Tags first: transposing returns an image without them.
    is_tiff = image.format == "TIFF"
    bits = _bits(image)
    white_is_zero = is_tiff and image.tag_v2.get(262) == 0
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return Stored(
            np.array(image.convert("L")), 0, 255
        )  # PIL has already inverted white-is-zero at 8 bits and below
    if image.mode in ("1", "L", *_COLOUR_MODES):
        return Stored(_luminance(image, path), 0, 255)
    if image.mode.startswith("I;16") or (image.mode == "I" and not is_tiff):  # 'I': PNG in older versions of PIL
        return Stored(np.asarray(image).astype(np.int32), 0, 2**bits - 1, white_is_zero, bits)
    if image.mode == "F":
        values = np.array(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{path}: found values that are not finite (nan or inf); expected numbers")
        return Stored(values, 0, 1, white_is_zero, 32)
    if image.mode == "I":
        return Stored(np.array(image), None, None, white_is_zero, 32)
    raise DataError(f"{path}: found pixels of kind '{image.mode}'; {_EXPECTED} of 1 to 16 bits, or float in [0, 1]")


def _luminance(image: Image.Image, path: Path) -> np.ndarray:
    """Rec. 601 luminance (0.299 R + 0.587 G + 0.114 B) rounded to uint8, transparency composited on black."""
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3] == (0, 0):  # a writer that left alpha empty: black would be nobody's intent
            raise DataError(f"{path}: found a picture that is transparent everywhere; expected one to be seen")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("RGB").convert("L"))
