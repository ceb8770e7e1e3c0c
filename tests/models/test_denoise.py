"""Noisy images made clear: the exact posterior of Gaussian images, a cascade's stages, sizes, tiles, and draws."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from medvdm.models import cascade, denoise, likelihoods, vdm
from medvdm.theory import gaussian
from medvdm.theory.schedules import FixedCosine, FixedLinear

SETTINGS = {
    **{"architecture": "unet", "image_shape": (16, 16, 1), "gamma_min": -13.0, "gamma_max": 5.0, "embedding_dim": 4},
    **{"width": 4, "scales": 2, "base_scales": 1, "blocks": 1},
}
CASCADE = {**SETTINGS, "scales": 1, "reduce": 2}


@functools.cache
def model(**changes):
    """A config, its graph and random weights everywhere."""
    config = vdm.VDMConfig(**SETTINGS | changes)
    return config, vdm.graph_of(config), tiny.weights(config, 0.15)


def noisy(*shape, noise=0.1, seed=0):
    """Smooth images with noise, some of it beyond black and white."""
    n, h, w, c = shape
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    clear = np.sin(5 * rows + rng.uniform(0, 6, (n, 1, 1))) * np.cos(4 * columns) * 0.5 + 0.5
    return (clear[..., None] + noise * rng.standard_normal(shape)).astype(np.float32)


def mean(y, noise, **settings):
    tiles = {name: settings.pop(name) for name in ("tile", "whole", "rounding") if name in settings}
    _, graph, params = model(**settings)
    levels = np.broadcast_to(np.float32(noise), len(y))
    return np.asarray(denoise.mean(params, jnp.asarray(y), jnp.asarray(levels), graph=graph, **tiles))


# A Gaussian, whose posterior is known


S, NOISE = 0.6, 0.2  # deviation of x on [-1, 1], and of the noise on [0, 1]


@pytest.mark.parametrize("schedule", [FixedLinear(-13.0, 5.0), FixedCosine(-13.0, 5.0)])
def test_the_mean_is_that_of_the_exact_posterior(schedule):
    y = noisy(2, 3, 4, 1, noise=NOISE)
    noise = np.array([NOISE, 0.03])
    found = denoise.posterior_mean(oracle.OnImages(S, schedule), jnp.asarray(y), denoise.gamma_of(noise))
    r = 2 * noise[:, None, None, None]
    expected = 0.5 * (S**2 / (S**2 + r**2) * (2.0 * y.astype(np.float64) - 1) + 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def exact_chain(gammas):
    """Gain and variance of z_0 / alpha_0 after a chain that begins at y, by the textbook's form of each step."""
    alpha2, sigma2 = 1 / (1 + np.exp(gammas)), 1 / (1 + np.exp(-gammas))
    gain = math.sqrt(alpha2[-1])
    for t in range(len(gammas) - 1, 0, -1):
        a_ts2 = alpha2[t] / alpha2[t - 1]
        v_ts = sigma2[t] - a_ts2 * sigma2[t - 1]
        x_per_z = math.sqrt(alpha2[t]) * S**2 / (alpha2[t] * S**2 + sigma2[t])
        gain *= (math.sqrt(a_ts2) * sigma2[t - 1] + math.sqrt(alpha2[t - 1]) * v_ts * x_per_z) / sigma2[t]
    variance = oracle.isotropic_chain_variance(S, gammas, variance=0.0)
    return gain / math.sqrt(alpha2[0]), variance / alpha2[0]


def exact_posterior(gamma_0):
    """The same of p(x + r_0 eps | y)."""
    r2, r02 = (2 * NOISE) ** 2, math.exp(gamma_0)
    return (S**2 + r02) / (S**2 + r2), (S**2 + r02) * (r2 - r02) / (S**2 + r2)


