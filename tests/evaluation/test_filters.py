"""Classical filters: what each does to noise, steps and constants; closed forms where there are any."""

import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medvdm.errors import InputError, MissingPackageError
from medvdm.evaluation.filters import FILTERS, perona_malik

SIZE, NOISE = 64, 0.1
FREE = [name for name in FILTERS if name != "bm3d"]  # bm3d is not installed with the tests


@pytest.fixture(scope="module")
def truth():
    """A bright square in a dark image: edges, corners and flat parts."""
    x = np.full((SIZE, SIZE), 0.25)
    x[16:48, 16:48] = 0.75
    return x


@pytest.fixture(scope="module")
def noisy(truth):
    return truth + np.random.default_rng(0).normal(0, NOISE, truth.shape)


def error(a, b):
    return np.sqrt(np.mean((a - b) ** 2))


@pytest.mark.parametrize("name", FREE)
def test_the_best_strength_is_nearer_to_the_truth_than_the_noisy_image_and_inside_the_grid(name, noisy, truth):
    one = FILTERS[name]
    errors = [error(one(noisy, NOISE, s), truth) for s in one.strengths]
    assert min(errors) < 0.55 * error(noisy, truth)
    assert list(one.strengths) == sorted(set(one.strengths))


@pytest.mark.parametrize("name", FREE)
def test_a_constant_stays_and_no_value_leaves_the_gray_scale(name, noisy):
    one = FILTERS[name]
    strength = one.strengths[1]
    np.testing.assert_allclose(one(np.full((32, 40), 0.4), NOISE, strength), 0.4, atol=1e-6)
    wild = one(4 * noisy - 1.5, 4 * NOISE, strength)
    assert wild.shape == noisy.shape and wild.min() >= 0 and wild.max() <= 1


@pytest.mark.parametrize("name", FREE)
def test_strengths_are_in_units_of_the_noise(name, noisy):
    """Half the contrast with half the noise gives half of the answer: one grid serves every noise."""
    one = FILTERS[name]
    strength = one.strengths[1]
    plain = one.of(noisy, NOISE, strength)
    np.testing.assert_allclose(one.of(0.5 * noisy, 0.5 * NOISE, strength), 0.5 * plain, atol=2e-3)


@pytest.mark.parametrize("side", [20, 32])
def test_bilateral_without_contrast_is_a_gaussian(side):
    """Where all gray values are alike only distances count, up to six pixels away: three deviations of the window."""
    rng = np.random.default_rng(3)
    x = rng.normal(0.5, 1e-4, (side, side))
    got = FILTERS["bilateral"].of(x, 1.0, 4.0)
    np.testing.assert_allclose(got, gaussian_filter(x, 2.0, radius=6, mode="reflect"), atol=1e-9)


def test_perona_malik_without_edges_is_the_heat_equation():
    """Differences far below kappa flow as in u_t = u_xx: a cosine of frequency w falls as exp(-w^2 t), by the steps'
    own symbol 1 - dt (2 - 2 cos w)."""
    k, time = 6, 4.0
    angle = np.pi * k * (np.arange(SIZE) + 0.5) / SIZE  # crests at the border, through which nothing flows
    wave = np.broadcast_to(0.5 + 1e-4 * np.cos(angle), (SIZE, SIZE))
    got = perona_malik(wave, 1.0, time)
    symbol = (1 - 0.2 * (2 - 2 * np.cos(np.pi * k / SIZE))) ** 20
    np.testing.assert_allclose(got - 0.5, symbol * (wave - 0.5), atol=1e-10)
    assert symbol == pytest.approx(np.exp(-((np.pi * k / SIZE) ** 2) * time), rel=0.01)


def test_perona_malik_blurs_noise_and_keeps_a_step_that_the_heat_equation_does_not(noisy, truth):
    time = 3.2
    kept, heat = perona_malik(noisy, NOISE / 2, time), gaussian_filter(noisy, np.sqrt(2 * time))
    inside = np.s_[22:42, 22:42]
    assert kept[inside].std() < 0.5 * noisy[inside].std()
    height = [np.mean(x[22:42, 17] - x[22:42, 14]) for x in (kept, heat)]
    assert height[0] > 0.9 * 0.5 > 1.5 * height[1]


def test_perona_malik_moves_gray_values_and_makes_none(noisy):
    """Nothing flows through the border, and each step is a mean of neighbours: the sum stays, and no extreme grows."""
    got = perona_malik(noisy, NOISE, 2.0)
    assert got.mean() == pytest.approx(noisy.mean(), abs=1e-12)
    assert noisy.min() <= got.min() and got.max() <= noisy.max()


@pytest.mark.parametrize("name, package", [("bm3d", "bm3d"), ("wavelet", "PyWavelets")])
def test_a_missing_package_is_named(name, package, noisy, monkeypatch):
    for module in ("bm3d", "pywt"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"^{name}: the package {package} is not installed; pip install "):
        FILTERS[name](noisy, NOISE, 1.0)


@pytest.mark.parametrize(
    "image, noise, strength, message",
    [
        (np.zeros((2, 8, 8)), 0.1, 1.0, r"^image: shape \(2, 8, 8\); expected a finite one \(h, w\)$"),
        (np.full((8, 8), np.nan), 0.1, 1.0, r"^image: shape \(8, 8\); expected a finite one"),
        (np.zeros((8, 8)), 0.0, 1.0, r"^noise: 0; expected a number above 0$"),
        (np.zeros((8, 8)), 0.1, -1.0, r"^strength: -1; expected a number above 0$"),
    ],
)
def test_bad_input_in_one_line(image, noise, strength, message):
    with pytest.raises(InputError, match=message):
        FILTERS["gaussian"](image, noise, strength)
