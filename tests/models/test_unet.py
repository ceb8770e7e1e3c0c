"""The network for pixels: its start in closed form, sizes, shifts, crops, its inputs, and bfloat16."""

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import ndimage, special

from medvdm.errors import InputError
from medvdm.models import likelihoods, unet, vdm
from medvdm.models.blocks import DTYPES
from medvdm.theory import bound

SETTINGS = {
    **{"width": 8, "scales": 2, "blocks": 1, "patch": 2, "details": "contrast", "attention": False, "rounding": True},
    **{"embedding_dim": 8, "gamma_range": (-13.0, 5.0), "dtype": DTYPES["float32"]},
}
VARIANCE = unet.PIXEL_VARIANCE


def network(channels=1, **changes):
    return unet.UNet(channels, **SETTINGS | changes, rngs=nnx.Rngs(0))


def randomised(net, scale=0.15):
    """The same with noise on every weight, those that start at zero too."""
    rng = np.random.default_rng(0)
    graph, params = nnx.split(net, nnx.Param)
    noisy = jax.tree.map(lambda p: p + scale * rng.standard_normal(p.shape).astype(np.float32), params)
    return nnx.merge(graph, noisy)


def called(net, z, gamma, method="__call__"):
    """A compiled call with one gamma for each image, or one for all, and a label of ones; (n, h, w, c)."""
    graph, params = nnx.split(net, nnx.Param)

    @jax.jit
    def call(params, z, gamma):
        merged = nnx.merge(graph, params)
        label = jnp.ones((len(gamma), merged.embedding_dim))
        return getattr(merged, method)(z, merged.condition(gamma, label))

    return np.asarray(call(params, jnp.asarray(z, jnp.float32), jnp.asarray(gamma, jnp.float32)))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def smooth(*shape, seed=0):
    """Images with slopes and edges in [-1, 1]."""
    rough = np.random.default_rng(seed).standard_normal(shape)
    blurred = ndimage.gaussian_filter(rough, (0, 2, 2, 0))
    return np.clip(blurred / blurred.std(), -1, 1).astype(np.float32)


# What it is given


def test_fourier_features_are_sines_and_cosines_of_the_seventh_and_eighth_octave():
    z = smooth(2, 5, 6, 3)
    found = np.asarray(unet.fourier_features(jnp.asarray(z)))
    assert found.shape == (2, 5, 6, 12)
    z64 = z.astype(np.float64)
    expected = [f(2**n * np.pi * z64) for n in (7, 8) for f in (np.sin, np.cos)]
    # 2^8 pi z reaches 804, of which float32 keeps 6e-5.
    np.testing.assert_allclose(found, np.concatenate(expected, axis=-1), rtol=0, atol=2e-4)
    # Two levels, or one, are a whole period, but for 255 levels instead of 256 in the range: 1 / 128 of it.
    two = np.asarray(unet.fourier_features(jnp.full((1, 1, 1, 1), 2 * likelihoods.SPACING)))[0, 0, 0]
    angles = 2 * np.pi * np.array([256, 256, 512, 512]) / 255
    np.testing.assert_allclose(two, np.where([1, 0, 1, 0], np.sin(angles), np.cos(angles)), atol=1e-4)