@pytest.mark.parametrize("schedule", [FixedLinear(-13.0, 5.0), FixedCosine(-13.0, 5.0)])
def test_draws_have_the_mean_and_the_spread_of_the_exact_posterior(schedule):
    steps, end = 40, 2 * math.log(2 * NOISE)
    y = np.full((6000, 1, 1, 1), 0.7, np.float32)
    keys = jax.random.split(jax.random.key(0), len(y))
    draw = jax.jit(functools.partial(denoise.posterior_draws, oracle.OnImages(S, schedule), steps=steps))
    found = np.asarray(draw(jnp.asarray(y), denoise.gamma_of(NOISE), keys=keys), np.float64).ravel()

    ts = np.linspace(0, 1, 200_001)
    start = np.interp(end, np.asarray(schedule(jnp.asarray(ts)), np.float64), ts)
    gain, variance = exact_chain(np.asarray(schedule(jnp.linspace(0, start, steps + 1)), np.float64))
    n = len(found)
    assert abs(found.mean() - gain * 0.4) < 4 * math.sqrt(variance / n)  # 2 * 0.7 - 1
    assert abs(found.var() / variance - 1) < 4 * math.sqrt(2 / n)
    # The chain of many steps is the posterior itself.
    fine = exact_chain(np.asarray(schedule(jnp.linspace(0, start, 4001)), np.float64))
    np.testing.assert_allclose(fine, exact_posterior(-13.0), rtol=0.004)


def test_noise_and_gamma():
    """z_t / alpha_t of an image on [-1, 1] is twice the image on [0, 1], less 1, with twice the noise."""
    assert denoise.gamma_of(0.5) == 0
    ratio = np.asarray(gaussian.sigma(denoise.gamma_of(0.1)) / gaussian.alpha(denoise.gamma_of(0.1)))
    np.testing.assert_allclose(ratio, 0.2, rtol=1e-6)
    least, most = denoise.noise_range(oracle.OnImages(S, FixedLinear(-13.0, 5.0)))
    assert (least, most) == (pytest.approx(0.5 * math.exp(-6.5)), pytest.approx(0.5 * math.exp(2.5)))


# Networks


def test_each_image_has_a_noise_of_its_own_and_the_answer_of_no_other():
    y = noisy(3, 16, 16, 1)
    together = mean(y, [0.02, 0.1, 0.4])
    for i, noise in enumerate([0.02, 0.1, 0.4]):
        np.testing.assert_allclose(together[i], mean(y[i : i + 1], noise)[0], atol=1e-5)
    assert abs(together[1] - mean(y[1:2], 0.3)[0]).max() > 1e-3


def x_hat(part, y, noise):
    """The network's clean image on [0, 1], straight from the library's parts."""

    @jax.jit
    def computed(y):
        gamma = jnp.full((1,), 2 * math.log(2 * noise))
        alpha, sigma = gaussian.alpha(gamma[0]), gaussian.sigma(gamma[0])
        z = alpha * (2 * y - 1)
        eps_hat = part.eps_hat(z, part.condition(gamma, part.embed(None, n=1)))
        return 0.5 * ((z - sigma * eps_hat) / alpha + 1)

    return np.asarray(computed(jnp.asarray(y)))


@pytest.mark.parametrize("stages", [2, 3])
def test_a_cascade_is_given_the_copy_that_its_base_makes_clear(stages):
    settings = {**CASCADE, "stages": stages}
    y, noise = noisy(2, 16, 16, 1), 0.1
    _, graph, params = model(**settings)
    whole = vdm.merge(graph, params)

    def by_hand(part, y, noise):
        if not part.config.reduce:
            return x_hat(part, y, noise)
        copy = by_hand(part.base, y.reshape(2, y.shape[1] // 2, 2, -1, 2, 1).mean(axis=(2, 4)), noise / 2)
        b = jnp.asarray(np.rint(255 * np.clip(copy, 0, 1)), jnp.uint8)
        return x_hat(cascade.given(part, b), y, noise)

    np.testing.assert_allclose(mean(y, noise, **settings), np.clip(by_hand(whole, y, noise), 0, 1), atol=2e-5)


def test_a_copy_with_less_noise_than_its_base_knows_is_taken_as_it_is():
    least = 0.5 * math.exp(-6.5)
    y, noise = noisy(1, 16, 16, 1, noise=1e-3), 1.5 * least
    _, graph, params = model(**CASCADE)
    copy = y.reshape(1, 8, 2, 8, 2, 1).mean(axis=(2, 4))
    b = jnp.asarray(np.rint(255 * np.clip(copy, 0, 1)), jnp.uint8)
    expected = x_hat(cascade.given(vdm.merge(graph, params), b), y, noise)
    np.testing.assert_allclose(mean(y, noise, **CASCADE), np.clip(expected, 0, 1), atol=2e-5)


@pytest.mark.parametrize("settings", [{}, CASCADE], ids=["one", "cascade"])
@pytest.mark.parametrize("shape", [(13, 18), (1, 16), (16, 3)])
def test_other_sides_are_filled_up_by_reflection_and_cut_off_again(shape, settings):
    y = noisy(1, *shape, 1)
    found = mean(y, 0.1, **settings)
    assert found.shape == y.shape
    filled = np.pad(y, ((0, 0), (0, -shape[0] % 4), (0, -shape[1] % 4), (0, 0)), mode="symmetric")
    np.testing.assert_allclose(found, mean(filled, 0.1, **settings)[:, : shape[0], : shape[1]], atol=1e-6)


def test_without_rounding_gray_values_may_lie_between_two_levels():
    """Where noise is strong the two agree; where it is weak, rounding pulls to the levels."""
    y = noisy(1, 16, 16, 1)
    np.testing.assert_allclose(mean(y, 0.3), mean(y, 0.3, rounding=False), atol=1e-5)
    weak = 0.2 / 255
    rounded, between = mean(y, weak), mean(y, weak, rounding=False)
    off = [np.abs(255 * a - np.rint(255 * a)).mean() for a in (rounded, between)]
    assert off[0] < 0.1 < off[1]
    inside = (y > 0.02) & (y < 0.98)
    assert np.abs(rounded - between)[inside].max() < 1 / 255


def test_the_mean_lies_in_the_gray_scale():
    found = mean(np.array([[[[-0.4], [1.3]] * 8] * 16], np.float32), 0.1)
    assert found.min() >= 0 and found.max() <= 1


# Draws


def draws(y, noise, samples, seed=0, steps=5, **settings):
    tiles = {name: settings.pop(name) for name in ("tile", "whole") if name in settings}
    _, graph, params = model(**settings)
    numbers = jnp.asarray(samples, jnp.int32)
    drawn = denoise.draws(
        params, jnp.asarray(y), jnp.asarray(noise, jnp.float32), seed, numbers, steps, graph=graph, **tiles
    )
    return np.asarray(drawn)


@pytest.mark.parametrize("settings", [{}, CASCADE], ids=["one", "cascade"])
def test_a_draw_is_the_same_in_any_company_and_another_with_another_number_or_seed(settings):
    y = noisy(1, 13, 16, 1)[0]
    three = draws(y, 0.1, [0, 1, 2], **settings)
    assert three.shape == (3, 13, 16, 1)
    np.testing.assert_allclose(255 * three, np.rint(255 * three), atol=1e-4)
    np.testing.assert_allclose(draws(y, 0.1, [2], **settings)[0], three[2], atol=2 / 255)
    assert (np.abs(three[0] - three[1]) > 2 / 255).mean() > 0.1
    assert (np.abs(three[0] - draws(y, 0.1, [0], seed=1, **settings)[0]) > 2 / 255).mean() > 0.1


def test_draws_of_a_cascade_have_copies_of_their_own(monkeypatch):
    """The copy of each draw is the reduction of none of the others."""
    seen = []
    given = denoise._shown

    def spy(b, k):
        jax.debug.callback(lambda b: seen.append(np.asarray(b)), b)
        return given(b, k)

    monkeypatch.setattr(denoise, "_shown", spy)
    denoise.draws.clear_cache()
    draws(noisy(1, 16, 16, 1)[0], 0.1, [0, 1], **CASCADE)
    jax.effects_barrier()
    denoise.draws.clear_cache()
    assert seen[0].shape == (2, 8, 8, 1) and np.abs(seen[0][0] - seen[0][1]).max() > 2 / 255


# Tiles


@pytest.mark.parametrize(
    "changes", [{}, {"blocks": 2, "patch": 1}, {"scales": 3, "patch": 1, "details": "none"}, CASCADE]
)
def test_no_pixel_sees_further_than_the_reach(changes):
    config, graph, params = model(**changes)
    whole = vdm.merge(graph, params)
    reach = denoise.reach(config)
    side = denoise.cell(config) * (2 * reach // denoise.cell(config) + 3)
    y = noisy(1, 4 * denoise.cell(config), side, 1)
    shown = jnp.asarray(likelihoods.level_values(jnp.full(y.shape, 99, jnp.uint8))) if config.reduce else None

    def answer(y):
        return x_hat(denoise.Tiled(whole, shown, whole=y.size), y, 0.1)

    middle = side // 2
    moved = y.copy()
    moved[:, :, middle] += 0.5
    changed = np.flatnonzero(np.abs(answer(moved) - answer(y)).max(axis=(0, 1, 3)))
    assert changed.size and np.abs(changed - middle).max() <= reach
    assert np.abs(changed - middle).max() > reach / 3  # no idle width


@pytest.mark.parametrize("settings", [{}, CASCADE], ids=["one", "cascade"])
def test_tiles_give_what_the_whole_image_gives(settings):
    y = noisy(1, 20, 160, 1)
    whole, tiles = mean(y, 0.1, **settings), mean(y, 0.1, tile=64, whole=0, **settings)
    np.testing.assert_allclose(tiles, whole, atol=2e-5)
    config = model(**settings)[0]
    assert len(denoise._cuts(160, 64, denoise.reach(config), 4)[0]) > 1  # it was cut


def test_draws_in_tiles_are_those_of_the_whole_image():
    """All tiles share one z at every step, so it makes no difference where the cuts are."""
    y = noisy(1, 12, 160, 1)[0]
    whole, tiles = draws(y, 0.1, [0], steps=3), draws(y, 0.1, [0], steps=3, tile=64, whole=0)
    off = np.abs(whole - tiles)
    assert off.max() <= 1.01 / 255 and (off > 0).mean() < 0.02  # a rounding that fell otherwise


@pytest.mark.parametrize(("whole", "side"), [(200, 64), (203 * 4, 300), (96, 96), (64, 96)])
def test_the_weights_of_tiles_sum_to_one_and_are_none_at_cut_borders(whole, side):
    margin, unit = 10, 4
    starts, length, weights = denoise._cuts(whole, side, margin, unit)
    total = np.zeros(whole)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + length] += weight
        assert start % unit == 0 and length % unit == 0 or length == whole
        assert start == 0 or not weight[:margin].any()
        assert start + length == whole or not weight[-margin:].any()
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert starts[0] == 0 and starts[-1] + length == whole


def test_no_seam_shows_where_tiles_disagree():
    """Each tile says its own mean; between neighbours the sum goes from the one to the other in small steps."""
    z = noisy(1, 160, 240, 1)
    seen = jax.jit(
        lambda z: denoise.tiled(
            lambda part, _: jnp.broadcast_to(jnp.mean(part), part.shape), z, None, side=96, margin=4, unit=4
        )
    )
    found = np.asarray(seen(jnp.asarray(z)))[0, :, :, 0]
    spread = found.max() - found.min()
    assert spread > 0.05
    steps = max(np.abs(np.diff(found, axis=axis)).max() for axis in (0, 1))
    assert steps < 2 * 0.5 * math.pi / denoise.RAMP * spread
