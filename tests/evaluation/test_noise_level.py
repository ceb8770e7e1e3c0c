"""The noise of an image, estimated: phantoms with known noise, as floats and as a file would hold them."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from medvdm.data import phantom
from medvdm.errors import InputError
from medvdm.evaluation.noise_level import estimated


@functools.cache
def clear():
    """Phantoms of a chest, (n, 128, 128)."""
    data = phantom.load(num_images=3, image_size=128)
    return np.asarray(data.reader(np.arange(3)), np.float64)[..., 0]


@pytest.mark.parametrize("file", [False, True], ids=["floats", "8 bits"])
@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.2])
def test_known_noise_is_found(noise, file):
    """Within 4 standard errors of a median of 3,000 places or more, which is 1.17 / sqrt(2 n), and 3 % of bias."""
    rng = np.random.default_rng(0)
    for image in clear():
        noisy = image + noise * rng.standard_normal(image.shape)
        if file:
            noisy = np.rint(255 * np.clip(noisy, 0, 1)) / 255
        places = 0.5 * 0.2 * image.size
        # Overlapping coefficients: about a quarter are independent.
        tolerance = 4 * 1.17 / np.sqrt(2 * places / 4) + 0.03
        assert estimated(noisy) == pytest.approx(noise, rel=tolerance)


@pytest.mark.parametrize("gray", [0.0, 0.3, 1.0])
def test_borders_without_noise_do_not_count(gray):
    rng = np.random.default_rng(0)
    noisy = np.full((128, 128), gray)
    noisy[:, 40:100] = 0.5 + 0.05 * rng.standard_normal((128, 60))
    assert estimated(noisy) == pytest.approx(0.05, rel=0.08)


def test_edges_and_slopes_are_no_noise():
    rows, columns = np.mgrid[:128, :128] / 128
    drawn = 0.2 + 0.5 * rows + 0.2 * ((columns > 0.3) & (rows > 0.4))
    assert estimated(drawn) < 1e-3
    assert estimated(drawn + 0.01 * np.random.default_rng(1).standard_normal(drawn.shape)) == pytest.approx(
        0.01, rel=0.1
    )


def test_a_constant_image_has_none():
    assert estimated(np.full((20, 30), 0.4)) == 0.0


def test_noise_beyond_the_gray_scale_of_floats_is_found():
    noisy = 0.5 + 0.6 * np.random.default_rng(0).standard_normal((128, 128))
    assert estimated(noisy) == pytest.approx(0.6, rel=0.15)


def test_too_few_pixels_are_refused():
    with pytest.raises(
        InputError, match="^noise: 40 x 15 pixels are too few to estimate it; expected at least 16 x 16"
    ):
        estimated(np.zeros((15, 40)))
