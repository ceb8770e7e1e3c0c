"""The observation models: cross-entropy of gray targets, and the categorical law of 8-bit gray values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from medvdm.errors import InputError, InputTypeError
from medvdm.images import to_levels
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


# Eight bits: everything in units of a level, by float64 NumPy over all 256

X = 2.0 * np.arange(256) / 255 - 1.0
SPACING = 2.0 / 255
ROUNDING = 4e-5  #: of a centre in levels: float32 keeps 1.5e-5 of a number near 255, and it is computed in two steps


def exact_log_probs(centre, deviation):
    """(..., 256) from float32 arrays of one shape."""
    exponents = -((np.asarray(centre, np.float64)[..., None] - X) ** 2) / (2 * np.float64(deviation)[..., None] ** 2)
    return exponents - special.logsumexp(exponents, axis=-1, keepdims=True)


def exact_mean(centre, deviation):
    return np.exp(exact_log_probs(centre, deviation)) @ X


def centres(beyond=3.0):
    """In and between the levels, and outside of them by so many levels, (n,) float32."""
    between = np.linspace(-1.0 - beyond * SPACING, 1.0 + beyond * SPACING, 2001)
    return np.concatenate([X, X[:-1] + SPACING / 2, between]).astype(np.float32)


@pytest.mark.parametrize("deviation", [1e-4, 1e-3, SPACING / 3, SPACING, 0.05, 1.0, 1e3])
def test_the_256_probabilities_sum_to_one_and_are_those_of_the_formula(deviation):
    c = np.concatenate([centres(), np.array([-30.0, -2.0, 1.5, 40.0], np.float32)])
    d = np.full_like(c, deviation)
    found = np.asarray(likelihoods.level_log_probs(jnp.asarray(c), jnp.asarray(d)), np.float64)
    assert found.shape == (len(c), 256) and np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1.0, rtol=0, atol=256 * 2.0**-24)
    # Rounding moves c by a part of itself, and with it the exponents, by (k - n) / d^2 for each level.
    away = np.abs(np.arange(256) - np.clip(np.rint((c + 1) / SPACING), 0, 255)[:, None]) + 1
    moved = ROUNDING * np.maximum(1.0, np.abs(c))[:, None] * away / (d[:, None] / SPACING) ** 2
    expected = exact_log_probs(c, d)
    assert (np.abs(found - expected) <= 2 * moved + 1e-5 + 1e-6 * np.abs(expected)).all()
    shared = likelihoods.level_log_probs(jnp.asarray(c), jnp.float32(deviation))  # one deviation for all
    np.testing.assert_array_equal(shared, found.astype(np.float32))


def draws_of_levels(n=400, seed=0):
    """Gray values, centres not far from them, and deviations from a tenth of a level to the whole range."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, n).astype(np.uint8)
    d = (SPACING * 10 ** rng.uniform(-1, 2.4, n)).astype(np.float32)
    return levels, (X[levels] + d * rng.standard_normal(n)).astype(np.float32), d


def test_the_nll_is_the_sum_of_the_logs_of_the_probabilities_over_the_pixels():
    levels, c, d = draws_of_levels()
    each = -np.take_along_axis(exact_log_probs(c, d), levels[:, None].astype(int), axis=-1)[:, 0]
    for shape in ((5, 8, 5, 2), (400, 1), (1, 400)):
        found = likelihoods.level_nll(*(jnp.asarray(a.reshape(shape)) for a in (levels, c, d)))
        tolerance = (ROUNDING * 5 / (d / SPACING)).reshape(shape[0], -1).sum(axis=1) + 1e-3
        assert found.shape == shape[:1]
        assert (np.abs(found - each.reshape(shape[0], -1).sum(axis=1)) <= tolerance).all()
    gamma_0 = -9.0  # as a model asks for it
    found = likelihoods.EIGHT_BIT.nll(jnp.asarray(levels[:, None]), jnp.asarray(c[:, None]), jnp.float32(gamma_0))
    log_probs = exact_log_probs(c, np.full_like(c, np.exp(gamma_0 / 2)))
    own = np.take_along_axis(log_probs, levels[:, None].astype(int), axis=-1)[:, 0]
    np.testing.assert_allclose(found, -own, rtol=1e-3, atol=1e-3)


def test_gradients_of_the_nll_are_those_of_the_formula():
    """By the centre (E x - x_k) / d^2, and by the deviation (E (c - x)^2 - (c - x_k)^2) / d^3."""
    levels, c, d = draws_of_levels()
    c64, d64, own = c.astype(np.float64), d.astype(np.float64), X[levels]
    probs = np.exp(exact_log_probs(c, d))
    by_c = (probs @ X - own) / d64**2
    by_d = ((probs * (c64[:, None] - X) ** 2).sum(axis=-1) - (c64 - own) ** 2) / d64**3

    def nll(c, d):
        return likelihoods.level_nll(jnp.asarray(levels[:, None]), c, d).sum()

    found = jax.jit(jax.grad(nll, (0, 1)))(jnp.asarray(c[:, None]), jnp.asarray(d[:, None]))
    # Both are some numbers times 1 / d; a centre moved by rounding moves these by about its part of d.
    part = ROUNDING / (d64 / SPACING)
    for gradient, expected in zip(found, (by_c, by_d), strict=True):
        assert (np.abs(gradient[:, 0] - expected) * d64 <= 1e-4 + 40 * part).all()


