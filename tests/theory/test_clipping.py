"""Noise at the ends of the gray scale: its mean against draws and an integral, and the way back."""

import numpy as np
import pytest
from scipy import integrate, stats

from medvdm.theory.clipping import clipped_mean, unclipped


@pytest.mark.parametrize("deviation", [0.01, 0.1, 0.5])
def test_the_mean_of_clipped_noise_is_its_integral(deviation):
    x = np.array([0.0, 0.003, 0.2, 0.5, 0.95, 1.0])
    for one, found in zip(x, clipped_mean(x, deviation), strict=True):
        law = stats.norm(one, deviation)
        inside = integrate.quad(lambda y: y * law.pdf(y), 0, 1, points=[one], limit=200)[0]  # noqa: B023
        assert found == pytest.approx(inside + law.sf(1), abs=1e-7)


def test_the_mean_of_draws():
    y = np.clip(0.97 + 0.1 * np.random.default_rng(0).standard_normal(200_000), 0, 1)
    assert clipped_mean(np.array([0.97]), 0.1)[0] == pytest.approx(y.mean(), abs=4 * y.std() / np.sqrt(len(y)))


@pytest.mark.parametrize("deviation", [0.002, 0.1, 0.5])
def test_the_way_back(deviation):
    x = np.linspace(0, 1, 300).reshape(3, 100)
    found = unclipped(clipped_mean(x, deviation), deviation)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, x, atol=2e-5)
    assert unclipped(np.array([-0.1, 0.0, 1.0]), deviation).tolist() == [0, 0, 1]


def test_far_from_the_ends_nothing_changes():
    d = np.linspace(0.35, 0.65, 50)
    np.testing.assert_allclose(unclipped(d, 0.05), d, atol=1e-6)
