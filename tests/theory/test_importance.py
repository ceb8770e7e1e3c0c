"""Weights of whole paths, and importance-weighted bounds, against closed forms (tests/oracle.py)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.errors import InputError
from medvdm.theory import bound, importance
from medvdm.theory.schedules import FixedLinear

ENDS = (-5.0, 5.0)
X = np.array([[0.6, -1.1]], np.float32)
N = 40_000
weights_of = jax.jit(importance.chain_log_weight, static_argnums=0)


def drawn(model, x, steps, n=N):
    """Log weights of n paths of one x, float64."""
    many = jnp.repeat(jnp.asarray(x), n, axis=0)
    return np.asarray(weights_of(model, many, key=jax.random.key(1), steps=steps), np.float64)


def mean_and_error(values):
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def test_the_mean_log_weight_is_the_bound_in_discrete_time():
    """Of a denoiser that takes the data for wider than they are, so that the bound is far from tight."""
    model = oracle.Isotropic(1.0, FixedLinear(*ENDS), timesteps=5)
    found, error = mean_and_error(-drawn(model, X, 5))
    many = jnp.repeat(jnp.asarray(X), N, axis=0)
    terms = jax.jit(lambda x: bound.terms(model, x, key=jax.random.key(2), stratified=False).total)(many)
    expected, other = mean_and_error(np.asarray(terms, np.float64))
    assert math.hypot(error, other) < 0.02 * expected
    assert found == pytest.approx(expected, abs=4.5 * math.hypot(error, other))


def test_the_mean_weight_is_the_density_under_the_chain():
    """The chain of an exact denoiser makes normal z_0 of a known variance, and the decoder normal x of them."""
    s, steps = 0.7, 6
    found = drawn(oracle.Isotropic(s, FixedLinear(*ENDS)), X, steps)
    v = oracle.isotropic_chain_variance(s, np.linspace(*ENDS, steps + 1))
    r2 = math.exp(ENDS[0])
    shrink = s**2 / (s**2 + r2)
    variance = shrink**2 * v * (1 + r2) + shrink * r2  # 1 / alpha_0^2 = 1 + r^2
    exact = -0.5 * float(np.sum(X.astype(np.float64) ** 2 / variance + math.log(2 * math.pi * variance)))
    ratio, error = mean_and_error(np.exp(found - exact))
    assert error < 0.05
    assert ratio == pytest.approx(1.0, abs=4.5 * error)
    assert -found.mean() > -exact + 0.1, "the bound with one draw is not tight"
    bounds = [importance.bound_of(found[:, None], k)[0][0] for k in (1, 10, 1000)]
    assert bounds[0] > bounds[1] > bounds[2] > -exact - 0.01


def test_with_many_steps_every_path_of_an_exact_model_has_the_density_of_x():
    model = oracle.OnImages(0.7, FixedLinear(-5.0, 9.0))
    x = np.array([0.6, -1.1, 0.1, 0.3], np.float32).reshape(1, 2, 2, 1)
    exact = -0.5 * float(np.sum(x.astype(np.float64) ** 2 / 0.49 + math.log(2 * math.pi * 0.49)))
    spread = {}
    for steps in (50, 800):
        found = drawn(model, x, steps, n=50)
        spread[steps] = math.sqrt(np.mean((found - exact) ** 2))
    assert spread[800] < 0.4 * spread[50], "as one over the root of the steps"


def test_a_bound_of_k_draws_is_the_mean_over_groups_of_k():
    log_weights = np.random.default_rng(3).normal(-2000.0, 5.0, (13, 4))
    nats, stderr = importance.bound_of(log_weights, 4)
    groups = [2000.0 - np.log(np.mean(np.exp(log_weights[i : i + 4] + 2000), axis=0)) for i in (0, 4, 8)]
    np.testing.assert_allclose(nats, np.mean(groups, axis=0), rtol=1e-12)
    np.testing.assert_allclose(stderr, np.std(groups, axis=0, ddof=1) / math.sqrt(3), rtol=1e-6)
    one, _ = importance.bound_of(log_weights, 1)
    np.testing.assert_allclose(one, -log_weights.mean(axis=0), rtol=1e-12)
    nats, stderr = importance.bound_of(log_weights, 13)
    assert np.isnan(stderr).all() and (nats < one).all()


@pytest.mark.parametrize("k", [0, 14])
def test_more_draws_than_there_are_is_refused(k):
    with pytest.raises(InputError, match=f"k: {k}; expected 1 to 13, the number of draws"):
        importance.bound_of(np.zeros((13, 2)), k)