@pytest.mark.parametrize("deviation", [1e-4, 1e-2, 1e3])
@pytest.mark.parametrize("centre", [-50.0, -1.0, 0.3, 1.0, 50.0])
def test_gradients_stay_finite_far_from_every_gray_value(centre, deviation):
    levels = jnp.asarray([[0], [128], [255]], jnp.uint8)
    c, d = jnp.full((3, 1), centre), jnp.full((3, 1), deviation)
    for f in (
        lambda c, d: likelihoods.level_nll(levels, c, d).sum(),
        lambda c, d: likelihoods.level_mean(c, d).sum(),
    ):
        value, gradients = jax.value_and_grad(f, (0, 1))(c, d)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("relative", [0.02, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_the_mean_of_a_narrow_law_is_that_of_all_256_levels_also_at_black_and_white(relative):
    c = centres()
    d = np.full_like(c, relative * SPACING)
    found = np.asarray(likelihoods.level_mean(jnp.asarray(c), jnp.asarray(d)), np.float64)
    # The mean moves by at most 1 / 4 d^2 levels as the centre moves by one; 2e-5 for what is beyond five neighbours.
    assert np.abs(found - exact_mean(c, d)).max() <= SPACING * (ROUNDING * (1 + 0.25 / relative**2) + 2e-5)
    far = np.asarray([-40.0, -1.5, 1.5, 40.0], np.float32)
    found = likelihoods.level_mean(jnp.asarray(far), jnp.full(4, relative * SPACING, jnp.float32))
    cut = 1.1 * np.exp(-3.5 / relative**2)  # what three levels outside gives the next level
    assert (np.abs(found - np.sign(far)) <= SPACING * cut + 1e-6).all()


@pytest.mark.parametrize("relative", [0.85, 1.0, 1.001, 1.3, 3.0])
def test_the_mean_of_a_wide_law_is_its_centre_within_poissons_sum(relative):
    c = np.linspace(-1 + 10 * relative * SPACING, 1 - 10 * relative * SPACING, 2001).astype(np.float32)
    difference = np.abs(exact_mean(c, np.full_like(c, relative * SPACING)) - c.astype(np.float64))
    bound = 4 * np.pi * relative**2 * np.exp(-2 * np.pi**2 * relative**2)
    assert difference.max() <= SPACING * bound * 1.01 + 1e-14
    assert difference.max() >= SPACING * bound * 0.9 or bound < 1e-12  # and it is no looser than that
    if relative > 1:
        everywhere = jnp.asarray(np.concatenate([c, [-7.0, -1.0, 1.0, 7.0]]), jnp.float32)
        d = jnp.full_like(everywhere, relative * SPACING)
        np.testing.assert_array_equal(likelihoods.level_mean(everywhere, d), everywhere)


def test_the_gradient_of_the_mean_is_the_variance_in_units_of_the_deviation():
    """d E[x] / d c = Var[x] / d^2, for a softmax of quadratic exponents."""
    c = np.concatenate([X[[0, 1, 90, 254, 255]], X[[0, 7, 254]] + 0.3 * SPACING]).astype(np.float32)
    for relative in (0.3, 0.6, 0.95):
        d = np.full_like(c, relative * SPACING)
        probs = np.exp(exact_log_probs(c, d))
        variance = probs @ X**2 - (probs @ X) ** 2
        found = jax.grad(lambda c, d=d: likelihoods.level_mean(c, jnp.asarray(d)).sum())(jnp.asarray(c))
        np.testing.assert_allclose(found, variance / d.astype(np.float64) ** 2, rtol=1e-2, atol=1e-3)


def test_all_256_gray_values_go_in_and_come_out_as_they_are():
    levels = jnp.arange(256, dtype=jnp.uint8)
    x = likelihoods.level_values(levels)
    np.testing.assert_allclose(x, X, rtol=0, atol=2.0**-22)
    np.testing.assert_array_equal(to_levels(np.asarray(likelihoods.level_picture(x))), levels)
    for off in (-0.49, 0.49):  # noise below half a level
        np.testing.assert_array_equal(to_levels(np.asarray(likelihoods.level_picture(x + off * SPACING))), levels)
    np.testing.assert_array_equal(likelihoods.level_picture(jnp.asarray([-9.0, -1.01, 1.01, 9.0])), [0, 0, 1, 1])
    clear = likelihoods.level_nll(levels[:, None], x[:, None], jnp.float32(0.1 * SPACING))
    np.testing.assert_allclose(clear, 0.0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.uint16, jnp.int8, jnp.bool_])
def test_gray_values_of_another_dtype_are_refused(unchecked, dtype):
    x = jnp.ones((2, 3), dtype)
    for call in (
        lambda: likelihoods.level_values(x),
        lambda: likelihoods.level_nll(x, jnp.zeros((2, 3)), jnp.float32(1.0)),
    ):
        with pytest.raises(InputTypeError, match=f"^images: dtype {x.dtype}; expected uint8, gray values") as refusal:
            call()
        assert "\n" not in str(refusal.value)
