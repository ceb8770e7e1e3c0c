"""A reduced copy and the detail given it: the reduction, Bayes' rule for a known mean, the bound, and a small run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

import medvdm
from medvdm import errors
from medvdm.errors import InputError, InputTypeError
from medvdm.evaluation.held_out import bound_terms
from medvdm.models import cascade, likelihoods, vdm
from medvdm.models import generate as generate_
from medvdm.models.unet import with_mean
from medvdm.runs.run import load
from medvdm.theory import bound, gaussian
from medvdm.theory.schedules import FixedLinear
from medvdm.training import loop
from medvdm.training.step import TrainConfig, check, loss_fn

BIT = np.log(2.0)
MODEL = {
    **{"architecture": "unet", "image_shape": (12, 16, 1), "gamma_min": -13.0, "gamma_max": 5.0, "embedding_dim": 4},
    **{"width": 4, "scales": 1, "base_scales": 2, "blocks": 1, "details": "none", "reduce": 2},
}


def gray(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# The reduction


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_reduced_pixel_is_the_mean_rounded_half_up(k):
    """Cells with every remainder of the sum by k^2, and black and white ones."""
    cells = np.full((k * k + 2, k * k), 117)
    for remainder in range(k * k):
        cells[remainder, :remainder] += 1
    cells[-2:] = np.array([[0], [255]])
    x = cells.reshape(1, -1, k, k).transpose(0, 2, 1, 3).reshape(1, k, -1, 1)  # the cells side by side
    expected = np.floor(cells.mean(axis=1) + 0.5)
    assert set(expected[:-2]) == {117, 118} and expected[-2:].tolist() == [0, 255]
    found = cascade.reduced(jnp.asarray(x, jnp.uint8), k)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found[0, 0, :, 0], expected)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_reduced_and_enlarged_keep_images_rows_and_channels_apart(k):
    x = gray(3, 2 * k, 3 * k, 2)
    expected = np.floor(x.reshape(3, 2, k, 3, k, 2).astype(np.float64).mean(axis=(2, 4)) + 0.5)
    found = cascade.reduced(jnp.asarray(x), k)
    np.testing.assert_array_equal(found, expected)
    large = cascade.enlarged(found, k)
    np.testing.assert_array_equal(large, np.kron(found, np.ones((1, k, k, 1))))
    np.testing.assert_array_equal(cascade.reduced(large, k), found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_other_than_gray_values_are_not_reduced(unchecked, dtype):
    with pytest.raises(InputTypeError, match="expected uint8"):
        cascade.reduced(jnp.zeros((1, 4, 4, 1), dtype), 2)


# Settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reduce": 1}, "reduce: 1 with .*; expected 2 or more with 'unet'"),
        ({"reduce": -2}, "reduce: -2; expected 0 or more"),
        ({"architecture": "residual"}, "reduce: 2 with architecture 'residual'"),
        ({"architecture": "linear-start"}, "reduce: 2 with architecture 'linear-start'"),
        ({"schedule": "monotonic"}, "reduce: 2 with .*schedule 'monotonic'"),
        ({"schedule": "fixed-cosine"}, "reduce: 2 with .*schedule 'fixed-cosine'"),
        ({"rounding": False}, "reduce: 2 with .*rounding False"),
        ({"base_scales": 0}, "base_scales: 0; expected at least 1"),
        ({"stages": 1}, "stages: 1; expected 2 or more"),
    ],
)
def test_settings_that_a_cascade_does_not_have_are_refused(changes, says):
    with pytest.raises(InputError, match=f"^{says}") as no:
        vdm.VDMConfig(**MODEL | changes)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("shape", "changes", "says"),
    [
        ((12, 17), {}, r"\(12, 17, 1\); expected sides that are multiples of 2"),
        ((13, 16), {}, r"\(13, 16, 1\); expected sides that are multiples of 2"),
        ((12, 6), {}, r"\(12, 6, 1\); expected sides of at least 8 for a copy reduced 2 times and its U-Net of 2 "),
        ((12, 16), {"reduce": 4}, r"\(12, 16, 1\); expected sides of at least 16 for a copy reduced 4 times"),
        ((12, 18), {"stages": 3}, r"\(6, 9, 1\); expected sides that are multiples of 2"),
        ((12, 16), {"stages": 3}, r"\(6, 8, 1\); expected sides of at least 8 for a copy reduced 2 times"),
    ],
)
def test_images_that_cannot_be_reduced_are_refused_before_anything_is_written(shape, changes, says, tmp_path):
    config = tiny.pixels(scales=1, base_scales=2, **{"reduce": 2} | changes)
    with pytest.raises(InputError, match=f"^image_shape: {says}"):
        vdm.graph_of(vdm.VDMConfig(**MODEL | {"image_shape": (*shape, 1)} | changes))
    with pytest.raises(InputError, match=f"^image_shape: {says}") as no:
        medvdm.fit(config, tmp_path / "run", data=medvdm.from_arrays(gray(40, *shape)), progress=False)
    assert "\n" not in str(no.value) and not list(tmp_path.iterdir())


def test_settings_name_no_images_so_sides_are_judged_with_the_data():
    """A copy a third as large, of images that only the data know."""
    assert medvdm.preset("pixel", reduce=3, image_size=36).model.reduce == 3


def test_a_crop_begins_and_ends_with_a_pixel_of_the_copy():
    check(vdm.VDMConfig(**MODEL), TrainConfig(crop=6))
    with pytest.raises(InputError, match=r"^crop: 7; expected a multiple of reduce, 2$"):
        check(vdm.VDMConfig(**MODEL), TrainConfig(crop=7))


# Bayes' rule for a known mean


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pixels_with_a_known_mean_are_the_conditional_gaussian(k):
    rng, (a, b) = np.random.default_rng(k), (2, 3)
    shape = (2, a * k, b * k, 2)
    centre, variance = rng.uniform(-1, 1, shape), 10.0 ** rng.uniform(-6, 0, shape)
    shown = np.kron(rng.uniform(-1, 1, (2, a, b, 2)), np.ones((1, k, k, 1)))
    found = [np.asarray(f) for f in with_mean(*(jnp.asarray(x, jnp.float32) for x in (centre, variance, shown)), k)]
    observe = np.full((1, k * k), 1 / k**2)
    for i, row, column, channel in itertools.product(range(2), range(a), range(b), range(2)):
        cell = np.s_[i, row * k : (row + 1) * k, column * k : (column + 1) * k, channel]
        prior = np.diag(variance[cell].ravel())
        total = observe @ prior @ observe.T + likelihoods.SPACING**2 / 12
        gain = prior @ observe.T / total
        mean = centre[cell].ravel() + (gain * (shown[cell].ravel()[0] - observe @ centre[cell].ravel()))[:, 0]
        left = np.diag(prior - gain @ observe @ prior)
        np.testing.assert_allclose(found[0][cell].ravel(), mean, rtol=0, atol=2e-6 * max(1, np.abs(mean).max()))
        # 1 - g / k^2 is a difference of numbers near 1, with float32's 1e-7 in each.
        np.testing.assert_allclose(found[1][cell].ravel(), left, rtol=1e-5, atol=1e-6 * variance[cell].max())
    assert (found[1] > 0).all() and (found[1] <= variance * (1 + 1e-6)).all()


def test_what_is_shown_is_believed_where_little_else_is_known_and_not_where_all_is():
    rng, shape = np.random.default_rng(0), (3, 8, 8, 1)
    centre = jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)
    b = cascade.reduced(jnp.asarray(gray(*shape)), 4)
    shown = cascade.enlarged(likelihoods.level_values(b), 4)

    def means(x):
        return np.asarray(x).reshape(3, 2, 4, 2, 4).mean(axis=(2, 4))

    # What is left of the distance is r / (d^2 / 16 + r), with r = 1/12 of the spacing squared.
    for variance in (1.0, 1e-2, 1e-8):
        known, _ = with_mean(centre, jnp.full(shape, variance), shown, 4)
        r = likelihoods.SPACING**2 / 12
        left = (means(centre) - means(shown)) * r / (variance / 16 + r)
        np.testing.assert_allclose(means(known) - means(shown), left, atol=1e-6)
    known, _ = with_mean(centre, jnp.ones(shape), shown, 4)
    np.testing.assert_allclose(means(known), means(shown), atol=2e-4)


# The bound, where all is known

GRAY, LAW = np.array([120, 123, 126, 133]), np.array([0.4, 0.3, 0.2, 0.1])  #: of each pixel, independent of the others
GAMMAS = (-13.0, 5.0)
CELLS = np.array(list(itertools.product(range(4), repeat=4)))  #: every cell of 2 x 2
WEIGHTS = LAW[CELLS].prod(axis=1)
COPIES = np.floor(GRAY[CELLS].mean(axis=1) + 0.5).astype(int)
COPY_LAW = np.bincount(COPIES, WEIGHTS, minlength=256)


def entropy(law):
    law = law[law > 0]
    return -np.sum(law * np.log(law))


def log_law(law):
    return np.log(np.maximum(law, 1e-30))


class Known(oracle.Identity):
    """The exact denoiser of the pixels given the copy, by a sum over the cells of 2 x 2; and that of the copy."""

    config = SimpleNamespace(reduce=2)

    def __init__(self):
        super().__init__(FixedLinear(*GAMMAS))
        self.base = oracle.Levels(log_law(COPY_LAW), FixedLinear(*GAMMAS))
        self.base.config = SimpleNamespace(reduce=0)
        self.picture = likelihoods.EIGHT_BIT.picture

    def encode(self, x):
        return likelihoods.level_values(x)

    def condition(self, gamma, label):
        return gamma[:, None, None, None]

    def score(self, z, condition, shown):
        def cells(x):  # (n, a, b, 4)
            n, h, w, _ = x.shape
            return x.reshape(n, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, h // 2, w // 2, 4)

        alpha, sigma = gaussian.alpha(condition), gaussian.sigma(condition)
        values = jnp.asarray(oracle.LEVELS[GRAY[CELLS]], jnp.float32)[None, None, None]  # (1, 1, 1, 256, 4)
        far = (cells(z)[..., None, :] - alpha[..., None] * values) / sigma[..., None]
        copy = jnp.round((cells(shown)[..., :1] + 1) / likelihoods.SPACING)
        log_posterior = jnp.asarray(np.log(WEIGHTS), jnp.float32)[None, None, None] - 0.5 * jnp.sum(far**2, axis=-1)
        fits = copy == jnp.asarray(COPIES, jnp.float32)[None, None, None]
        posterior = jax.nn.softmax(jnp.where(fits, log_posterior, -jnp.inf), axis=-1)
        x_hat = jnp.sum(posterior[..., None] * values, axis=-2)
        n, a, b, _ = x_hat.shape
        x_hat = x_hat.reshape(n, a, b, 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, 2 * a, 2 * b, 1)
        return (z - alpha * x_hat) / sigma

    def observation_loss(self, x, decoded):
        return likelihoods.EIGHT_BIT.nll(x, decoded, self.gamma(jnp.zeros(())))


def test_the_bounds_of_the_two_stages_are_their_entropies_and_add_up_to_that_of_the_image():
    n, side, key, model = 2**13, 4, jax.random.key(3), Known()
    x = jnp.asarray(np.random.default_rng(0).choice(GRAY, (n, side, side, 1), p=LAW).astype(np.uint8))
    of_copy = entropy(COPY_LAW)
    of_cell = 4 * entropy(LAW)
    assert of_copy + sum(
        COPY_LAW[b] * entropy(WEIGHTS[b == COPIES] / COPY_LAW[b]) for b in np.unique(COPIES)
    ) == pytest.approx(of_cell, rel=1e-12)

    @jax.jit
    def each(x):
        first, second = cascade.stages(model, x)
        keys = (jax.random.fold_in(key, 1), key)
        parts = [bound.terms(s.model, s.images, key=k) for s, k in zip((first, second), keys, strict=True)]
        return parts, cascade.terms(model, x, key=key)

    parts, together = each(x)
    for name in ("reconstruction", "prior", "diffusion"):
        total = sum(np.asarray(getattr(part, name)) for part in parts)
        np.testing.assert_allclose(getattr(together, name), total, rtol=1e-5, atol=1e-3)

    def mean(part):  # nats per cell; images with almost the same time differ by what is random
        nats = np.asarray(part.total, np.float64)[np.argsort(part.times)] / (side // 2) ** 2
        return nats.mean(), np.sqrt(np.mean(np.diff(nats) ** 2) / 2 / n)

    (copy, copy_error), (detail, detail_error) = map(mean, parts)
    copy_gaps = oracle.levels_gaps(log_law(COPY_LAW), *GAMMAS)
    assert copy == pytest.approx(of_copy + sum(copy_gaps), abs=4 * copy_error)
    # The levels lie three apart, so that z_0 tells x, copy or not, and the decoder costs what it costs without a copy.
    # Of the prior, no more than the mean of KL(q(z_1|x) || N(0, I)) is paid for nothing.
    decoder = 4 * oracle.levels_gaps(log_law(np.bincount(GRAY, LAW, minlength=256)), *GAMMAS)[0]
    prior = float(jnp.mean(parts[1].prior)) / (side // 2) ** 2
    assert prior < 1e-3 and max(copy_error, detail_error) < 0.15
    low, high = of_cell - of_copy + decoder - 1e-4, of_cell - of_copy + decoder + prior + 1e-4
    assert low - 4 * detail_error < detail < high + 4 * detail_error
    total, error = float(np.mean(np.asarray(together.total, np.float64))) / (side // 2) ** 2, copy_error + detail_error
    assert of_cell - 4 * error < total < of_cell + sum(copy_gaps) + decoder + prior + 4 * error


# Stages of a network


def network(**changes):
    """A config, its graph and random weights everywhere."""
    config = vdm.VDMConfig(**MODEL | changes)
    return config, vdm.graph_of(config), tiny.weights(config, 0.15)


@pytest.fixture(scope="module")
def networks():
    """A cascade with classes."""
    return network(classes=2)


def test_a_model_without_a_copy_has_one_stage_and_the_plain_bound():
    _, graph, params = network(reduce=0)
    assert not hasattr(vdm.merge(graph, params), "base")
    x, key = jnp.asarray(gray(3, 12, 16, 1)), jax.random.key(5)
    found, expected = (
        jax.jit(lambda p, f=f: f(vdm.merge(graph, p), x, key=key))(params) for f in (cascade.terms, bound.terms)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    (stage,) = cascade.stages(vdm.merge(graph, params), x, crop=8, key=key)
    assert stage.images.shape == (3, 8, 8, 1) and stage.pixels == 64
    np.testing.assert_array_equal(stage.images, cascade.cut(key, [x], 8)[0])


def test_a_crop_and_its_copy_are_cut_at_the_same_place_and_the_first_stage_sees_the_whole(networks):
    config, graph, params = networks
    model, x = vdm.merge(graph, params), jnp.asarray(gray(200, 12, 16, 1))
    first, second = cascade.stages(model, x, crop=6, key=jax.random.key(0))
    np.testing.assert_array_equal(first.images, cascade.reduced(x, 2))
    assert first.model is model.base and first.pixels == 12 * 16, "its bits are shared by all pixels of the image"
    assert second.images.shape == (200, 6, 6, 1) and second.pixels == 36
    shown = cascade.enlarged(likelihoods.level_values(cascade.reduced(second.images, 2)), 2)
    np.testing.assert_array_equal(second.model.shown, shown)
    places = {
        (r, c)
        for image, square in zip(np.asarray(x[..., 0]), np.asarray(second.images[..., 0]), strict=True)
        for r, c in itertools.product(range(7), range(11))
        if (image[r : r + 6, c : c + 6] == square).all()
    }
    assert places == set(itertools.product(range(0, 7, 2), range(0, 11, 2))), "every even corner, and no other"
    whole = cascade.stages(model, x)
    np.testing.assert_array_equal(whole[1].images, x)
    assert [stage.pixels for stage in whole] == [12 * 16] * 2


def test_the_copy_of_a_copy_comes_first_and_its_bits_are_counted_over_the_image():
    _, graph, params = network(image_shape=(24, 16, 1), stages=3)
    model = vdm.merge(graph, params)
    x, key = jnp.asarray(gray(5, 24, 16, 1)), jax.random.key(0)
    first, second, third = parts = cascade.stages(model, x, crop=6, key=key)
    assert first.model is model.base.base and second.model.model is model.base and third.model.model is model
    assert (first.model.config.scales, model.base.config.scales) == (2, 1), "base_scales is that of the smallest"
    copy = cascade.reduced(x, 2)
    np.testing.assert_array_equal(first.images, cascade.reduced(copy, 2))
    np.testing.assert_array_equal(second.images, copy)
    np.testing.assert_array_equal(second.model.shown[:, ::2, ::2], likelihoods.level_values(first.images))
    assert [part.pixels for part in parts] == [24 * 16, 24 * 16, 36]
    keys = [jax.random.fold_in(key, 2), jax.random.fold_in(key, 1), key]

    @jax.jit
    def both(params):
        parts = cascade.stages(vdm.merge(graph, params), x, crop=6, key=key)
        alone = [bound.terms(part.model, part.images, key=own) for part, own in zip(parts, keys, strict=True)]
        return cascade.stage_terms(parts, key=key), alone

    for found, own in zip(*both(params), strict=True):
        np.testing.assert_array_equal(found.total, own.total)


def test_the_copy_changes_the_answer_and_a_network_without_one_takes_none(networks):
    config, graph, params = networks
    model, x = vdm.merge(graph, params), jnp.asarray(gray(2, 12, 16, 1))
    z, condition = likelihoods.level_values(x), model.condition(jnp.asarray([-3.0]), model.embed(None))
    answer = jax.jit(lambda b: cascade.given(model, cascade.reduced(b, 2)).eps_hat(z, condition))
    one, other = answer(x), answer(255 - x)
    assert one.shape == z.shape and np.abs(one - other).max() > 0.1
    assert model.base.score.reduce == 0 and model.score.reduce == 2


def test_bits_of_crops_are_those_of_whole_images_in_the_mean():
    """Images that repeat one cell, and a network of step 0: every place is as good as any other."""
    config = vdm.VDMConfig(**MODEL | {"image_shape": (8, 8, 1), "base_scales": 1})
    graph, params, n = vdm.graph_of(config), vdm.init(config, 0), 1024
    x = jnp.asarray(np.tile(gray(1, 2, 2, 1, seed=4), (n, 4, 4, 1)))

    def loss(crop, seed):
        train = TrainConfig(crop=crop)

        @jax.jit
        def one(params, key):
            model = vdm.merge(graph, params)
            stages = cascade.stages(model, x, crop=crop, key=key)
            first, second = (bound.terms(s.model, s.images, key=key) for s in stages)
            metrics = loss_fn(model, train, x, None, key)[1][0]
            return first, second, metrics

        first, second, metrics = one(params, jax.random.key(seed))

        def bits(part, pixels):
            sorted_by_time = np.asarray(part.total, np.float64)[np.argsort(part.times)] / pixels / BIT
            return sorted_by_time.mean(), np.sqrt(np.mean(np.diff(sorted_by_time) ** 2) / 2 / n)

        return bits(first, 8 * 8), bits(second, crop**2 or 8 * 8), float(metrics.vlb_bpd)

    (base, base_error), (whole, error), reported = loss(0, 0)
    (base_2, base_error_2), (crops, error_2), reported_2 = loss(4, 1)
    assert max(error, error_2) < 0.03 * whole and max(base_error, base_error_2) < 0.03 * base
    assert crops == pytest.approx(whole, abs=4 * np.hypot(error, error_2))
    assert base == pytest.approx(base_2, abs=4 * np.hypot(base_error, base_error_2))
    assert base > 20 * base_error and reported == pytest.approx(base + whole, abs=4 * np.hypot(base_error, error))
    assert reported_2 == pytest.approx(base_2 + crops, abs=4 * np.hypot(base_error_2, error_2))


def test_the_gradient_of_the_loss_reaches_every_part_of_both_networks(networks):
    config, graph, params = networks
    x, labels = jnp.asarray(gray(4, 12, 16, 1)), jnp.eye(2)[jnp.array([0, 1, 0, 1])]
    train = TrainConfig(crop=6, label_dropout=0.5)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: loss_fn(vdm.merge(graph, p), train, x, labels, jax.random.key(1))[0])(params)

    grads, _ = jax.tree_util.tree_flatten_with_path(gradient(params))
    assert {"base", "score"} <= {path[0].key for path, _ in grads}
    for path, grad in grads:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


# A run

SETTINGS = {
    **{"conditional": True, "reduce": 2, "base_scales": 2, "crop": 8, "ema_decay": 0.9},
    **{"augment_shift": 0.05, "steps": 8, "learning_rate": 3e-3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small class-conditional cascade."""
    out = tmp_path_factory.mktemp("cascade") / "run"
    medvdm.fit(tiny.pixels(**SETTINGS), out, progress=False)
    return out


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_cascade_learns_in_both_of_its_networks(trained):
    assert [step for step, _ in losses(trained)] == list(range(1, 9))
    assert losses(trained)[-1][1] < losses(trained)[0][1]
    start = vdm.init(load(trained).config.model, 0)
    for part in ("base", "score"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), load(trained).params[part], start[part])
        assert max(jax.tree.leaves(moved)) > 1e-3, part


@pytest.mark.slow
def test_a_cascade_that_was_stopped_and_resumed_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    real = loop.train

    def stopped(*arguments, hooks, **more):
        def stop(number):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return hooks.stop(number)

        return real(*arguments, hooks=dataclasses.replace(hooks, stop=stop), **more)

    with monkeypatch.context() as patch, pytest.raises(errors.StoppedError, match="SIGTERM: saved step 3"):
        patch.setattr(loop, "train", stopped)
        medvdm.fit(tiny.pixels(**SETTINGS), tmp_path / "run", progress=False)
    medvdm.fit(tiny.pixels(**SETTINGS), tmp_path / "run", resume=True, progress=False)
    assert losses(tmp_path / "run") == losses(trained)
    for ema in (False, True):
        one, other = (load(path, ema=ema).params for path in (tmp_path / "run", trained))
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_four_fake_devices_equal_one_for_a_cascade(trained, tmp_path):
    settings = {name: value for name, value in {**tiny.PIXELS, **SETTINGS}.items() if name != "conditional"}
    words = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    out = tmp_path / "run"
    done = tiny.medvdm_command("train", "--preset", "pixel", "--conditional", "--out", out, *words, devices=4)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(out), losses(trained), rtol=1e-3)


def test_the_evaluation_of_a_cascade_is_the_sum_of_both_stages(trained):
    run = load(trained)
    found = medvdm.evaluate(run, split="val", draws=2, save=False)
    parts = [found[f"{name}_bpd"] for name in ("reconstruction", "diffusion", "latent")]
    assert found["vlb_bpd"] == pytest.approx(sum(parts), rel=1e-6) and np.isfinite(parts).all()
    x, labels, key = jnp.asarray(gray(2, 16, 16, 1)), jnp.eye(2), jax.random.key(0)

    @jax.jit
    def both(params, key, times):
        stages = cascade.stages(vdm.merge(run.graph, params), x)
        keys = (jax.random.fold_in(key, 1), key)
        return [
            bound.terms(s.model, s.images, labels, key=k, times=times).total for s, k in zip(stages, keys, strict=True)
        ]

    terms = bound_terms(run.graph, run.params, x, labels, draws=2, key=key)
    key_times, key_noise = jax.random.split(key)
    times = bound.spread_times(key_times, 2, 2)
    for draw, total in enumerate(terms.total):
        first, second = both(run.params, jax.random.fold_in(key_noise, draw), times[draw])
        assert min(first.min(), second.min()) > 0
        np.testing.assert_allclose(total, first + second, rtol=1e-4)


