"""The Gaussian diffusion against float64 NumPy, a dense joint Gaussian, and itself by other routes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvdm.theory import gaussian

GAMMAS = np.linspace(-30.0, 30.0, 241).astype(np.float32)
PAIRS = [(-13.3, -13.2), (-5.0, 1.0), (-5.0, -4.99), (0.0, 0.01), (2.0, 5.0), (-8.0, 6.0), (9.0, 12.0)]
quick = settings(max_examples=60, deadline=None)
finite = st.floats(-3.0, 3.0, width=32)
pairs = st.tuples(st.floats(-12.0, 8.0, width=32), st.floats(0.015625, 8.0, width=32)).map(
    lambda p: (p[0], p[0] + p[1])
)


def f32(*values):
    return tuple(jnp.asarray(v, jnp.float32) for v in values)


def reference(gamma):
    """alpha and sigma in float64 by the textbook: alpha^2 / sigma^2 = exp(-gamma) and alpha^2 + sigma^2 = 1."""
    gamma = np.asarray(gamma, np.float64)
    return np.sqrt(1 / (1 + np.exp(gamma))), np.sqrt(1 / (1 + np.exp(-gamma)))


def reference_posterior(x, z, gamma_s, gamma_t):
    """q(z_s | z_t, x) by conditioning the joint Gaussian of (z_s, z_t) given x, in float64."""
    (a_s, s_s), (a_t, s_t) = reference(gamma_s), reference(gamma_t)
    cross = a_t / a_s * s_s**2  # cov(z_s, z_t | x), as z_t = (a_t / a_s) z_s + independent noise
    return a_s * x + cross / s_t**2 * (z - a_t * x), s_s**2 - cross**2 / s_t**2


def test_gamma_is_minus_log_snr_so_signal_falls_and_noise_rises_with_it():
    assert np.all(np.diff(gaussian.alpha(jnp.asarray(GAMMAS))) <= 0)
    assert np.all(np.diff(gaussian.sigma(jnp.asarray(GAMMAS))) >= 0)
    gamma = jnp.float32(-5.0)
    assert gaussian.alpha(gamma) > 0.99 and gaussian.sigma(gamma) < 0.09
    np.testing.assert_allclose(gaussian.snr(gamma), np.exp(5.0), rtol=1e-6)
    np.testing.assert_allclose((gaussian.alpha(gamma) / gaussian.sigma(gamma)) ** 2, np.exp(5.0), rtol=1e-6)


def test_alpha_and_sigma_match_float64_from_minus_30_to_30():
    alpha, sigma = reference(GAMMAS)
    np.testing.assert_allclose(gaussian.alpha(jnp.asarray(GAMMAS)), alpha, rtol=2e-6)
    np.testing.assert_allclose(gaussian.sigma(jnp.asarray(GAMMAS)), sigma, rtol=2e-6)
    np.testing.assert_allclose(gaussian.sigma2(jnp.asarray(GAMMAS)), sigma**2, rtol=2e-6)


def test_the_process_preserves_variance():
    gamma = jnp.asarray(GAMMAS)
    np.testing.assert_allclose(gaussian.alpha(gamma) ** 2 + gaussian.sigma(gamma) ** 2, 1.0, atol=3e-7)
    np.testing.assert_allclose(gaussian.alpha(gamma) ** 2 + gaussian.sigma2(gamma), 1.0, atol=3e-7)


def test_diffuse_is_signal_by_alpha_plus_noise_by_sigma():
    x, eps, gamma = f32([2.0, -1.0], [0.5, 3.0], -1.5)
    alpha, sigma = reference(-1.5)
    np.testing.assert_allclose(gaussian.diffuse(x, eps, gamma), alpha * np.array(x) + sigma * np.array(eps), rtol=1e-6)
    mean, variance = gaussian.marginal(x, gamma)
    np.testing.assert_allclose(mean, alpha * np.array(x), rtol=1e-6)
    np.testing.assert_allclose(variance, sigma**2, rtol=1e-6)


@pytest.mark.parametrize(("gamma_s", "gamma_t"), PAIRS)
def test_transition_after_marginal_is_the_later_marginal(gamma_s, gamma_t):
    g_s, g_t, x = f32(gamma_s, gamma_t, 1.7)
    at_s = gaussian.marginal(x, g_s)
    mean, added = gaussian.transition(at_s.mean, g_s, g_t)
    factor = gaussian.transition(jnp.ones(()), g_s, g_t).mean
    at_t = gaussian.marginal(x, g_t)
    np.testing.assert_allclose(mean, at_t.mean, rtol=2e-6)
    np.testing.assert_allclose(factor**2 * at_s.variance + added, at_t.variance, rtol=2e-6)


@pytest.mark.parametrize(("gamma_s", "gamma_t"), PAIRS)
def test_transition_variance_keeps_its_digits_where_the_difference_cancels(gamma_s, gamma_t):
    g_s, g_t = f32(gamma_s, gamma_t)
    gamma_s, gamma_t = float(g_s), float(g_t)  # the float32 numbers, so that only the formula is judged
    expected = -np.expm1(np.logaddexp(0, gamma_s) - np.logaddexp(0, gamma_t))
    # Relative to the inputs' own rounding: an error of one unit in gamma moves the variance by this much.
    conditioning = np.finfo(np.float32).eps * max(1.0, np.logaddexp(0, gamma_t)) / expected
    np.testing.assert_allclose(gaussian.transition(g_s, g_s, g_t).variance, expected, rtol=2e-6 + 4 * conditioning)


@quick
@given(pairs, finite, finite)
def test_posterior_is_bayes_rule_on_the_joint_gaussian(gammas, x, z):
    g_s, g_t, x32, z32 = f32(*gammas, x, z)
    mean, variance = gaussian.posterior(x32, z32, g_s, g_t)
    expected_mean, expected_variance = reference_posterior(x, z, float(g_s), float(g_t))
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(variance, expected_variance, rtol=2e-4, atol=1e-12)


def test_posterior_agrees_with_a_dense_joint_gaussian_of_a_whole_trajectory():
    gammas = np.array([-4.0, -2.5, -0.5, 1.0, 3.0], np.float32)
    alpha, sigma = reference(gammas)
    n = len(gammas)
    # Covariance of (z_1, ..., z_n) given x, from the Markov chain z_t = a z_s + sqrt(v) w, as a linear map of noises.
    noise_map = np.zeros((n, n))
    noise_map[0, 0] = sigma[0]
    for t in range(1, n):
        ratio = alpha[t] / alpha[t - 1]
        noise_map[t] = ratio * noise_map[t - 1]
        noise_map[t, t] = np.sqrt(sigma[t] ** 2 - ratio**2 * sigma[t - 1] ** 2)
    covariance = noise_map @ noise_map.T
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal(), rng.standard_normal(n)
    for s in range(n - 1):
        # Given all later states, not only the next: the chain is Markov, so the answer is the same.
        later = slice(s + 1, n)
        gain = np.linalg.solve(covariance[later, later], covariance[later, s])
        expected_mean = alpha[s] * x + gain @ (z[later] - alpha[later] * x)
        expected_variance = covariance[s, s] - gain @ covariance[later, s]
        mean, variance = gaussian.posterior(*f32(x, z[s + 1], gammas[s], gammas[s + 1]))
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, expected_variance, rtol=1e-5)


@pytest.mark.parametrize(("gamma_s", "gamma_t"), PAIRS)
def test_posterior_averaged_over_z_t_is_the_earlier_marginal(gamma_s, gamma_t):
    g_s, g_t, x = f32(gamma_s, gamma_t, -1.3)
    at_t, at_s = gaussian.marginal(x, g_t), gaussian.marginal(x, g_s)
    mean, variance = gaussian.posterior(x, at_t.mean, g_s, g_t)
    zero, one = jnp.zeros(()), jnp.ones(())
    gain = gaussian.posterior(zero, one, g_s, g_t).mean
    np.testing.assert_allclose(mean, at_s.mean, rtol=1e-5)
    np.testing.assert_allclose(gain**2 * at_t.variance + variance, at_s.variance, rtol=1e-4)


@quick
@given(pairs, finite, finite)
def test_posterior_from_eps_is_the_posterior_at_x_hat(gammas, x_hat, z):
    g_s, g_t, x_hat, z = f32(*gammas, x_hat, z)
    direct = gaussian.posterior(x_hat, z, g_s, g_t)
    by_eps = gaussian.posterior_from_eps(gaussian.eps_from_x(x_hat, z, g_t), z, g_s, g_t)
    # Rounding in z - alpha x is amplified by alpha_s / alpha_t.
    amplified = 1e-6 * max(1.0, float(jnp.exp(0.5 * (jax.nn.softplus(g_t) - jax.nn.softplus(g_s)))))
    np.testing.assert_allclose(by_eps.mean, direct.mean, rtol=1e-5, atol=20 * amplified)
    np.testing.assert_allclose(by_eps.variance, direct.variance, rtol=1e-6)


@quick
@given(st.floats(-10.0, 8.0, width=32), finite, finite)
def test_eps_x_and_v_are_one_statement_in_three_unknowns(gamma, x, eps):
    alpha, sigma = reference(gamma)
    gamma, x, eps = f32(gamma, x, eps)
    z = gaussian.diffuse(x, eps, gamma)
    v = gaussian.v_from_eps(eps, z, gamma)
    tolerance = 4e-6 / min(alpha, sigma)
    np.testing.assert_allclose(gaussian.x_from_eps(eps, z, gamma), x, atol=tolerance)
    np.testing.assert_allclose(gaussian.eps_from_x(x, z, gamma), eps, atol=tolerance)
    np.testing.assert_allclose(v, alpha * float(eps) - sigma * float(x), atol=tolerance)
    np.testing.assert_allclose(gaussian.eps_from_v(v, z, gamma), eps, atol=tolerance)
    np.testing.assert_allclose(gaussian.x_from_v(v, z, gamma), x, atol=2 * tolerance)


def test_extreme_gammas_stay_finite_in_value_and_gradient():
    gamma = jnp.asarray([-80.0, -40.0, 40.0, 80.0], jnp.float32)
    for function in (gaussian.alpha, gaussian.sigma, gaussian.sigma2):
        value, slope = jax.jvp(function, (gamma,), (jnp.ones_like(gamma),))
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
    later = gamma + 0.5
    for normal in (gaussian.transition(gamma, gamma, later), gaussian.posterior_from_eps(gamma, gamma, gamma, later)):
        assert np.all(np.isfinite(normal.mean)) and np.all(np.isfinite(normal.variance))
        assert np.all(normal.variance >= 0)
    variance = gaussian.posterior(gamma, gamma, gamma, later).variance
    np.testing.assert_allclose(variance, reference(gamma)[1] ** 2 * -np.expm1(-0.5), rtol=1e-5)


NEAR_AND_FAR = [
    *((g, g + step) for g in (-30.0, -12.0, -5.0, -0.3, 0.0, 1.0, 5.0, 12.0, 30.0) for step in (3e-4, 1e-2, 1.0)),
    *((-33.0, 33.0), (-33.0, 0.0), (0.0, 33.0), (-5.0, 25.0), (-20.0, 11.0)),
]


@pytest.mark.parametrize(("gamma_s", "gamma_t"), NEAR_AND_FAR)
def test_every_variance_and_mean_keeps_its_digits_for_near_and_far_gammas(gamma_s, gamma_t):
    """Against float64 at the very float32 numbers, where differences of the two gammas are exact."""
    g_s, g_t = f32(gamma_s, gamma_t)
    s, t = float(g_s), float(g_t)
    softplus = lambda v: np.logaddexp(0.0, v)  # noqa: E731
    c = -np.expm1(s - t)  # sigma_{t|s}^2 / sigma_t^2
    variance = np.exp(-softplus(-t)) * c
    ratio = np.exp(0.5 * (softplus(t) - softplus(s)))  # alpha_s / alpha_t
    x, z, eps = 0.8, -1.3, 0.4
    mean, added = gaussian.transition(jnp.float32(z), g_s, g_t)
    assert float(added) == pytest.approx(variance, rel=5e-7)
    assert float(mean) == pytest.approx(z / ratio, rel=5e-6)
    mean, left = gaussian.posterior(jnp.float32(x), jnp.float32(z), g_s, g_t)
    assert float(left) == pytest.approx(np.exp(-softplus(-s)) * c, rel=5e-7)
    of_z, of_x = np.exp(s - t) * ratio, c * np.exp(-0.5 * softplus(s))
    assert float(mean) == pytest.approx(of_z * z + of_x * x, rel=5e-6, abs=5e-6 * (of_z + of_x))
    # z alone, whose weight is small where the gammas are far apart
    assert float(gaussian.posterior(jnp.float32(0), jnp.float32(z), g_s, g_t).mean) == pytest.approx(of_z * z, rel=5e-6)
    mean, left = gaussian.posterior_from_eps(jnp.float32(eps), jnp.float32(0), g_s, g_t)
    assert float(left) == pytest.approx(np.exp(-softplus(-s)) * c, rel=5e-7)
    assert float(mean) == pytest.approx(-ratio * c * np.exp(-0.5 * softplus(-t)) * eps, rel=5e-6)


def test_align_gives_one_value_per_example_room_for_every_axis_of_z():
    values = jnp.asarray([1.0, 2.0])
    for shape in ((2,), (2, 3), (2, 3, 4, 5)):
        z = jnp.ones(shape)
        scaled = gaussian.align(values, z) * z
        assert scaled.shape == shape
        np.testing.assert_array_equal(scaled.reshape(2, -1), values[:, None] * np.ones((2, z[0].size)))
    assert gaussian.align(values[:1], jnp.ones((2, 3))).shape == (1, 1)
