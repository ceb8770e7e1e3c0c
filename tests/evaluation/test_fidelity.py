"""Fidelity against scikit-image, closed forms, and edges whose place is known."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medvdm.data.phantom import render
from medvdm.errors import InputError
from medvdm.evaluation import fidelity

SIZE = 64


@pytest.fixture(scope="module")
def truth():
    return render(np.arange(3), size=SIZE, seed=1)[0]


@pytest.fixture(scope="module")
def noisy(truth):
    return truth + np.random.default_rng(0).normal(0, 0.1, truth.shape).astype(np.float32)


def coordinates(size=SIZE):
    """Pixel centres, down and across, with 0 in the middle."""
    return np.mgrid[:size, :size] - (size - 1) / 2


def step(distance, width=1.2):
    """One image, from 0.2 to 0.8 across distance 0: its steepest place is exactly there."""
    return (0.2 + 0.6 * ndtr(distance / width))[None, ..., None]


def edge(shift=0.0, angle=0.0, width=1.2):
    """A straight edge through the middle, its normal at this angle to the rows, moved along the normal."""
    down, across = coordinates()
    return step(np.cos(angle) * across + np.sin(angle) * down - shift, width)


# --- Gray values and structure ------------------------------------------------------------------------------------


def test_gray_values_and_structure_are_those_of_scikit_image(truth, noisy):
    psnr, ssim = fidelity.psnr(noisy, truth), fidelity.ssim(noisy, truth)
    for i in range(len(truth)):
        a, b = noisy[i, ..., 0], truth[i, ..., 0]
        assert psnr[i] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), rel=1e-6)
        same = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        assert ssim[i] == pytest.approx(structural_similarity(b, a, **same), abs=1e-4)


def test_a_constant_error_of_a_tenth_is_20_decibels(truth):
    np.testing.assert_allclose(fidelity.psnr(truth + 0.1, truth), 20.0, rtol=1e-5)
    assert np.isinf(fidelity.psnr(truth, truth)).all()


def test_equal_images_are_perfect(truth):
    np.testing.assert_allclose(fidelity.ssim(truth, truth), 1.0, rtol=1e-6)
    np.testing.assert_allclose(fidelity.gradient_correlation(truth, truth), 1.0, rtol=1e-9)
    assert (fidelity.edge_displacement(truth, truth) == 0).all()


# --- Gradients ----------------------------------------------------------------------------------------------------


def test_gradient_correlation_does_not_know_contrast_but_sign_and_direction():
    """Cosines that end at their crests stay what they are under a filter that reflects at the border."""
    down, across = (coordinates() + SIZE / 2) * (8 * np.pi / SIZE)
    wave, other = np.cos(across)[None, ..., None], np.cos(down)[None, ..., None]
    of = fidelity.gradient_correlation
    assert of(0.5 + 0.2 * wave, wave)[0] == pytest.approx(1.0, abs=1e-6)
    assert of(-wave, wave)[0] == pytest.approx(-1.0, abs=1e-6)
    assert of(other, wave)[0] == pytest.approx(0.0, abs=1e-6)
    assert of(wave + other, wave)[0] == pytest.approx(0.5**0.5, abs=1e-6)
    assert of(np.zeros_like(wave), wave)[0] == 0.0


def test_noise_lowers_the_gradients_correlation_as_its_share_of_their_variance(noisy, truth):
    """Independent noise n: the correlation is sqrt(V / (V + V_n)), V_n = S^2 / (8 pi sigma^4) for each component."""
    rng = np.random.default_rng(1)
    x = gaussian_filter(rng.normal(size=(1, 256, 256, 1)), (0, 3, 3, 0)) * 3
    deviation = 0.1
    y = x + rng.normal(0, deviation, x.shape)
    variance = np.mean([np.var(g) for g in fidelity._gradient(x)])
    expected = np.sqrt(variance / (variance + deviation**2 / (8 * np.pi)))
    # About 256^2 / (4 pi) independent pixels of smoothed noise, two components.
    stderr = (1 - expected**2) / np.sqrt(2 * 256**2 / (4 * np.pi))
    assert fidelity.gradient_correlation(y, x)[0] == pytest.approx(expected, abs=4 * stderr)


# --- Edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4, np.pi / 2, 2.5, -1.9])
@pytest.mark.parametrize("shift", [0.0, 0.25, 1.0, -2.3])
def test_a_moved_edge_is_found_where_it_is(angle, shift):
    moved = fidelity.edge_displacement(edge(shift, angle), edge(0.0, angle))[0]
    assert moved == pytest.approx(abs(shift), abs=0.02)


def test_one_pixel_across_moves_a_disc_by_its_cosine():
    """Of a disc, the edge at angle a moves by |cos a| along its normal, whose mean square is one half."""
    down, across = coordinates()

    def disc(shift):
        return step(20 - np.hypot(down, across - shift))

    assert fidelity.edge_displacement(disc(1.0), disc(0.0))[0] == pytest.approx(0.5**0.5, abs=0.03)


@pytest.mark.parametrize("change", ["blurred", "fainter", "brighter"])
def test_what_does_not_move_an_edge_has_no_displacement(change):
    x = edge(angle=0.4)
    blurred = gaussian_filter(x, (0, 2, 2, 0), mode="nearest")
    y = {"blurred": blurred, "fainter": 0.5 + 0.1 * x, "brighter": x + 0.15}[change]
    # The blur bends the edge where it meets the border of the picture; the rest is exact.
    mask = np.zeros(x.shape[:3], bool)
    mask[:, 12:-12, 12:-12] = True
    assert fidelity.edge_displacement(y, x, mask)[0] == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("lost", ["flat", "too far", "upside down"])
def test_a_lost_edge_counts_as_three_pixels(lost):
    x = edge()
    y = {"flat": np.full_like(x, 0.5), "too far": edge(5.0, width=0.3), "upside down": 1 - x}[lost]
    assert fidelity.edge_displacement(y, x)[0] == pytest.approx(3.0)


def test_noise_moves_edges_the_more_the_stronger_it_is(truth):
    rng = np.random.default_rng(2)
    noise = rng.normal(size=truth.shape)
    moved = [fidelity.edge_displacement(truth + s * noise, truth).mean() for s in (0.01, 0.03, 0.1)]
    assert 0 < moved[0] < moved[1] < moved[2] < 3


def test_only_edges_under_the_mask_count():
    """Two edges, of which the lower has moved by one pixel: either alone, and the mean square of both."""
    x = np.concatenate([edge(), edge()], axis=1)
    y = np.concatenate([edge(), edge(1.0)], axis=1)
    upper = np.zeros(x.shape[:3], bool)
    upper[:, : SIZE - 8] = True
    lower = np.zeros_like(upper)
    lower[:, SIZE + 8 :] = True
    of = fidelity.edge_displacement
    assert of(y, x, upper)[0] == pytest.approx(0.0, abs=0.01)
    assert of(y, x, lower)[0] == pytest.approx(1.0, abs=0.02)
    assert of(y, x, upper | lower)[0] == pytest.approx(0.5**0.5, abs=0.02)
    assert np.isnan(of(y, x, np.zeros_like(upper))[0])


def test_channels_and_images_are_kept_apart():
    """Two images of two channels: each has its own value; an image's is over the edges of both channels."""
    x = np.concatenate([np.concatenate([edge(), edge()], axis=3)] * 2)
    y = np.concatenate([np.concatenate([edge(), edge(1.0)], axis=3), np.concatenate([edge(2.0)] * 2, axis=3)])
    np.testing.assert_allclose(fidelity.edge_displacement(y, x), [0.5**0.5, 2.0], atol=0.02)
    assert fidelity.psnr(y, x).shape == fidelity.ssim(y, x).shape == fidelity.gradient_correlation(y, x).shape == (2,)