def test_contrast_features_are_differences_of_means_by_scipy():
    z, gamma = smooth(2, 9, 7, 2), np.array([-9.0, 1.0])
    found = np.asarray(unet.contrast_features(jnp.asarray(z), jnp.asarray(gamma, jnp.float32)))
    once = ndimage.uniform_filter(z.astype(np.float64), (1, 3, 3, 1), mode="nearest")
    twice = ndimage.uniform_filter(once, (1, 3, 3, 1), mode="nearest")
    scale = 1 / np.sqrt(1 / (1 + np.exp(-gamma)) + 0.03**2)[:, None, None, None]
    expected = np.concatenate([(z - once) * scale, (once - twice) * scale], axis=-1)
    assert found.shape == (2, 9, 7, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("details", unet.DETAILS)
def test_each_kind_of_details_reaches_the_answer(details):
    """Two z that differ by a third of a level: alike for a network without details, apart with Fourier features."""
    z = smooth(1, 8, 8, 1)
    net = randomised(network(details=details))
    assert net.enter.kernel.shape[2] == {"none": 1, "contrast": 3, "fourier": 5}[details] * 4
    first, second = (called(net, z + shift, [-12.0], "answers") for shift in (0.0, likelihoods.SPACING / 3))
    moved = np.abs(first - second).max() / np.abs(first).max()
    assert moved > 0.05 if details == "fourier" else 0 < moved < 0.05, moved


# Its start


def test_the_network_answers_nothing_at_the_start():
    for changes in ({}, {"attention": True}, {"scales": 3, "blocks": 2}, {"rounding": False}, {"details": "fourier"}):
        answers = called(network(**changes), noise(2, 9, 10, 1), [-3.0, 1.0], "answers")
        assert answers.shape == (2, 9, 10, 2 if changes.get("rounding", True) else 1)
        np.testing.assert_array_equal(answers, 0.0)


def posterior_mean(z, gamma):
    """alpha lambda z / (alpha^2 lambda + sigma^2) in float64, and alpha and sigma, which broadcast."""
    gamma = np.asarray(gamma, np.float64)[:, None, None, None]
    alpha2, sigma2 = 1 / (1 + np.exp(gamma)), 1 / (1 + np.exp(-gamma))
    return np.sqrt(alpha2) * VARIANCE * z / (alpha2 * VARIANCE + sigma2), np.sqrt(alpha2), np.sqrt(sigma2)


def test_at_the_start_the_noise_is_that_of_the_best_gaussian_denoiser_and_its_rounding():
    gamma = np.array([-12.0, -9.0, -4.0, 0.0, 5.0])
    z = (0.5 * noise(5, 6, 7, 1)).astype(np.float32)
    centre, alpha, sigma = posterior_mean(z.astype(np.float64), gamma)
    plain = called(network(rounding=False), z, gamma)
    np.testing.assert_allclose(plain, (z - alpha * centre) / sigma, rtol=1e-3, atol=1e-4)
    levels = 2.0 * np.arange(256) / 255 - 1.0
    variance = np.exp(-5.0)  # of a pixel given the rest, as the network says it at the start
    deviation2 = sigma**2 * variance / (alpha**2 * variance + sigma**2)
    weights = np.exp(-((centre[..., None] - levels) ** 2) / (2 * deviation2[..., None]))
    rounded = (weights @ levels) / np.maximum(weights.sum(axis=-1), 1e-300)
    inside = np.abs(centre) < 1 - 6 * np.sqrt(deviation2)  # where black and white do not cut the law off
    found = called(network(), z, gamma)
    # Rounded, a centre moves the mean by up to 1 / 4 d^2 of what it moves itself: 1e-7, as a part of sigma.
    part = (1 + likelihoods.SPACING**2 / (4 * deviation2)) * 5e-7 / sigma
    error = np.abs(found - (z - alpha * rounded) / sigma)
    assert (error <= part + 1e-4 + 1e-3 * np.abs(plain))[inside].all()
    assert inside.mean(axis=(1, 2, 3)).min() > 0.3
    differ = np.abs(found - plain).reshape(5, -1).max(axis=1)
    assert (differ[:1] > 0.1).all() and (differ[2:] < 1e-3).all()  # rounding matters below one level of noise


def closed_form(x, gamma_0, gamma_1):
    """The bound's diffusion loss at the start without rounding, (n,) nats, from x in [-1, 1].

    With rho = e^-gamma, eps - eps_hat has mean square (rho l / (1 + rho l))^2 + rho x^2 / (1 + rho l)^2, whose half is
    integrated over gamma.
    """

    def primitive(gamma):
        one = 1.0 + VARIANCE * math.exp(-gamma)
        return math.log(one) + 1 / one, -1 / one / VARIANCE

    (log_0, of_0), (log_1, of_1) = primitive(gamma_0), primitive(gamma_1)
    x2 = x.astype(np.float64) ** 2
    return 0.5 * np.sum((log_0 - log_1) + x2 * (of_0 - of_1), axis=(1, 2, 3))


def test_the_bound_of_step_0_is_its_closed_form():
    """Of images that are alike, so that they differ in time and noise only."""
    config = vdm.VDMConfig(
        **{"image_shape": (6, 5, 1), "architecture": "unet", "gamma_min": -13.0, "gamma_max": 5.0, "width": 4},
        **{"embedding_dim": 4, "blocks": 1, "rounding": False},
    )
    graph, params = vdm.graph_of(config), vdm.new_params(config, 0)
    one = np.random.default_rng(0).integers(0, 256, (1, 6, 5, 1)).astype(np.uint8)
    terms = jax.jit(lambda p, x: bound.terms(vdm.merge(graph, p), x, key=jax.random.key(1)))(
        params, jnp.repeat(jnp.asarray(one), 4096, axis=0)
    )
    x = 2.0 * one / 255 - 1
    by_time = np.asarray(terms.diffusion, np.float64)[np.argsort(terms.times)]
    error = np.sqrt(np.mean(np.diff(by_time) ** 2) / 2 / 4096)  # neighbours in time differ by noise
    expected = closed_form(x, -13.0, 5.0)[0]
    assert error < 0.01 * expected
    assert by_time.mean() == pytest.approx(expected, abs=4 * error)
    alpha2, sigma2 = 1 / (1 + math.exp(5.0)), 1 / (1 + math.exp(-5.0))
    prior = 0.5 * np.sum(alpha2 * x**2 + sigma2 - 1 - math.log(sigma2))
    np.testing.assert_allclose(terms.prior, prior, rtol=1e-4)
    eps, weights = np.polynomial.hermite_e.hermegauss(100)  # E -log p(x_k | x_k + r eps) for each pixel
    exponents = -0.5 * (x[..., None, None] + math.exp(-6.5) * eps[:, None] - oracle.LEVELS) ** 2 * math.exp(13.0)
    nll = (special.logsumexp(exponents, axis=-1) + 0.5 * eps**2) @ weights / weights.sum()
    reconstruction = np.asarray(terms.reconstruction, np.float64)
    assert reconstruction.mean() == pytest.approx(nll.sum(), abs=4 * reconstruction.std() / 64)


def test_the_first_gradient_reaches_both_answers_and_no_other_part_is_dead_after_it():
    net = network(attention=True)
    graph, params = nnx.split(net, nnx.Param)
    x, eps, gamma = smooth(2, 8, 8, 1), noise(2, 8, 8, 1), jnp.asarray([-11.0, -2.0])

    @jax.jit
    def gradient(params):
        def loss(params):
            net = nnx.merge(graph, params)
            alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(s * gamma))[:, None, None, None] for s in (-1, 1))
            hat = net(alpha * x + sigma * eps, net.condition(gamma, jnp.ones((2, 8))))
            return jnp.sum((eps - hat) ** 2)

        return nnx.to_pure_dict(jax.grad(loss)(params))

    last = gradient(params)["leave"]["kernel"].reshape(3, 3, 8, 2, 2, 2)
    assert (np.abs(last).max(axis=(0, 1, 2, 3, 4)) > 0).all()
    everywhere = gradient(nnx.split(randomised(net), nnx.Param)[1])
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(everywhere))


