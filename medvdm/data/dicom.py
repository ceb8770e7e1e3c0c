"""DICOM files: every attribute that changes what a stored number means is obeyed, refused by its name, or remarked.

Obeyed:

- BitsAllocated 1, 8, 16 or 32; BitsStored, HighBit and PixelRepresentation: values are shifted down by
  HighBit + 1 - BitsStored and signed values are extended.
- Bits that an OverlayBitPosition declares are no part of the values.
- RescaleSlope and RescaleIntercept, also inside the functional groups of an enhanced file: values are in the
  modality's units (CT: Hounsfield units), and their range is what BitsStored could hold, in those units.
- MONOCHROME1 and PresentationLUTShape INVERSE: large values are dark.
- 8-bit RGB and YBR, both PlanarConfigurations: Rec. 601 luminance.
- A file of one frame; an IconImageSequence is not the picture and is not looked at.

Refused:

- Values with bits beyond BitsStored, or signed values that are not sign-extended (unsigned values declared signed).
  Signed values that use all allocated bits, and compressed signed values, cannot be told from unsigned ones.
- Fewer or more bytes of PixelData than Rows, Columns and BitsAllocated say; FloatPixelData and DoubleFloatPixelData.
- ModalityLUTSequence; a RescaleSlope that is 0, or a slope or intercept that is not finite.
- MONOCHROME2 with PresentationLUTShape INVERSE, MONOCHROME1 with IDENTITY: they contradict each other.
- PALETTE COLOR, colour of other than 8 bits, several frames.

Remarked, and otherwise ignored:

- VOI windows and VOI LUTs are never applied (the operator's choice); nor are ICC profiles; neither is remarked.
- SyntheticData YES: images of nobody, made by a model or another program; a model that learns from them learns that.
- Overlay planes, PixelPaddingValue, lossy compression, BurnedInAnnotation, secondary captures, images for processing,
  supplemental palettes, pixels that are not square, a PatientOrientation other than left and foot, other modalities.

DICOM has no checksum: a damaged value in uncompressed pixels is not found.

What was made of an image can become a derived DICOM file of the same kind (:func:`derived`).
"""

from __future__ import annotations

import io
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from medvdm.data.stored import MAX_PIXELS, Header, NoImageError, Stored
from medvdm.errors import DataError, MedvdmError, MissingPackageError

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_PROJECTIONS = ("CR", "DX", "DR", "RG", "MG", "XA", "RF", "OT", "")
_INSTALL = "pip install 'medvdm[dicom]'"
# Transfer syntaxes that pydicom decodes itself, or with Pillow.
_RLE, _JPEG = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50"
#: Functions of imagecodecs by transfer syntax. Of the decoders that pydicom knows for these, gdcm ends the process at
#: some damaged files, and pylibjpeg's for JPEG is under the GPL.
_CODECS = {
    "1.2.840.10008.1.2.4.51": "jpeg_decode",
    **dict.fromkeys(("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"), "jpeg_decode"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), "jpegls_decode"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), "jpeg2k_decode"),
}


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins with these 132 bytes is DICOM, with its preamble or without."""
    return start[128:132] == b"DICM" or _is_bare(start)


def _is_bare(start: bytes) -> bool:
    """Whether a file begins with an element of group 2 or 8, as old DICOM files without a preamble do."""
    return start[:2] in (b"\x02\0", b"\x08\0") and start[2:4] in (b"\0\0", b"\1\0", b"\5\0", b"\x08\0", b"\x16\0")


def header(path: Path) -> Header:
    """The header of a DICOM file, without its pixels.

    Raises:
        NoImageError: it holds no picture.
        DataError: its attributes cannot be used.
        MissingPackageError: pydicom or a decoder of its compression is not installed.
    """
    dataset = _dataset(path, stop_before_pixels=True)
    _check(dataset, path)
    return Header(
        height=int(dataset.Rows),
        width=int(dataset.Columns),
        is_uint8=int(dataset.get("SamplesPerPixel", 1)) == 3,
        unit=_unit(dataset, path),
        remarks=tuple(_remarks(dataset)),
        patient=_text(dataset, "PatientID"),
        issuer=_text(dataset, "IssuerOfPatientID"),
    )


def patient(path: Path) -> str:
    """PatientID of a DICOM file, stripped; '' if it has none."""
    return _text(_dataset(path, stop_before_pixels=True, specific_tags=["PatientID"]), "PatientID")


def stored(path: Path) -> Stored:
    """The values of a DICOM file in the modality's units. Raises as :func:`header`."""
    dataset = _dataset(path)
    _check(dataset, path)
    if "PixelData" not in dataset:
        raise DataError(f"{path}: found no PixelData; expected integer pixels")
    if int(dataset.get("SamplesPerPixel", 1)) == 3:
        return Stored(_luminance(dataset, path), 0, 255)
    words = _words(dataset, path)
    slope, intercept = _rescale(dataset, path)
    ends = [slope * value + intercept for value in _type_range(dataset)]
    kind = str(dataset.PhotometricInterpretation)
    return Stored(
        words * slope + intercept, min(ends), max(ends), inverted=kind == "MONOCHROME1", bits=int(dataset.BitsStored)
    )


