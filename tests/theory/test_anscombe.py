"""The stabilising transform of low dose: its variance and its inverse, against sums over the counts."""

import numpy as np
import pytest
from scipy import stats

from medvdm.theory.anscombe import stabilised, unstabilised

DOSES = [(0.01, 0.0), (0.01, 0.02), (0.05, 0.01), (0.002, 0.01)]


def moments(x, gain, deviation):
    """Mean and variance of f(y) given x: a sum over the counts, and Gauss-Hermite over the electronic noise."""
    eps, weights = np.polynomial.hermite_e.hermegauss(101)
    counts = np.arange(int(x / gain + 12 * np.sqrt(x / gain) + 30))
    law = stats.poisson.pmf(counts, x / gain)[:, None] * weights / weights.sum()
    f = stabilised(gain * counts[:, None] + deviation * eps, gain, deviation)
    mean = (law * f).sum()
    return mean, (law * (f - mean) ** 2).sum()


@pytest.mark.parametrize(("gain", "deviation"), DOSES)
def test_the_variance_is_one_from_a_few_counts_on(gain, deviation):
    for counts in (4, 10, 30, 100):
        assert moments(counts * gain, gain, deviation)[1] == pytest.approx(1, abs=0.08 if counts == 4 else 0.02)


@pytest.mark.parametrize(("gain", "deviation"), DOSES)
def test_the_inverse_is_unbiased_where_the_algebraic_one_is_not(gain, deviation):
    """In counts: the closed form is within 0.03 of the truth from 1 count on; undoing f's formula misses by 0.2."""
    for counts in (1, 3, 10, 50):
        x = counts * gain
        mean = moments(x, gain, deviation)[0]
        assert unstabilised(np.array([mean]), gain, deviation)[0] / gain == pytest.approx(counts, abs=0.035)
        algebraic = (mean**2 / 4 - 0.375 - (deviation / gain) ** 2) * gain
        assert (x - algebraic) / gain > 0.15


def test_black_is_black_and_what_lies_below_it_too():
    [f0] = stabilised(np.zeros(1), 0.01, 0.0)
    np.testing.assert_allclose(unstabilised(np.array([f0, 0.5 * f0, -3.0]), 0.01, 0.0), 0, atol=1e-12)
    assert stabilised(np.array([-5.0]), 0.01, 0.02) == 0


def test_arrays_keep_their_shape_and_the_inverse_rises():
    d = np.linspace(1.3, 40, 200).reshape(2, 100)
    x = unstabilised(d, 0.02, 0.0)
    assert x.shape == d.shape and (np.diff(x.ravel()) > 0).all()