def test_samples_of_a_cascade_are_those_of_their_seed_in_any_batch_with_label_and_guidance(trained):
    run = load(trained)
    settings = {"steps": 4, "label": "Pneumonia", "seed": 3, "num_states": 2}
    plain = medvdm.sample(run, 5, **settings)
    assert plain.images.shape == (5, 16, 16, 1) and plain.states.shape == (2, 5, 16, 16, 1)
    np.testing.assert_allclose(255 * plain.images, np.rint(255 * plain.images), atol=1e-4)
    parts = medvdm.sample(run, 5, batch_size=2, **settings)
    # Another batch size rounds otherwise, and a gray value on the edge of two may fall to the other one, in the copy
    # too, after which the detail is that of another copy: by a gray value or two.
    np.testing.assert_allclose(parts.images, plain.images, atol=3.01 / 255)
    assert np.mean(parts.images != plain.images) < 0.01
    for changes in ({"guidance": 2.0}, {"seed": 4}, {"label": ()}):
        assert np.abs(medvdm.sample(run, 5, **settings | changes).images - plain.images).max() > 0, changes


def test_the_reduced_copy_of_a_sample_is_the_one_that_the_first_stage_drew_with_noise_of_its_own(trained, monkeypatch):
    run, drawn, noise = load(trained), [], []

    def kept(model, b):
        jax.debug.callback(lambda b: drawn.append(np.asarray(b)), b)
        return real(model, b)

    def noted(model, z, *arguments, keys, **more):
        jax.debug.callback(
            lambda keys, z: noise.append((np.asarray(keys), np.asarray(z))), jax.random.key_data(keys), z
        )
        return chain(model, z, *arguments, keys=keys, **more)

    real, chain = cascade.given, generate_.chain
    monkeypatch.setattr(generate_, "chain", noted)
    monkeypatch.setattr(generate_.cascade, "given", kept)
    generate_._generate.clear_cache()
    images = medvdm.sample(run, 4, steps=32, seed=1).images
    jax.effects_barrier()
    generate_._generate.clear_cache()
    (b,) = drawn
    (first, z), (second, z_2) = sorted(noise, key=lambda both: both[1].size)  # the copy's comes first
    assert z.shape == (4, 8, 8, 1) and z_2.shape == images.shape
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 8, "a key for each sample and stage"
    assert not np.isin(z, z_2).any()
    copies = cascade.reduced(jnp.asarray(np.rint(255 * images), jnp.uint8), 2)
    cut_off = ((images == 0) | (images == 1)).reshape(4, 8, 2, 8, 2, 1).any(axis=(2, 4))  # by black or white
    far = np.abs(np.asarray(copies, int) - b.astype(int))[~cut_off]
    assert b.shape == (4, 8, 8, 1) and b.std() > 10 and len(far) > 100
    assert far.max() <= 1, np.bincount(far)