# Places


def field(lowest, highest, *, scales, blocks, patch, details):
    """The pixels, on one axis, that the answers at pixels ``lowest`` to ``highest`` look at, from the layers."""

    def cells(low, high, size):
        return low // size, high // size

    def scale(low, high, level):  # in cells of this level, from its blocks on the way up back to those on the way down
        low, high = low - 2 * blocks, high + 2 * blocks
        if level < scales - 1:
            (coarse_low, coarse_high) = scale(*cells(low, high, 2), level + 1)
            low, high = min(low, 2 * coarse_low), max(high, 2 * coarse_high + 1)
            low, high = low - 2 * blocks, high + 2 * blocks
        return low, high

    low, high = cells(lowest, highest, patch)
    low, high = scale(low - 1, high + 1, 0)
    low, high = (low - 1) * patch, (high + 1) * patch + patch - 1
    blur = {"none": 0, "fourier": 0, "contrast": 2}[details]
    return low - blur, high + blur


PLACES = [
    {"scales": 2, "blocks": 1, "patch": 2, "details": "contrast"},
    {"scales": 1, "blocks": 2, "patch": 2, "details": "none"},
    {"scales": 3, "blocks": 1, "patch": 1, "details": "fourier"},
]


@pytest.mark.parametrize("settings", PLACES)
def test_an_answer_looks_at_its_receptive_field_and_no_further(settings):
    net, (row, column), side = randomised(network(**settings)), (41, 38), 80
    graph, params = nnx.split(net, nnx.Param)

    @jax.jit
    def gradient(params, z):
        def one(z):
            net = nnx.merge(graph, params)
            return net.answers(z, net.condition(jnp.asarray([-6.0]), jnp.ones((1, 8))))[0, row, column, 0]

        return jax.grad(one)(z)

    seen = np.abs(np.asarray(gradient(params, jnp.asarray(smooth(1, side, side, 1)))))[0, :, :, 0] > 0
    for axis, at in ((1, row), (0, column)):
        places = np.flatnonzero(seen.any(axis=axis))
        assert (places.min(), places.max()) == field(at, at, **settings)


