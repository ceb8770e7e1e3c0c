"""Arrays of images as pictures: one check of what an image is, and grids of them."""

from __future__ import annotations

import math

import numpy as np

from medvdm.errors import InputError, InputTypeError

# --- Images ------------------------------------------------------------------------------------------------------


def as_unit_float(images: np.ndarray, name: str = "images") -> np.ndarray:
    """Return ``images`` as float32 in [0, 1]: uint8 is divided by 255, float must already be in [0, 1].

    Raises:
        InputTypeError: for any other dtype. A silent cast of [0, 1] images to integers gives black images.
        InputError: for values that are not finite or outside [0, 1].
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255.0)
    if not np.issubdtype(images.dtype, np.floating):
        hint = ""
        if images.dtype.kind in "iu":
            hint = "; divide by the largest value that your source can hold (255, 4095, 65535)"
        raise InputTypeError(f"{name}: dtype {images.dtype}; expected uint8, or float in [0, 1]{hint}")
    if images.size:
        low, high = float(images.min()), float(images.max())
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
            hint = ", as by dividing by 255" if low >= 0.0 and 1.0 < high <= 255.0 else ""
            raise InputError(f"{name}: values from {low:g} to {high:g}; expected [0, 1]{hint}")
    return images.astype(np.float32, copy=False)


def to_levels(images: np.ndarray, name: str = "images") -> np.ndarray:
    """Images as the 256 gray levels of an 8-bit likelihood: uint8 as it is, floats x in [0, 1] as floor(255 x + 1/2).

    Every value that was made as level / 255 gives its level back. The rule is computed without a rounding error of its
    own, so it depends on the float32 value of x alone.

    Raises: as :func:`as_unit_float`.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    scaled = np.multiply(as_unit_float(images, name), 255, dtype=np.float64)  # exact: 24 bits by 8
    return (scaled + 0.5).astype(np.uint8)  # a cast of what is not negative is its floor


def channels_last(images: np.ndarray, name: str = "images") -> np.ndarray:
    """Images as (N, H, W, C) with C = 1 or 3, without guessing which axis is which.

    Args:
        images: (N, H, W), or (N, H, W, C) with 1 (gray) or 3 (RGB) channels.
        name: what an error calls them.

    Raises:
        InputError: any other shape, with the axis that looks like channels; three axes that look like (H, W, C) or
            (H, W, N). Four axes are taken at their word: ``images[..., None]`` says (N, H, W) for certain.
    """
    shape, expected = images.shape, "expected (N, H, W), or (N, H, W, C) with C = 1 or 3"
    if 0 in shape:
        raise InputError(f"{name}: shape {shape}; {expected}, none of them 0")
    if images.ndim == 2:
        raise InputError(f"{name}: shape {shape}; {expected}. One image? images[None]")
    if images.ndim == 3:
        n, height, width = shape
        if width in (1, 3, 4) and height > 4:
            raise InputError(f"{name}: shape {shape}; {expected}. One image (H, W, C)? images[None]")
        if n == height != width and n > 4:
            raise InputError(
                f"{name}: shape {shape}, (N, H, W) or (H, W, N)? {expected}. "
                "np.moveaxis(images, -1, 0) for the second, images[..., None] for the first"
            )
        return images[..., None]
    if images.ndim != 4:
        raise InputError(f"{name}: shape {shape}; {expected}")
    if shape[-1] not in (1, 3):
        axis = next((axis for axis in (1, 2, 0) if shape[axis] in (1, 3)), None)
        remedy = {
            1: "Axis 1 looks like the channels: np.moveaxis(images, 1, -1)",
            2: "Axis 2 looks like the channels of (H, W, C, N): np.moveaxis(images, -1, 0)",
            0: "Axis 0 looks like the channels of (C, N, H, W): np.moveaxis(images, 0, -1)",
            None: "Drop an alpha channel or make gray yourself" if shape[-1] in (2, 4) else "No axis is 1 or 3",
        }[axis]
        raise InputError(f"{name}: shape {shape}; {expected}. {remedy}")
    return images


def as_images(images: np.ndarray, name: str = "images", *, picture: bool = False) -> np.ndarray:
    """Images as float32 of shape (n, h, w, c) in [0, 1].

    Args:
        images: (n, h, w) or (n, h, w, c); uint8, or float in [0, 1].
        name: what an error calls them.
        picture: also ask for 1 (gray) or 3 (RGB) channels.

    Raises:
        InputError: another shape, an empty axis, values that are not finite or outside [0, 1].
        InputTypeError: another dtype.
    """
    images = as_unit_float(images, name)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"{name}: shape {images.shape}; expected (n, h, w) or (n, h, w, c), none of them 0")
    return channels_last(images, name) if picture else images


def default_columns(n: int) -> int:
    """Columns of a grid of n images: close to a square, at least as wide as high, with few empty cells.

    >>> [default_columns(n) for n in (1, 5, 7, 8, 16, 64)]
    [1, 3, 4, 4, 4, 8]
    """
    least = math.isqrt(n - 1) + 1
    return min(range(least, -(-4 * least // 3) + 1), key=lambda c: (-n % c, c))


def tile(images: np.ndarray, columns: int, gap: int, ground: float = 1.0) -> np.ndarray:
    """Put images (n, h, w, c) in rows of ``columns`` on a white ground: (rows h + gaps, columns w + gaps, c).

    The gap in pixels lies between images, not around them.
    """
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), ground, np.float32)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet
