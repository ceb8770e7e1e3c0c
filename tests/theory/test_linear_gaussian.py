"""Floor, PCA cross-entropy, rate and reverse water-filling, each by a second route."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from medvdm.errors import InputError
from medvdm.evaluation import baselines
from medvdm.evaluation.components import exact_components
from medvdm.models import likelihoods
from medvdm.theory import linear_gaussian


def gray_images(n, pixels=30, seed=0):
    """Correlated rows in (0, 1) whose components have falling variances."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(7).standard_normal((pixels, pixels))
    logits = rng.standard_normal((n, pixels)) * 0.8 ** np.arange(pixels) @ basis
    return (1 / (1 + np.exp(-0.4 * logits))).astype(np.float32)


def fitted(k=8):
    mean, components, variances = exact_components(gray_images(80), k)
    return mean, components, variances


def test_the_floor_is_the_binary_entropy_by_hand_and_by_its_integral():
    x = np.array([[0.5, 0.25, 0.0, 1.0]])
    by_hand = math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert float(likelihoods.bernoulli_floor(jnp.asarray(x))[0]) == pytest.approx(by_hand, rel=1e-6)
    # Uniform grays have a floor of half a nat: the integral of the binary entropy over [0, 1].
    grays = (np.arange(200_000) + 0.5) / 200_000
    assert float(likelihoods.bernoulli_floor(jnp.asarray(grays)[None])[0]) / len(grays) == pytest.approx(0.5, abs=1e-4)


def test_the_floor_is_the_least_cross_entropy_and_is_reached_by_the_image_itself():
    x = gray_images(3)
    floor = np.asarray(likelihoods.bernoulli_floor(jnp.asarray(x)))
    np.testing.assert_allclose(linear_gaussian.cross_entropy(x, x), floor, rtol=1e-5)
    for shift in (-0.05, 0.05):
        assert np.all(linear_gaussian.cross_entropy(x, np.clip(x + shift, 0.01, 0.99)) > floor)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_pca_cross_entropy_is_that_of_a_dense_svd(k):
    train, x = gray_images(80).astype(np.float64), gray_images(9, seed=1)
    _, _, rows = np.linalg.svd(train - train.mean(0), full_matrices=False)
    p = np.clip(
        train.mean(0) + (x - train.mean(0)) @ rows[:k].T @ rows[:k], linear_gaussian.CLIP, 1 - linear_gaussian.CLIP
    )
    expected = -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), axis=1)
    found = baselines.fit(train.astype(np.float32).reshape(80, 5, 6, 1), None).pca(x.reshape(9, 5, 6, 1), k)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_rate_is_the_divergence_of_what_is_sent_from_what_is_expected_by_monte_carlo():
    mean, components, variances = fitted(4)
    x = gray_images(3, seed=2)
    f = (x - mean) @ components.T
    rng = np.random.default_rng(0)
    n = 100_000
    for noise in (0.3 * np.ones(4), np.array([0.1, 0.2, 0.4, 0.8])):
        _, rate = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, noise.astype(np.float32))
        for i in range(3):
            y = f[i] + noise * rng.standard_normal((n, 4))  # z_0 / alpha_0
            log_q = -0.5 * ((y - f[i]) / noise) ** 2 - np.log(noise)
            log_p = -0.5 * y**2 / (variances + noise**2) - 0.5 * np.log(variances + noise**2)
            draws = np.sum(log_q - log_p, axis=1)
            assert abs(draws.mean() - rate[i]) < 5 * draws.std() / math.sqrt(n)


def test_one_noise_is_the_same_as_that_noise_for_every_component():
    mean, components, variances = fitted()
    x = gray_images(4, seed=3)
    one = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, 0.4)
    each = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, np.full(8, 0.4))
    np.testing.assert_allclose(one, each, rtol=1e-6)


def test_little_noise_is_the_projection_much_noise_or_no_component_the_mean_image():
    mean, components, variances = fitted()
    x = gray_images(4, seed=3)
    projection = mean + (x - mean) @ components.T @ components
    little, _ = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, 1e-4)
    np.testing.assert_allclose(little, linear_gaussian.cross_entropy(x, projection), rtol=1e-4)
    mean_image = linear_gaussian.cross_entropy(x, np.broadcast_to(mean, x.shape))
    much, rate = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, 1e3)
    np.testing.assert_allclose(much, mean_image, rtol=1e-4)
    np.testing.assert_allclose(rate, 0.0, atol=1e-3)
    nothing, rate = linear_gaussian.linear_gaussian_vdm(x, mean, components[:0], variances[:0], 1.0)
    np.testing.assert_allclose(nothing, mean_image, rtol=1e-6)
    np.testing.assert_array_equal(rate, 0.0)