# --- Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of", [fidelity.psnr, fidelity.ssim, fidelity.gradient_correlation, fidelity.edge_displacement]
)
def test_images_that_do_not_fit_are_refused_in_one_line(of, truth):
    with pytest.raises(InputError, match=r"restored: shape \(2, 64, 64, 1\); expected that of the truth, \(3, "):
        of(truth[:2], truth)
    with pytest.raises(InputError, match=r"restored: shape .* expected finite images"):
        of(np.full_like(truth, np.nan), truth)


def test_what_cannot_be_measured_is_refused_in_one_line(truth):
    with pytest.raises(InputError, match=r"truth: images of 8x64 pixels; expected at least 11x11"):
        fidelity.ssim(truth[:, :8], truth[:, :8])
    with pytest.raises(InputError, match=r"truth: image 1 is constant; expected one with a gradient"):
        fidelity.gradient_correlation(truth, truth * np.array([1, 0, 1]).reshape(-1, 1, 1, 1))
    with pytest.raises(InputError, match=r"mask: bool of shape \(64, 64\); expected bool of shape \(3, 64, 64\)"):
        fidelity.edge_displacement(truth, truth, np.ones((64, 64), bool))
    with pytest.raises(InputError, match=r"mask: float64 of shape \(3, 64, 64\); expected bool"):
        fidelity.edge_displacement(truth, truth, np.ones((3, 64, 64)))