def _dataset(path: Path, **options: Any) -> Any:
    try:
        import pydicom
    except ImportError:
        raise MissingPackageError(f"{path}: a DICOM file needs pydicom, which is not installed; {_INSTALL}") from None
    with path.open("rb") as file:
        bare = _is_bare(file.read(4))
    return pydicom.dcmread(path, force=bare, **options)


def _text(dataset: Any, name: str) -> str:
    return str(dataset.get(name) or "").strip()


# ---------------------------------------------------------------- the header


def _check(dataset: Any, path: Path) -> None:
    """Refuse what the attributes alone forbid."""
    if "Rows" not in dataset or "Columns" not in dataset:
        raise NoImageError(f"{path}: found a DICOM file without an image (no Rows and Columns); expected one image")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise DataError(f"{path}: found {dataset.NumberOfFrames} frames; expected one image per file")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if not 0 < rows * columns <= MAX_PIXELS:
        raise DataError(f"{path}: found {columns} x {rows} pixels; expected 1 to {MAX_PIXELS} pixels")
    _check_syntax(dataset, path)
    _check_bits(dataset, path)
    _check_meaning(dataset, path)
    _rescale(dataset, path)


def _unit(dataset: Any, path: Path) -> str:
    signed = "signed " if int(dataset.get("PixelRepresentation") or 0) else ""
    slope, intercept = _rescale(dataset, path)
    return f"DICOM, {signed}{dataset.BitsStored} bits, slope {slope:g}, intercept {intercept:g}"


def _check_syntax(dataset: Any, path: Path) -> None:
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None:
        raise DataError(f"{path}: found no TransferSyntaxUID; expected one, which says how the pixels are stored")
    if syntax.is_encapsulated and syntax not in (_RLE, _JPEG, *_CODECS):
        raise DataError(f"{path}: found pixels stored as {syntax.name}; expected RLE, JPEG, JPEG-LS or JPEG 2000")
    if syntax in _CODECS:
        _codec(dataset, path)


def _codec(dataset: Any, path: Path) -> Any:
    """The decoder of a compressed file."""
    try:
        import imagecodecs
    except ImportError:
        name = dataset.file_meta.TransferSyntaxUID.name
        raise MissingPackageError(f"{path}: no decoder for its compression; {_INSTALL} ({name})") from None
    return getattr(imagecodecs, _CODECS[dataset.file_meta.TransferSyntaxUID])


def _check_bits(dataset: Any, path: Path) -> None:
    for name in ("BitsAllocated", "BitsStored", "HighBit"):
        if dataset.get(name) is None:
            raise DataError(f"{path}: found no {name}; expected integer pixels, which state it")
    allocated, bits, top = int(dataset.BitsAllocated), int(dataset.BitsStored), int(dataset.HighBit)
    if allocated not in (1, 8, 16, 32):
        raise DataError(f"{path}: found BitsAllocated {allocated}; expected 1, 8, 16 or 32")
    if not 1 <= bits <= allocated:
        raise DataError(f"{path}: found BitsStored {bits}; expected 1 to {allocated}, the BitsAllocated")
    if not bits - 1 <= top < allocated:
        raise DataError(f"{path}: found HighBit {top}; expected {bits - 1} to {allocated - 1}, for BitsStored {bits}")
    if int(dataset.get("PixelRepresentation") or 0) not in (0, 1):
        raise DataError(f"{path}: found PixelRepresentation {dataset.PixelRepresentation}; expected 0 or 1")


def _check_meaning(dataset: Any, path: Path) -> None:
    kind = _text(dataset, "PhotometricInterpretation")
    samples = int(dataset.get("SamplesPerPixel", 1))
    if samples == 3 and kind in _COLOURS:
        if (int(dataset.BitsAllocated), int(dataset.BitsStored)) != (8, 8):
            raise DataError(f"{path}: found {kind} of BitsStored {dataset.BitsStored}; expected 8-bit colour")
    elif samples != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(
            f"{path}: found {kind or 'no PhotometricInterpretation'} with SamplesPerPixel {samples}; "
            "expected MONOCHROME1, MONOCHROME2 or 8-bit RGB"
        )
    shape = _text(dataset, "PresentationLUTShape")
    if (kind, shape) in (("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "IDENTITY")):
        raise DataError(f"{path}: found {kind} with PresentationLUTShape {shape}; expected the two to agree")
    if "ModalityLUTSequence" in dataset:
        raise DataError(f"{path}: found a ModalityLUTSequence; expected RescaleSlope and RescaleIntercept or neither")


def _rescale(dataset: Any, path: Path) -> tuple[float, float]:
    """RescaleSlope and RescaleIntercept, from the file or from its functional groups."""
    found = []
    for name, missing in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        values = [source.get(name) for source in _with_groups(dataset, "PixelValueTransformationSequence")]
        stated = next((value for value in values if value is not None and value != ""), missing)
        number = float(stated)
        if not math.isfinite(number) or (name == "RescaleSlope" and number == 0):
            raise DataError(f"{path}: found {name} {stated}; expected a finite number, and not 0 for the slope")
        found.append(number)
    return found[0], found[1]


def _with_groups(dataset: Any, sequence: str) -> list[Any]:
    """The data set, and the items of ``sequence`` in its functional groups (of its only frame)."""
    items = [dataset]
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in dataset.get(groups) or ():
            items += group.get(sequence) or ()
    return items


def _remarks(dataset: Any) -> list[str]:
    spacing = [float(value) for value in (_spacing(dataset) or (1, 1))]
    orientation = [str(value) for value in dataset.get("PatientOrientation") or ()]
    image_type = [str(value) for value in dataset.get("ImageType") or ()]
    modality = _text(dataset, "Modality")
    remarks = {
        "say SyntheticData YES: made by a model or another program, not taken of a person": (
            _text(dataset, "SyntheticData") == "YES"
        ),
        "lossily compressed (LossyImageCompression or the transfer syntax says so)": (
            _text(dataset, "LossyImageCompression") == "01" or _is_lossy(dataset.file_meta.TransferSyntaxUID)
        ),
        "say BurnedInAnnotation YES: text in the picture, perhaps of the patient": (
            _text(dataset, "BurnedInAnnotation") == "YES"
        ),
        "secondary captures or derived copies, not as the detector gave them": (
            _text(dataset, "SOPClassUID").startswith(_SECONDARY_CAPTURE) or image_type[:2] == ["DERIVED", "SECONDARY"]
        ),
        "for processing, not for presentation: their gray values are the detector's": (
            _text(dataset, "PresentationIntentType") == "FOR PROCESSING"
        ),
        "have pixels that are not square and are read as if they were": not math.isclose(*spacing, rel_tol=0.01),
        "have an overlay that is not drawn": any(0x6000 <= tag.group <= 0x601E for tag in dataset.keys()),
        "have a PixelPaddingValue: padded pixels stay as they are": "PixelPaddingValue" in dataset,
        "have colours on top of gray (PixelPresentation), which are not drawn": (
            _text(dataset, "PixelPresentation") in ("COLOR", "MIXED")
        ),
        f"have PatientOrientation {'/'.join(orientation)}, where a frontal X-ray has L/F: not turned or mirrored": (
            len(orientation) == 2 and [value[:1] for value in orientation] != ["L", "F"]
        ),
        f"of modality {modality}": modality not in _PROJECTIONS,
    }
    return [text for text, true in remarks.items() if true]


def _spacing(dataset: Any) -> Any:
    """Height and width of a pixel, in any unit."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        for source in _with_groups(dataset, "PixelMeasuresSequence"):
            value = source.get(name)
            if value is not None and len(value) == 2 and all(float(side) > 0 for side in value):
                return value
    return None


# ---------------------------------------------------------------- the pixels


def _decoded(dataset: Any, path: Path, **options: Any) -> np.ndarray:
    """Pixels as they are stored, (Rows, Columns) or (Rows, Columns, 3); ``options`` are for pydicom."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        _check_length(dataset, path)
        return pixel_array(dataset, **options)
    try:
        if syntax in _CODECS:
            pixels = _codec(dataset, path)(get_frame(dataset.PixelData, 0, number_of_frames=1))
        else:
            pixels = pixel_array(dataset, decoding_plugin="pydicom" if syntax == _RLE else "pillow", **options)
    except MedvdmError:
        raise
    except Exception as problem:
        reason = " ".join(str(problem).split())[-200:] or type(problem).__name__
        raise DataError(f"{path}: found pixels that do not decode as {syntax.name} ({reason})") from None
    expected = (int(dataset.Rows), int(dataset.Columns), 3)[: 3 if int(dataset.get("SamplesPerPixel", 1)) == 3 else 2]
    if pixels.shape != expected:
        raise DataError(f"{path}: found compressed pixels of shape {pixels.shape}; expected {expected}, as its header")
    return pixels


def _check_length(dataset: Any, path: Path) -> None:
    if "422" in str(dataset.PhotometricInterpretation):
        return  # fewer bytes; pydicom checks them
    values = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel", 1))
    expected = -(-values * int(dataset.BitsAllocated) // 8)
    if len(dataset.PixelData) not in (expected, expected + expected % 2):
        raise DataError(
            f"{path}: found {len(dataset.PixelData)} bytes of PixelData; expected {expected}, for "
            f"{dataset.Columns} x {dataset.Rows} pixels of BitsAllocated {dataset.BitsAllocated}"
        )


def _luminance(dataset: Any, path: Path) -> np.ndarray:
    from PIL import Image

    return np.array(Image.fromarray(_decoded(dataset, path)).convert("L"))  # YBR comes out of pydicom as RGB


def _type_range(dataset: Any) -> tuple[int, int]:
    bits = int(dataset.BitsStored)
    low = -(1 << (bits - 1)) if int(dataset.get("PixelRepresentation") or 0) else 0
    return low, low + (1 << bits) - 1


def _words(dataset: Any, path: Path) -> np.ndarray:
    """Stored integers as int64 of shape (Rows, Columns), after HighBit, BitsStored and PixelRepresentation."""
    array = _decoded(dataset, path, raw=True, correct_unused_bits=False)
    allocated, bits, top = int(dataset.BitsAllocated), int(dataset.BitsStored), int(dataset.HighBit)
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: found pixels of type {array.dtype}; expected integers")
    words = array.astype(np.int64) & ((1 << allocated) - 1) & ~_overlay_bits(dataset)
    shift = top + 1 - bits
    if shift and (words & ((1 << shift) - 1)).any():
        raise DataError(f"{path}: found values with bits below HighBit {top}, BitsStored {bits}; expected none")
    words >>= shift
    values, beyond = words & ((1 << bits) - 1), words >> bits
    if not int(dataset.get("PixelRepresentation") or 0):
        if beyond.any():
            raise DataError(
                f"{path}: found stored values up to {int(words.max())}; expected at most {(1 << bits) - 1}, "
                f"for BitsStored {bits}"
            )
        return values
    negative = values >> (bits - 1)
    extended = beyond == negative * ((1 << (allocated - shift - bits)) - 1)
    bare = dataset.file_meta.TransferSyntaxUID.is_encapsulated and not beyond.any()
    if not (extended.all() or bare):
        raise DataError(
            f"{path}: found stored values up to {int(words.max())} that are not sign-extended; expected signed values "
            f"of BitsStored {bits}, for PixelRepresentation 1"
        )
    return values - (negative << bits)


def _overlay_bits(dataset: Any) -> int:
    """The bits of a stored word that overlay planes use."""
    bits = 0
    for group in range(0x6000, 0x6020, 2):
        position = dataset.get((group, 0x0102))
        if position is not None and (group, 0x3000) not in dataset:  # OverlayData: the plane is stored elsewhere
            bits |= 1 << int(position.value)
    inside = ((1 << int(dataset.BitsStored)) - 1) << (int(dataset.HighBit) + 1 - int(dataset.BitsStored))
    return bits & ~inside


# ---------------------------------------------------------------- a derived file

#: What says something of the old pixels that is not so of the new ones.
_OF_THE_PIXELS = (
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("IconImageSequence", "DigitalSignaturesSequence", "MACParametersSequence", "PixelDataProviderURL"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)


def not_derivable(path: Path) -> str:
    """Why :func:`derived` makes no file of this kind; '' if it does. Raises as :func:`header`."""
    dataset = _dataset(path, stop_before_pixels=True)
    _check(dataset, path)
    lacking = [name for name in ("SOPClassUID", "SOPInstanceUID") if not _text(dataset, name)]
    reasons = {
        f"the file has no {' and no '.join(lacking)}": bool(lacking),
        "the file is in colour": int(dataset.get("SamplesPerPixel", 1)) != 1,
        "its pixels have 1 bit": int(dataset.BitsAllocated) == 1,
        "the file is an enhanced one, with functional groups": "SharedFunctionalGroupsSequence" in dataset,
        "its byte order is the retired big endian": not dataset.file_meta.TransferSyntaxUID.is_little_endian,
    }
    return next((reason for reason, true in reasons.items() if true), "")


def derived(path: Path, gray: np.ndarray, description: str, series: dict[str, str]) -> bytes:
    """What was made of a DICOM image as a DICOM file: a derived image of the same patient, study and kind.

    Bits, PixelRepresentation, PhotometricInterpretation, rescaling, windows and overlays stay as they are, and so do
    pixels that PixelPaddingValue says are none; the values are stored uncompressed. It has a SOPInstanceUID and a
    SeriesInstanceUID of its own, ImageType DERIVED\\SECONDARY, the source in SourceImageSequence, and says in
    DerivationDescription and ContributingEquipmentSequence what was done. LossyImageCompression says 01 where that was
    ever done to the source. What describes the old pixels (least and greatest value, icon, signatures) is left out.

    Args:
        path: the source; :func:`not_derivable` says '' of it.
        gray: (Rows, Columns) in [0, 1], as :func:`medvdm.data.convert.read_gray` gives the source's.
        description: what was done, in ASCII; at most 1,024 characters.
        series: SeriesInstanceUIDs of the derived images by those of their sources. One that is missing is added, so the
            images of a series stay together where the same dict is given.
    """
    from pydicom.dataset import Dataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = _dataset(path)
    before = _words(dataset, path)
    low, high = _type_range(dataset)
    kind = _text(dataset, "PhotometricInterpretation")
    unit = np.clip(np.asarray(gray, np.float64), 0.0, 1.0)
    if (kind == "MONOCHROME1") != (_rescale(dataset, path)[0] < 0):  # each of the two turns the gray scale round
        unit = 1.0 - unit
    words = np.where(_padding(dataset, before), before, np.rint(low + unit * (high - low)).astype(np.int64))

    lossy = _text(dataset, "LossyImageCompression") == "01" or _is_lossy(dataset.file_meta.TransferSyntaxUID)
    for name in _OF_THE_PIXELS:
        if name in dataset:
            del dataset[name]
    for group in range(0x6000, 0x6020, 2):
        if (group, 0x0102) in dataset and (group, 0x3000) not in dataset:  # its bits were beside the pixels'
            for tag in [tag for tag in dataset.keys() if tag.group == group]:
                del dataset[tag]

    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    source.PurposeOfReferenceCodeSequence = [_code("121322", "Source image for image processing operation")]
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment")]
    equipment.Manufacturer, equipment.ContributionDescription = "medvdm", description[:1024]
    now = datetime.now()
    dataset.SourceImageSequence = [source]
    dataset.ContributingEquipmentSequence = [*(dataset.get("ContributingEquipmentSequence") or ()), equipment]
    dataset.DerivationDescription = description[:1024]
    dataset.DerivationCodeSequence = [_code("113087", "Smoothing")]
    dataset.ImageType = ["DERIVED", "SECONDARY", *[str(value) for value in dataset.get("ImageType") or ()][2:]]
    dataset.InstanceCreationDate = dataset.ContentDate = now.strftime("%Y%m%d")
    dataset.InstanceCreationTime = dataset.ContentTime = now.strftime("%H%M%S")
    dataset.SeriesInstanceUID = series.setdefault(_text(dataset, "SeriesInstanceUID"), generate_uid())
    dataset.SeriesNumber = None  # that of the source is taken
    dataset.SeriesDescription = f"{_text(dataset, 'SeriesDescription')[:54]} denoised".strip()
    if lossy:
        dataset.LossyImageCompression = "01"

    number = f"{'i' if low < 0 else 'u'}{int(dataset.BitsAllocated) // 8}"
    bits = int(dataset.BitsStored)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.set_pixel_data(words.astype(f"<{number}"), kind, bits, generate_instance_uid=True)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    file = io.BytesIO()
    dataset.save_as(file, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return file.getvalue()


def _padding(dataset: Any, words: np.ndarray) -> np.ndarray:
    """Where a stored value says that there is no image."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(words.shape, bool)
    ends = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit") or value)))
    return (words >= ends[0]) & (words <= ends[1])


def _code(value: str, meaning: str) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _is_lossy(syntax: Any) -> bool:
    from pydicom.uid import JPEG2000, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless

    return syntax in (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000)