@pytest.mark.parametrize("level", [0.01, 0.3, 2.0])
def test_water_filling_leaves_the_same_error_everywhere_and_is_the_best_choice(level):
    variances = np.array([5.0, 3.0, 0.7, 0.31, 0.05])
    noise = linear_gaussian.water_filling(variances, level)
    sent = variances[: len(noise)]
    assert np.all(sent > level) and np.all(variances[len(noise) :] <= level)
    np.testing.assert_allclose(sent * noise**2 / (sent + noise**2), level, rtol=1e-12)
    # The second route: rate + error / (2 level), each component by itself, over a fine grid of noises.
    r2 = np.geomspace(1e-4, 1e6, 200_001)
    for i, variance in enumerate(variances):
        cost = 0.5 * np.log1p(variance / r2) + variance * r2 / (variance + r2) / (2 * level)
        best = r2[np.argmin(cost)]
        if i < len(noise):
            assert best == pytest.approx(noise[i] ** 2, rel=1e-2)
        else:
            assert best > 0.99 * r2[-1]  # not worth sending


def test_water_filling_spends_no_more_than_one_common_noise_for_the_same_error():
    variances = np.array([5.0, 3.0, 0.7, 0.31])
    for common in (0.1, 0.4, 0.9):
        error = np.sum(variances * common**2 / (variances + common**2))
        level = error / 4  # reached by all four, where it is below the last variance
        if level >= variances[-1]:
            continue
        noise = linear_gaussian.water_filling(variances, level)
        rates = [0.5 * np.sum(np.log1p(variances / r**2)) for r in (noise, common)]
        assert rates[0] < rates[1]


def test_variances_may_be_integers():
    whole = np.array([5, 3, 1])
    noise = linear_gaussian.water_filling(whole, 0.7)
    np.testing.assert_array_equal(noise, linear_gaussian.water_filling(whole.astype(float), 0.7))
    assert np.all(noise % 1 > 0)  # the test could fail
    mean, components, _ = fitted(3)
    found, expected = (
        linear_gaussian.linear_gaussian_vdm(gray_images(3, seed=2), mean, components, variances, 0.7)
        for variances in (whole, whole.astype(float))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("level", [0.0, -1.0, math.nan, math.inf])
def test_water_filling_refuses_a_level_that_is_none(level):
    with pytest.raises(InputError, match="level"):
        linear_gaussian.water_filling(np.array([2.0, 1.0]), level)


@pytest.mark.parametrize("variances", [[1.0, 2.0], [1.0, 0.0], [[1.0, 0.5]], [1.0, math.nan]])
def test_water_filling_refuses_variances_that_are_not_positive_and_falling(variances):
    with pytest.raises(InputError, match="variances"):
        linear_gaussian.water_filling(np.array(variances), 0.1)


def test_rate_distortion_takes_for_each_size_the_noise_that_is_best_on_validation_images():
    parts = fitted()
    validation, x = gray_images(20, seed=4), gray_images(10, seed=5)
    noises = (0.1, 0.3, 0.6, 1.0)
    trades = linear_gaussian.rate_distortion(validation, x, *parts, latents=(1, 4, 8, 9), noises=noises)
    assert [t.latent for t in trades] == [1, 4, 8]  # there is no ninth component
    mean, components, variances = parts
    for t in trades:
        k = t.latent
        totals = {
            r: sum(linear_gaussian.linear_gaussian_vdm(validation, mean, components[:k], variances[:k], r)).mean()
            for r in noises
        }
        assert t.noise == min(noises, key=totals.get)
        expected = linear_gaussian.linear_gaussian_vdm(x, mean, components[:k], variances[:k], t.noise)
        np.testing.assert_array_equal((t.reconstruction, t.rate), expected)
    images = linear_gaussian.rate_distortion(
        validation.reshape(20, 5, 6, 1), x.reshape(10, 5, 6, 1), *parts, latents=(4,), noises=noises
    )
    np.testing.assert_array_equal(images[0].rate, trades[1].rate)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation": np.zeros((0, 30), np.float32)}, "validation: 0 images"),
        ({"x": np.zeros((2, 31), np.float32)}, "x: 31 pixels"),
        ({"latents": (0, 4)}, "latents"),
        ({"latents": ()}, "latents"),
        ({"noises": (0.5, 0.0)}, "noises"),
        ({"noises": (math.nan,)}, "noises"),
        ({"noises": (0.5, math.nan, 1.0)}, "noises"),
        ({"noises": (0.5, math.inf)}, "noises"),
    ],
)
def test_rate_distortion_refuses_what_it_cannot_use(change, words):
    mean, components, variances = fitted()
    settings = {"validation": gray_images(4), "x": gray_images(2), **change}
    with pytest.raises(InputError, match=words):
        linear_gaussian.rate_distortion(mean=mean, components=components, variances=variances, **settings)
