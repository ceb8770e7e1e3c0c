"""The observation model: cross-entropy of gray targets, summed over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvdm.errors import InputError, InputTypeError
from medvdm.models import likelihoods


def random_images(shape=(3, 4, 5, 2)):
    rng = np.random.default_rng(0)
    return rng.random(shape).astype(np.float32), 3 * rng.standard_normal(shape).astype(np.float32)


def test_nll_is_the_sum_over_pixels_of_the_cross_entropy():
    x, logits = random_images()
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -(x * np.log(p) + (1 - x) * np.log1p(-p)).reshape(3, -1).sum(axis=1)
    nll = likelihoods.bernoulli_nll(jnp.asarray(x), jnp.asarray(logits))
    assert nll.shape == (3,)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_nll_of_a_coin_is_ln_2_a_pixel_whatever_the_image():
    for shape in [(2, 3, 4, 1), (2, 28, 28, 3), (2, 7)]:
        nll = likelihoods.bernoulli_nll(jnp.full(shape, 0.3), jnp.zeros(shape))
        np.testing.assert_allclose(nll, np.prod(shape[1:]) * np.log(2), rtol=1e-5)


def test_nll_is_never_below_its_floor_and_meets_it_at_the_target():
    x, logits = (jnp.asarray(a) for a in random_images())
    floor = likelihoods.bernoulli_floor(x)
    assert np.all(likelihoods.bernoulli_nll(x, logits) > floor)
    np.testing.assert_allclose(likelihoods.bernoulli_nll(x, jax.scipy.special.logit(x)), floor, rtol=1e-5)
    gradient = jax.grad(lambda logit: likelihoods.bernoulli_nll(x, logit).sum())(jax.scipy.special.logit(x))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_floor_is_zero_for_black_and_white_and_ln_2_for_gray():
    black_and_white = jnp.asarray([[[0.0, 1.0, 1.0]]])
    np.testing.assert_array_equal(likelihoods.bernoulli_floor(black_and_white), 0.0)
    np.testing.assert_allclose(likelihoods.bernoulli_floor(jnp.full((2, 3, 1), 0.5)), 3 * np.log(2), rtol=1e-6)


def test_extreme_logits_stay_finite():
    x = jnp.asarray([[0.0, 1.0, 0.25]])
    for size in (100.0, 1e4):
        nll = likelihoods.bernoulli_nll(x, jnp.full((1, 3), size))
        np.testing.assert_allclose(nll, [size + 0.75 * size], rtol=1e-6)


def test_mean_is_the_probability_in_the_unit_interval():
    np.testing.assert_allclose(likelihoods.bernoulli_mean(jnp.asarray([0.0, 1.0, -200.0])), [0.5, 0.7310586, 0.0])


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integer_images_are_refused(unchecked, dtype):
    with pytest.raises(InputTypeError, match="expected float") as refusal:
        likelihoods.bernoulli_nll(jnp.ones((2, 3), dtype), jnp.zeros((2, 3)))
    assert isinstance(refusal.value, TypeError)


@pytest.mark.parametrize("values", [[0.0, 255.0], [-0.01, 0.5], [float("nan"), 0.5], [0.5, float("inf")]])
def test_values_outside_the_unit_interval_are_refused_where_they_are_known(values):
    x = jnp.asarray([values])
    for call in (lambda: likelihoods.bernoulli_nll(x, jnp.zeros((1, 2))), lambda: likelihoods.bernoulli_floor(x)):
        with pytest.raises(InputError, match=r"^images: values from .*; expected \[0, 1\]$"):
            call()
