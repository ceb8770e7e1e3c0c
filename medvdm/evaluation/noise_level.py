r"""How strong the noise of an image is, from the image alone.

The finest diagonal coefficients of a wavelet (Daubechies' second) leave of a smooth surface next to nothing, and of
independent normal noise as much as there was. Their median absolute value over 0.6745 is the deviation, little moved by
edges (Donoho & Johnstone, 1994). This is what ``skimage.restoration.estimate_sigma`` computes of the whole image. Two
things lead it astray in X-rays: texture, which adds to little noise, and the ends of the gray scale, where a file holds
half of the noise or none. So the median is taken of the smoother half of the places whose surroundings have room for
the noise on the gray scale.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage, signal, special

from medvdm.errors import InputError

_HIGH_PASS = np.array([1 - 3**0.5, 3**0.5 - 3, 3 + 3**0.5, -1 - 3**0.5]) / 32**0.5  #: Daubechies' second wavelet
_MEDIAN = special.ndtri(0.75)  #: of the absolute value of a standard normal number
_ROOM = 2.5  #: deviations of the noise that the mean gray value is to be away from black and from white
_LEAST = 0.2  #: of all places are looked at, be there room or not
_ROUNDS = 3
SIDE = 16  #: pixels on a side that are needed


def estimated(image: np.ndarray) -> float:
    """The deviation of the noise of an image (h, w) with gray values on [0, 1]; 0 where it is constant.

    Of noise that is as strong everywhere, and independent from pixel to pixel: what was resized, compressed or filtered
    after the noise came in has less of it at the finest scale, and the answer is too low.

    Raises:
        InputError: an image of fewer than 16 pixels on a side, which has too few places.
    """
    if min(image.shape) < SIDE:
        raise InputError(
            f"noise: {image.shape[1]} x {image.shape[0]} pixels are too few to estimate it; expected "
            f"at least {SIDE} x {SIDE}, or the noise as a number"
        )
    image = image.astype(np.float64)
    diagonal = np.abs(signal.convolve2d(image, np.outer(_HIGH_PASS, _HIGH_PASS), mode="valid"))
    around = ndimage.gaussian_filter(image, 2.0)
    slope = np.hypot(*np.gradient(around))
    around, slope = around[1:-2, 1:-2], slope[1:-2, 1:-2]  # at the centre of the 4 x 4 pixels of a coefficient
    # Where all 4 x 4 pixels are equal, as in a black border, there is no noise to be seen.
    noisy = (ndimage.maximum_filter(image, 4) > ndimage.minimum_filter(image, 4))[2:-1, 2:-1]
    if not noisy.any():
        return 0.0
    diagonal, slope, room = diagonal[noisy], slope[noisy], np.minimum(around, 1.0 - around)[noisy]
    deviation = np.median(diagonal) / _MEDIAN
    for _ in range(_ROUNDS):
        inside = room >= min(_ROOM * deviation, np.quantile(room, 1.0 - _LEAST))
        smooth = slope[inside] <= np.median(slope[inside])
        deviation = np.median(diagonal[inside][smooth]) / _MEDIAN
    return float(deviation)