@pytest.mark.slow
def test_a_chain_of_three_stages_is_trained_evaluated_and_drawn_from(tmp_path):
    config = tiny.pixels(**SETTINGS | {"stages": 3, "base_scales": 1})
    run = load(medvdm.fit(config, tmp_path / "run", progress=False).path)
    assert run.model.base.base.config.image_shape == (4, 4, 1)
    assert np.isfinite(medvdm.evaluate(run, split="val", draws=2, save=False)["vlb_bpd"])
    images = medvdm.sample(run, 3, steps=4, seed=0).images
    assert images.shape == (3, 16, 16, 1) and len(np.unique(images)) > 10
    np.testing.assert_array_equal(medvdm.sample(run, 3, steps=4, seed=0).images, images)


def test_a_cascade_begins_at_the_first_step_with_a_start_for_each_stage(trained):
    run = load(trained)
    whole = np.zeros((2, 16, 16, 1), np.float32)
    for given, says in (
        ({"first": 3}, r"^first: given, with reduce 2; expected none, "),
        ({"z": whole}, r"^z: shape \(2, 16, 16, 1\); expected \(2, 8, 8, 1\), \(2, 16, 16, 1\)$"),
        ({"z": [whole, whole]}, r"^z: shape \(2, 16, 16, 1\), \(2, 16"),
    ):
        with pytest.raises(InputError, match=says) as no:
            medvdm.sample(run, 2, steps=4, **given)
        assert "\n" not in str(no.value)


