"""What an image file holds, before it becomes gray in [0, 1]: its header, and its stored values with their range."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvdm.errors import DataError

MAX_PIXELS = 1 << 26  # 67 million; a chest X-ray has 1 to 20 million. More is a mistake or a decompression bomb

Window = tuple[float, float]


class NoImageError(DataError):
    """A DICOM file that holds no picture, such as a report or a presentation state."""


@dataclass(frozen=True)
class Header:
    """What a file's header says.

    Attributes:
        height: rows, as they will be read.
        width: columns, as they will be read.
        is_uint8: whether :func:`medvdm.data.convert.read_gray` gives uint8.
        unit: kind of stored values, such as '16 bits' or 'DICOM, 12 bits, slope 1, intercept 0'. One window has one
            meaning for files with the same first word only.
        remarks: what a reader of the model card should know about this file; files with the same are counted.
        patient: PatientID of a DICOM file, '' where it states none; None for other files.
        issuer: IssuerOfPatientID of a DICOM file, or ''.
    """

    height: int
    width: int
    is_uint8: bool
    unit: str = "8 bits"
    remarks: tuple[str, ...] = ()
    patient: str | None = None
    issuer: str = ""


@dataclass(frozen=True)
class Stored:
    """The gray values of one file in its own units (a CT's are Hounsfield units).

    Attributes:
        values: (H, W), finite; uint8 if that is what the file holds.
        low: least value that the file could hold; None if the file states no range.
        high: greatest value that the file could hold; None if the file states no range.
        inverted: whether large values are dark.
        bits: of a value in the file; 32 for a float.
    """

    values: np.ndarray
    low: float | None
    high: float | None
    inverted: bool = False
    bits: int = 8

    def gray(self, name: str, window: Window | None = None) -> np.ndarray:
        """(H, W), bright is large: (value - low) / (high - low), as float32 in [0, 1], or the bytes themselves.

        Args:
            name: what an error calls the file.
            window: low and high, instead of the file's own; values beyond are clipped.

        Raises:
            DataError: no window, and the file states no range or values lie outside the range that it states.
        """
        if window is None:
            if self.values.dtype == np.uint8 and (self.low, self.high, self.inverted) == (0, 255, False):
                return self.values
            if self.low is None or self.high is None:
                raise DataError(
                    f"{name}: found integers without a known range; expected 1 to 16 bits, float in [0, 1], or a window"
                )
            low, high = self.low, self.high
            least, most = float(self.values.min()), float(self.values.max())
            if least < low or most > high:
                raise DataError(f"{name}: found values from {least:g} to {most:g}; expected [{low:g}, {high:g}]")
        else:
            low, high = window
        unit = (self.values.astype(np.float64) - low) / (high - low)
        unit = np.clip(unit, 0.0, 1.0).astype(np.float32)
        return np.float32(1.0) - unit if self.inverted else unit

    def used(self) -> Window | None:
        """Least and greatest value as fractions of the range that the file could hold; None without a range."""
        if self.low is None or self.high is None:
            return None
        span = self.high - self.low
        return (float(self.values.min()) - self.low) / span, (float(self.values.max()) - self.low) / span
