"""Draws of a Gaussian x given A x, against the exact conditional law; the operators; replacement as it is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from medvdm.theory import conditional, gaussian, sampling, schedules
from medvdm.theory.bound import Diffusion
from medvdm.theory.conditional import CellMean, Conditional, Mask

SIDE, N = 4, 4096
NO_LABEL = jnp.zeros((1, 1))


def covariance():
    """Of a 4 x 4 image whose pixels are alike where they are near one another."""
    places = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1).reshape(-1, 2)
    return 0.25 * np.exp(-np.linalg.norm(places[:, None] - places[None], axis=-1) / 5.0)


COV = covariance()
X = np.linalg.cholesky(COV) @ np.random.default_rng(0).standard_normal(SIDE**2)  # what is seen in part


class Images(oracle.Mixture):
    """The Gaussian as images (n, 4, 4, 1)."""

    def __init__(self):
        super().__init__([1.0], [np.zeros(SIDE**2)], COV, schedules.FixedLinear(-9.0, 5.0))

    def eps_hat(self, z, condition):
        return super().eps_hat(z.reshape(len(z), -1), condition).reshape(z.shape)


MODEL = Images()
HOLE = np.ones((1, SIDE, SIDE, 1), np.float32)
HOLE[:, 1:3, 1:4] = 0.0
OPERATORS = {"mask": Mask(jnp.asarray(HOLE)), "mean": CellMean(2)}


def matrix(operator):
    """A as a matrix, from what it does to each pixel, without rows of zeros."""
    a = np.asarray(operator(jnp.eye(SIDE**2).reshape(-1, SIDE, SIDE, 1))).reshape(SIDE**2, -1).T
    return a[np.any(a != 0, axis=1)]


def law(operator, noise=0.0):
    """Mean and covariance of x given what was seen of X."""
    a = matrix(operator)
    gain = COV @ a.T @ np.linalg.inv(a @ COV @ a.T + noise**2 * np.eye(len(a)))
    return gain @ a @ X, COV - gain @ a @ COV


def seen(operator):
    return operator(jnp.asarray(X.reshape(1, SIDE, SIDE, 1), jnp.float32))


def noises(seed, numbers):
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (SIDE, SIDE, 1)))(numbers)


@partial(jax.jit, static_argnames=("turns", "solver"))
def drawn(operator, y, noise, numbers, steps, turns=conditional.TURNS, solver="dpmpp"):
    """One draw per number, as (n, 16)."""
    model = Conditional(MODEL, operator, jnp.repeat(y, len(numbers), axis=0), noise, turns=turns)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(2), i))(numbers)
    z = model.start(noises(0, numbers), noises(1, numbers), NO_LABEL)
    z = sampling.chain(model, z, NO_LABEL, keys=keys, steps=steps, first=steps, solver=solver)[-1]
    return model.exact(z / gaussian.alpha(MODEL.gamma(jnp.zeros(())))).reshape(len(numbers), -1)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
def test_draws_have_the_exact_conditional_law_of_a_gaussian(name, noise):
    """In the directions in which x still varies: every mean within 4 standard errors, every variance too, and all
    together as chi-squared. Of replacement the same test fails by far."""
    operator = OPERATORS[name]
    mean, cov = law(operator, noise)
    values, vectors = np.linalg.eigh(cov)
    free = values > 1e-6

    def whitened(turns):
        x = np.asarray(drawn(operator, seen(operator), noise, jnp.arange(N), 40, turns), np.float64)
        return ((x - mean) @ vectors)[:, free] / np.sqrt(values[free])

    z = whitened(conditional.TURNS + 3)
    k = z.shape[1]
    assert k == (SIDE**2 if noise else SIDE**2 - len(matrix(operator)))
    means = z.mean(axis=0) * np.sqrt(N)
    variances = (z.var(axis=0) - 1.0) / np.sqrt(2.0 / N)
    assert np.abs(means).max() < 4.0 and np.abs(variances).max() < 4.5, (means, variances)
    assert stats.chi2.sf(np.sum(means**2), k) > 1e-4
    across = np.cov(z.T)[np.triu_indices(k, 1)] * np.sqrt(N)
    assert np.abs(across).max() < 4.5
    if not noise:
        plain = whitened(0)
        assert (
            max(np.abs(plain.mean(axis=0)).max() * np.sqrt(N), np.abs(plain.var(axis=0) - 1).max() / np.sqrt(2 / N))
            > 10
        )


@pytest.mark.parametrize("turns", [0, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_was_seen_is_kept(name, turns):
    operator = OPERATORS[name]
    x = drawn(operator, seen(operator), 0.0, jnp.arange(3), 3, turns).reshape(-1, SIDE, SIDE, 1)
    np.testing.assert_allclose(operator(x), np.repeat(seen(operator), 3, axis=0), atol=2e-6)


def test_a_draw_does_not_depend_on_its_batch():
    """But for rounding, which can end the solution of a step one turn sooner or later."""
    one = drawn(OPERATORS["mask"], seen(OPERATORS["mask"]), 0.0, jnp.array([5]), 8)
    many = drawn(OPERATORS["mask"], seen(OPERATORS["mask"]), 0.0, jnp.arange(8), 8)
    np.testing.assert_allclose(one[0], many[5], atol=2e-3)
    assert np.abs(np.asarray(many[5] - many[4])).max() > 0.01


@pytest.mark.parametrize("name", OPERATORS)
def test_a_conditional_mean_is_that_of_bayes_rule(name):
    """E[x | z_t, y] by the matrices themselves, at three noise levels."""
    operator, gammas = OPERATORS[name], jnp.array([-4.0, 0.0, 4.0])
    model = Conditional(MODEL, operator, jnp.repeat(seen(operator), 3, axis=0), turns=40)
    z = noises(3, jnp.arange(3))
    found = model.mean(z, gaussian.align(gammas, z), MODEL.condition(gammas, NO_LABEL.repeat(3, axis=0)))
    a = matrix(operator)
    for i, gamma in enumerate(np.asarray(gammas, np.float64)):
        alpha, sigma2 = 1 / np.sqrt(1 + np.exp(gamma)), 1 / (1 + np.exp(-gamma))
        both = np.concatenate([alpha * np.eye(SIDE**2), a])  # z_t and y together, as one observation of x
        error = np.diag(np.r_[np.full(SIDE**2, sigma2), np.zeros(len(a))])
        told = np.r_[np.asarray(z[i], np.float64).ravel(), a @ X]
        expected = COV @ both.T @ np.linalg.solve(both @ COV @ both.T + error, told)
        np.testing.assert_allclose(np.asarray(found[i]).ravel(), expected, atol=0.03 * np.abs(expected).max())


def test_operators_are_linear_with_their_transpose_and_their_pseudo_inverse():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 4, 2)), jnp.float32)
    known = (np.random.default_rng(2).random((2, 6, 4, 2)) < 0.5).astype(np.float32)
    for operator in (Mask(jnp.asarray(known)), CellMean(2)):
        y = operator(x)
        (transposed,) = jax.linear_transpose(operator, x)(y)
        np.testing.assert_allclose(operator.adjoint(y), transposed, rtol=1e-5)
        np.testing.assert_allclose(operator(operator.inverse(y)), y, rtol=1e-5, atol=1e-6)
        shortest = x - operator.inverse(y)  # what A does not see is orthogonal to what it gives back
        assert abs(float(jnp.vdot(shortest, operator.inverse(y)))) < 1e-4 * float(jnp.vdot(x, x))
    np.testing.assert_allclose(CellMean(2)(x)[1, 2, 1], x[1, 4:6, 2:4].mean(axis=(0, 1)), rtol=1e-5)


def test_it_is_a_diffusion_as_the_samplers_want_one():
    model = Conditional(MODEL, OPERATORS["mean"], seen(OPERATORS["mean"]))
    assert isinstance(model, Diffusion)