@pytest.mark.parametrize("settings", PLACES)
def test_a_crop_gives_what_the_whole_image_gives_inside(settings):
    """Where the receptive field lies within the crop, whose corner lies on a coarsest cell; the denoiser itself too."""
    net, z = randomised(network(**settings)), smooth(2, 72, 76, 1)
    top, left, side = 8, 12, 60
    inside = [p for p in range(side) if field(p, p, **settings)[0] >= 0 and field(p, p, **settings)[1] < side]
    assert len(inside) >= 8
    rows = slice(inside[0], inside[-1] + 1)
    for method in ("answers", "__call__"):
        whole = called(net, z, [-10.0, -3.0], method)
        crop = called(net, z[:, top : top + side, left : left + side], [-10.0, -3.0], method)
        np.testing.assert_allclose(
            crop[:, rows, rows], whole[:, top : top + side, left : left + side][:, rows, rows], rtol=1e-4, atol=1e-4
        )
        outside = np.abs(crop - whole[:, top : top + side, left : left + side])[:, 0]
        assert outside.max() > 1e-2, "the border is told apart"


@pytest.mark.parametrize("settings", PLACES)
def test_a_shift_by_the_coarsest_cell_shifts_the_answers_away_from_the_border(settings):
    net, z, cell = (
        randomised(network(**settings)),
        smooth(1, 72, 72, 1),
        settings["patch"] * 2 ** (settings["scales"] - 1),
    )
    (low, high), inside = field(0, 0, **settings), slice(32, 40)
    assert 32 - cell + low >= 0 and 40 + cell + high < 72
    answers = called(net, z, [-6.0], "answers")
    for down, along in ((cell, 0), (0, cell), (cell, -cell)):
        moved = called(net, np.roll(z, (down, along), (1, 2)), [-6.0], "answers")
        back = np.roll(moved, (-down, -along), (1, 2))
        np.testing.assert_allclose(back[:, inside, inside], answers[:, inside, inside], rtol=1e-4, atol=1e-4)
    if cell > 1:
        part = called(net, np.roll(z, 1, 1), [-6.0], "answers")  # less than a cell is another image
        back = np.roll(part, -1, 1)
        assert np.abs(back[:, inside, inside] - answers[:, inside, inside]).max() > 1e-2


@pytest.mark.parametrize("shape", [(4, 4, 1), (5, 9, 1), (4, 23, 1), (13, 4, 3), (17, 16, 3)])
@pytest.mark.parametrize("attention", [False, True])
def test_images_of_any_size_go_in_and_come_out(shape, attention):
    net, z = randomised(network(shape[2], attention=attention)), noise(2, *shape)
    found = called(net, z, [-5.0, 0.0])
    assert found.shape == z.shape and found.dtype == np.float32 and np.isfinite(found).all()
    # What is filled up is the border repeated: an image that was filled before gives the same.
    least = 4
    filled = np.pad(z, ((0, 0), (0, -shape[0] % least), (0, -shape[1] % least), (0, 0)), mode="edge")
    plain = randomised(network(shape[2], attention=attention, details="none"))
    whole = called(plain, filled, [-5.0, 0.0])[:, : shape[0], : shape[1]]
    np.testing.assert_allclose(called(plain, z, [-5.0, 0.0]), whole, rtol=1e-4, atol=1e-4)


def test_the_smallest_size_is_one_cell_of_the_coarsest_scale():
    """What :class:`VDMConfig` refuses is what is smaller, in any number of scales and any patch."""
    for scales, patch in ((1, 1), (2, 2), (3, 4)):
        least = patch * 2 ** (scales - 1)
        shared = {"architecture": "unet", "scales": scales, "patch": patch}
        assert vdm.VDMConfig(image_shape=(least, least, 1), **shared).image_shape[0] == least
        for shape in ((least - 1, least + 9, 1), (least + 9, least - 1, 1)):
            with pytest.raises(InputError, match=rf"^image_shape: .*expected (sides of at least {least}|\(height)"):
                vdm.VDMConfig(image_shape=shape, **shared)


def test_pixels_and_channels_keep_their_places():
    """The last layer says at each place of a cell the number of the place, and every cell repeats it."""
    net = network(3, patch=2, rounding=False)
    numbers = jnp.arange(12.0)  # (p, q, c) of a cell, in order
    net.leave.bias[...] = numbers
    found = called(net, noise(1, 4, 4, 3), [0.0], "answers")[0]
    np.testing.assert_array_equal(found, np.tile(np.asarray(numbers).reshape(2, 2, 3), (2, 2, 1)))


# Time, label, precision, attention