# Where in the image


@pytest.mark.parametrize("changes", [{"reduce": 0}, {}, {"stages": 3, "image_shape": (16, 24, 2), "base_scales": 1}])
def test_a_map_sums_to_the_bound_of_the_whole_and_a_copy_is_spread_evenly(changes):
    config, graph, params = network(**changes)
    x = jnp.asarray(gray(3, *config.image_shape))
    settings = {"key": jax.random.key(5), "times": jnp.array([0.1, 0.4, 0.8])}

    @jax.jit
    def each(params, x):
        model = vdm.merge(graph, params)
        *smaller, last = cascade.stages(model, x)
        own = bound.pixel_terms(last.model, last.images, **settings).total
        return cascade.map_of_terms(model, x, **settings), cascade.terms(model, x, **settings).total, own, len(smaller)

    found, total, own, copies = each(params, x)
    assert found.shape == x.shape and copies == (config.stages - 1 if config.reduce else 0)
    np.testing.assert_allclose(np.asarray(found, np.float64).sum(axis=(1, 2, 3)), total, rtol=1e-5)
    k = config.reduce or 1
    of_copies = np.asarray(found - own, np.float64)
    cells = of_copies.reshape(3, x.shape[1] // k, k, x.shape[2] // k, k, -1)
    np.testing.assert_allclose(cells, np.broadcast_to(cells[:, :, :1, :, :1], cells.shape), atol=1e-3)
    assert (of_copies.sum() > 1) == bool(config.reduce)