@pytest.mark.parametrize("attention", [False, True])
def test_a_condition_shared_by_all_images_is_that_of_each(attention):
    net, z = randomised(network(attention=attention)), noise(3, 8, 8, 1)
    shared, each = called(net, z, [-4.0]), called(net, z, [-4.0] * 3)
    np.testing.assert_allclose(shared, each, rtol=1e-4, atol=1e-5)
    other = called(net, z, [-4.0, 2.0, -4.0])
    np.testing.assert_allclose(other[[0, 2]], each[[0, 2]], rtol=1e-4, atol=1e-5)
    assert np.abs(other[1] - each[1]).max() > 1e-2


def test_time_and_label_modulate_every_block():
    net = randomised(network(scales=3, blocks=2))
    films, gamma = net.condition(jnp.asarray([-5.0, 0.0]), jnp.ones((2, 8)))
    assert [f.shape[1] // 2 for f in films] == [8, 8, 16, 16, 32, 32, 16, 16, 8, 8]  # down, coarsest, up
    z, answers = jnp.asarray(noise(2, 8, 8, 1)), jax.jit(lambda films: net.answers(z, (films, gamma)))
    base = answers(films)
    for i in range(len(films)):
        changed = [f + 0.5 if i == j else f for j, f in enumerate(films)]
        assert np.abs(answers(tuple(changed)) - base).max() > 1e-3, i
    labelled, _ = net.condition(jnp.asarray([-5.0, 0.0]), jnp.zeros((2, 8)))
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(films, labelled, strict=True))


def test_attention_sees_every_place_in_any_order():
    """Without it places far away do not matter; with it they do; and its own layer does not know of their order."""
    far = smooth(1, 64, 64, 1)
    changed = far.copy()
    changed[:, 56:, 56:] *= -1
    for attention in (False, True):
        net = randomised(network(attention=attention, details="none"))
        moved = np.abs(called(net, far, [-6.0], "answers") - called(net, changed, [-6.0], "answers"))[0, :8, :8].max()
        assert (moved > 1e-6) == attention
    layer = randomised(unet.Attention(8, dtype=DTYPES["float32"], rngs=nnx.Rngs(0)), 0.5)
    h = jnp.asarray(noise(2, 3, 4, 8))
    order = np.random.default_rng(0).permutation(12)
    mixed = layer(h).reshape(2, 12, 8)
    shuffled = layer(h.reshape(2, 12, 8)[:, order].reshape(2, 3, 4, 8)).reshape(2, 12, 8)
    np.testing.assert_allclose(shuffled, mixed[:, order], rtol=1e-4, atol=1e-5)
    assert np.abs(mixed - h.reshape(2, 12, 8)).max() > 0.1


def test_attention_is_that_of_the_textbook():
    layer = randomised(unet.Attention(8, dtype=DTYPES["float32"], rngs=nnx.Rngs(0)), 0.5)
    h = noise(1, 2, 3, 8).astype(np.float64)

    def rms(a):
        return a / np.sqrt((a * a).mean(axis=-1, keepdims=True) + 1e-6)

    joined = rms(h[0].reshape(6, 8)) @ np.asarray(layer.enter.kernel[...], np.float64)
    query, key, value = joined.reshape(6, 3, 4, 2).transpose(1, 2, 0, 3)  # (heads, places, 2) each
    logits = 0.5 * np.sqrt(2) * rms(query) @ rms(key).transpose(0, 2, 1)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    mixed = (weights @ value).transpose(1, 0, 2).reshape(6, 8)
    out = h[0].reshape(6, 8) + mixed @ np.asarray(layer.leave.kernel[...]) + np.asarray(layer.leave.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(h, jnp.float32))[0].reshape(6, 8), out, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_the_arithmetic_only_and_comes_close_to_float32():
    z, gamma = smooth(2, 12, 12, 1) + 0.3 * noise(2, 12, 12, 1), [-6.0, 0.0]
    exact = randomised(network(attention=True), 0.05)
    half = randomised(network(attention=True, dtype=DTYPES["bfloat16"]), 0.05)  # the same weights, by the same seed
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    films, _ = half.condition(jnp.asarray(gamma), jnp.ones((2, 8)))
    assert {f.dtype for f in films} == {jnp.dtype("bfloat16")}
    for method in ("answers", "__call__"):
        a, b = called(exact, z, gamma, method), called(half, z, gamma, method)
        assert b.dtype == np.float32
        # bfloat16 keeps 3 digits, 2^-8; some ten layers follow one another.
        assert 0 < np.sqrt(np.mean((a - b) ** 2)) < 10 * 2.0**-8 * np.sqrt(np.mean(a**2))
