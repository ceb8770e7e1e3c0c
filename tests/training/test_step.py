"""The pure training step: the learning rate, where it acts, and what one step does to the state."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medvdm.errors import InputError
from medvdm.models import cascade, vdm
from medvdm.theory import bound
from medvdm.training import augmentation
from medvdm.training import step as step_
from medvdm.training.step import TrainConfig, TrainState, init_state, jit_step, learning_rate, loss_fn, make_step


def formula(config, k):
    warmup = min(k / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    a = config.final_fraction
    return config.learning_rate * warmup * (a + (1 - a) * 0.5 * (1 + math.cos(math.pi * k / config.steps)))


@pytest.mark.parametrize("warmup", [0, 250])
def test_learning_rate_is_warmup_times_cosine_to_the_last_step(warmup):
    config = TrainConfig(steps=1000, warmup_steps=warmup)
    rate = learning_rate(config)
    for k in (0, 1, 100, 249, 250, 251, 500, 800, 999, 1000):
        np.testing.assert_allclose(rate(k), formula(config, k), rtol=1e-4, atol=1e-10)
    assert float(rate(1000)) == pytest.approx(8e-4 * 1e-5, rel=1e-2)


def updates_of(config, gradients, params):
    """The updates of successive gradients, each a pytree like ``params``, which stays where it is."""
    optimiser = step_.optimiser(config)
    state, updates = optimiser.init(params), []
    for gradient in gradients:
        update, state = optimiser.update(gradient, state, params)
        updates.append(update)
    return updates


def test_the_update_scales_with_the_schedule_so_the_cosine_comes_after_adam():
    # With a constant gradient Adam's direction is the sign of the gradient: the update's size is the learning rate.
    # Scaling the *gradient* instead is undone by Adam: the update would then fall far too slowly.
    config = TrainConfig(steps=50, warmup_steps=5, weight_decay=0.0)
    params = {"w": jnp.asarray([1.0, -2.0])}
    gradient = {"w": jnp.asarray([0.3, -40.0])}
    for k, update in enumerate(updates_of(config, [gradient] * 50, params)):
        np.testing.assert_allclose(update["w"], -formula(config, k) * np.array([1, -1]), rtol=1e-3, atol=1e-9)


def test_adam_follows_its_textbook_with_the_configured_moments():
    config = TrainConfig(steps=100, warmup_steps=0, weight_decay=0.0, b1=0.8, b2=0.95)
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((6, 3)).astype(np.float32)
    m = v = np.zeros(3)
    updates = updates_of(config, [{"w": jnp.asarray(g)} for g in gradients], {"w": jnp.ones(3)})
    for k, (g, update) in enumerate(zip(gradients, updates, strict=True)):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        direction = m / (1 - 0.8 ** (k + 1)) / (np.sqrt(v / (1 - 0.95 ** (k + 1))) + 1e-8)
        np.testing.assert_allclose(update["w"], -formula(config, k) * direction, rtol=2e-4)


def test_weight_decay_is_decoupled_from_the_gradients_scale():
    config = TrainConfig(steps=100, warmup_steps=0, weight_decay=0.1)
    params = {"w": jnp.asarray([2.0, -3.0])}
    (still,) = updates_of(config, [{"w": jnp.zeros(2)}], params)
    np.testing.assert_allclose(still["w"], -formula(config, 0) * 0.1 * np.array([2.0, -3.0]), rtol=1e-4)
    for size in (1.0, 1e3):  # as part of the gradient, decay would vanish in Adam's normalisation
        (update,) = updates_of(config, [{"w": jnp.full(2, size)}], params)
        np.testing.assert_allclose(update["w"], -formula(config, 0) * (1 + 0.1 * np.array([2.0, -3.0])), rtol=1e-3)


def test_clipping_bounds_the_global_norm_before_adam():
    config = TrainConfig(steps=100, warmup_steps=0, clip_norm=1.0, weight_decay=0.0)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    large, little = (
        {"a": jnp.asarray([30.0, 0.0]), "b": jnp.asarray([40.0])},
        {"a": jnp.asarray([0.3, 0.1]), "b": jnp.ones(1) / 5},
    )
    unit = jax.tree.map(lambda g: g / 50.0, large)
    clipped = updates_of(config, [large, little], params)
    by_hand = updates_of(dataclasses.replace(config, clip_norm=0.0), [unit, little], params)
    unclipped = updates_of(dataclasses.replace(config, clip_norm=0.0), [large, little], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, by_hand)
    assert abs(float(clipped[1]["b"][0] - unclipped[1]["b"][0])) > 1e-5


# --- the step

TRAIN = TrainConfig(steps=60, batch_size=8, warmup_steps=3, learning_rate=3e-3, ema_decay=0.9)


def batch(config, n=8):
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.1, 0.9, math.prod(config.image_shape)).reshape(config.image_shape)
    images = np.clip(ramp + 0.05 * rng.standard_normal((n, *config.image_shape)), 0, 1).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(np.eye(config.classes, dtype=np.float32)[np.arange(n) % config.classes])


def state_of(params, train):
    params = jax.tree.map(jnp.copy, params)
    ema = jax.tree.map(jnp.copy, params) if train.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, step_.optimiser(train).init(params), ema)


@pytest.fixture(scope="module")
def trained(small):
    """States and metrics of a whole short run, which leaves' memory a step took over, compilations."""
    config, _, params = small
    step = jit_step(config, TRAIN)
    state = state_of(params, TRAIN)
    states, metrics = [jax.device_get(state)], []
    images, labels = batch(config)
    fresh = state_of(params, TRAIN)  # never read on the host, which would hold its memory
    step(fresh, images, labels)
    donated = [p.is_deleted() for p in jax.tree.leaves((fresh.params, fresh.ema, fresh.opt_state))]
    for _ in range(TRAIN.steps):
        state, m = step(state, images, labels)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(m))
    return states, metrics, donated, step.program._cache_size()


def test_loss_falls_on_a_tiny_problem_and_steps_are_counted(trained):
    states, metrics, _, compiled = trained
    losses = [float(m.loss) for m in metrics]
    assert np.all(np.isfinite(losses)) and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert int(states[-1].step) == 60 and compiled == 1


def test_metrics_are_the_terms_in_bits_per_dimension(trained, small):
    _, metrics, _, _ = trained
    for m in metrics:
        assert m.vlb_bpd == pytest.approx(m.reconstruction_bpd + m.latent_bpd + m.diffusion_bpd, rel=1e-4)
        assert m.loss == m.vlb_bpd  # no gradient-difference term
    config, graph, params = small
    images, labels = batch(config)
    key = jax.random.fold_in(jax.random.key(TRAIN.seed), 0)
    _, (direct, terms) = loss_fn(vdm.merge(graph, params), TRAIN, images, labels, key)
    nats = bound.terms(vdm.merge(graph, params), images, key=jax.random.split(key)[0])
    assert direct.vlb_bpd == pytest.approx(metrics[0].vlb_bpd, rel=1e-4)
    assert direct.reconstruction_bpd == pytest.approx(float(nats.reconstruction.mean()) / 24 / math.log(2), rel=1e-4)
    assert direct.latent_bpd == pytest.approx(float(nats.prior.mean()) / 24 / math.log(2), rel=1e-4)


def test_old_states_memory_is_reused(trained):
    assert all(trained[2])


def test_average_of_weights_follows_them(trained):
    states = trained[0]
    for before, after in zip(states[:5], states[1:6], strict=True):
        decay = min(0.9, (1 + int(before.step)) / (10 + int(before.step)))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, before.ema, after.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.ema, expected)
    lag = [float(np.max(np.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (after.ema, after.params)), strict=True)]
    assert max(lag) > 1e-4


def test_the_average_begins_short_and_is_no_worse_than_the_weights_after_a_short_run(small):
    """120 steps at decay 0.999: without a warm-up the initial weights would still count 89 %."""
    config, graph, params = small
    steps, train = 120, dataclasses.replace(TRAIN, steps=120, ema_decay=0.999)
    decays = np.array([float(step_.ema_decay(train, k)) for k in range(steps)])
    np.testing.assert_allclose(decays, [min(0.999, (1 + k) / (10 + k)) for k in range(steps)], rtol=1e-6)
    assert np.prod(decays) < 1e-12  # the share of the initial weights
    assert float(step_.ema_decay(train, 10**5)) == np.float32(0.999)
    step, state = jit_step(config, train), state_of(params, train)
    images, labels = batch(config)
    slow = jax.tree.map(np.asarray, params)
    for _ in range(steps):
        state, _ = step(state, images, labels)
        slow = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * np.asarray(p), slow, state.params)

    @jax.jit
    def loss(params):
        model = vdm.merge(graph, params)
        keys = jax.random.split(jax.random.key(1), 20)
        return jnp.mean(jax.lax.map(lambda key: loss_fn(model, train, images, labels, key)[0], keys))

    start, raw, average, without = (float(loss(p)) for p in (params, state.params, state.ema, slow))
    assert raw < 0.8 * start
    assert average - raw < 0.1 * (start - raw)
    assert without - raw > 0.5 * (start - raw)  # the test could fail


def test_runs_that_differ_in_their_numbers_share_one_program_and_its_numbers_are_theirs(small):
    config, _, params = small
    images, labels = batch(config)
    shared = jit_step(config, TRAIN)
    for changes in (
        {"seed": 7, "steps": 35, "final_fraction": 0.1, "warmup_steps": 0},
        {"learning_rate": 1e-2, "warmup_steps": 40, "batch_size": 3},
    ):
        train = dataclasses.replace(TRAIN, **changes)
        step = jit_step(config, train)
        assert step.program is shared.program
        late = state_of(params, train)._replace(step=jnp.asarray(30, jnp.int32))
        late = late._replace(opt_state=optax.tree.set(late.opt_state, count=jnp.asarray(30, jnp.int32)))
        alone, of_alone = jax.jit(make_step(config, train))(late, images, labels)
        found, metrics = step(jax.tree.map(jnp.copy, late), images, labels)
        np.testing.assert_allclose(metrics, of_alone, rtol=1e-4)
        # By the norm, as Adam takes a whole step also where a gradient is nothing but rounding.
        wrong, moved = (float(optax.tree.norm(optax.tree.sub(alone.params, other))) for other in (found.params, params))
        assert wrong < 0.01 * moved and moved > 0
        as_shared, _ = shared(jax.tree.map(jnp.copy, late), images, labels)
        assert float(optax.tree.norm(optax.tree.sub(alone.params, as_shared.params))) > 0.1 * moved
    for changes in ({"ema_decay": 0.5}, {"b2": 0.9}, {"clip_norm": 1.0}, {"label_dropout": 0.5}):
        assert jit_step(config, dataclasses.replace(TRAIN, **changes)).program is not shared.program
    assert jit_step(dataclasses.replace(config, latent=5), TRAIN).program is not shared.program


def test_new_states_are_those_of_their_seed():
    config = vdm.VDMConfig(
        image_shape=(2, 2, 1), latent=2, embedding_dim=2, encoder_width=2, decoder_width=2, inner_width=2,
        encoder_layers=0, decoder_layers=0, score_layers=1,
    )  # fmt: skip
    for seed in (0, 3):
        train = TrainConfig(seed=seed, ema_decay=0.5)
        made, pure = step_.new_state(config, train), init_state(config, train)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), made, pure)


def test_the_first_step_of_the_warmup_changes_nothing_and_the_second_does(trained):
    states = trained[0]
    jax.tree.map(np.testing.assert_array_equal, states[1].params, states[0].params)
    assert not np.array_equal(
        states[2].params["decoder"]["enter"]["kernel"], states[1].params["decoder"]["enter"]["kernel"]
    )


def gradient(small, train, config=None, **change):
    config, graph, params = small if config is None else (config, vdm.graph_of(config), small[2])
    images, labels = batch(config)

    def loss(params):
        return loss_fn(vdm.merge(graph, params), train, images, labels, jax.random.key(5))[0]

    return jax.jit(jax.value_and_grad(loss))({**params, **change})


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_label_dropout_trains_the_null_row(small, dropout):
    labels = gradient(small, dataclasses.replace(TRAIN, label_dropout=dropout))[1]["labels"]
    null, table = np.abs(labels["null"]).max(), np.abs(labels["table"]).max()
    assert (null > 0) == (dropout > 0) and (table > 0) == (dropout < 1)


def test_bfloat16_arithmetic_leaves_parameters_and_loss_float32(small):
    config = dataclasses.replace(small[0], dtype="bfloat16")
    train = dataclasses.replace(TRAIN, warmup_steps=0)
    state, metrics = jit_step(config, train)(state_of(small[2], train), *batch(config))
    assert {p.dtype for p in jax.tree.leaves((state.params, state.ema, metrics))} == {np.dtype("float32")}
    full, _ = gradient(small, train)
    half, _ = gradient(small, train, config)
    assert float(half) == pytest.approx(float(full), rel=0.05) and half != full


def test_gradient_difference_term_enters_the_loss_with_its_weight_and_not_the_bound(small):
    config, graph, params = small
    images, labels = batch(config)
    model, key = vdm.merge(graph, params), jax.random.key(5)
    plain, (of_plain, _) = loss_fn(model, TRAIN, images, labels, key)
    weighted, (of_weighted, _) = loss_fn(
        model, dataclasses.replace(TRAIN, gradient_difference_weight=0.5), images, labels, key
    )
    key_bound = jax.random.split(key)[0]
    term = bound.terms(model, images, key=key_bound, with_gradient_difference=True).gradient_difference
    assert weighted - plain == pytest.approx(0.5 * float(term.mean()) / 24 / math.log(2), rel=1e-3)
    assert of_weighted.vlb_bpd == of_plain.vlb_bpd == plain


def test_augmentation_has_a_key_of_its_own_at_each_step_and_seed(small, monkeypatch):
    """Neither the step's key, which the loss gets, nor one of the two that the loss splits it into."""
    config, _, params = small

    class Stop(Exception):
        pass

    def stop(*arguments):
        raise Stop(arguments[-1])

    def keys_of(seed, step):
        seen = []
        monkeypatch.setattr(augmentation, "augment", lambda key, images, **_: (seen.append(key), images)[1])
        monkeypatch.setattr(step_, "gradient", stop)
        train = dataclasses.replace(TRAIN, seed=seed)
        state = state_of(params, train)._replace(step=jnp.asarray(step, jnp.int32))
        with pytest.raises(Stop) as stopped:
            make_step(config, train)(state, *batch(config))
        (own,), (of_loss,) = seen, stopped.value.args
        return [tuple(np.asarray(jax.random.key_data(key))) for key in (own, of_loss, *jax.random.split(of_loss))]

    steps = {(seed, step): keys_of(seed, step) for seed in (0, 1) for step in (0, 1, 2)}
    every = [key for keys in steps.values() for key in keys]
    assert len(set(every)) == len(every) == 24
    assert keys_of(1, 2) == steps[1, 2]


def test_initial_state_is_a_pure_function_of_the_configs():
    config = vdm.VDMConfig(
        image_shape=(2, 2, 1), latent=2, embedding_dim=2, encoder_width=2, decoder_width=2, inner_width=2,
        encoder_layers=0, decoder_layers=0, score_layers=1,
    )  # fmt: skip
    first, again = (init_state(config, TrainConfig(seed=3, ema_decay=0.5)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, first.ema, first.params)
    other = init_state(config, TrainConfig(seed=4))
    assert other.ema is None and int(other.step) == 0
    assert not np.array_equal(other.params["encoder"]["enter"]["kernel"], first.params["encoder"]["enter"]["kernel"])
    assert isinstance(optax.tree.get(first.opt_state, "mu"), dict)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 0}, {"learning_rate": float("nan")}, {"learning_rate": -1.0}, {"b2": 1.0},
     {"ema_decay": 1.0}, {"label_dropout": 1.5}, {"clip_norm": -1.0}, {"final_fraction": 2.0}],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig(**wrong)


# --- a diffusion on pixels


PIXELS = vdm.VDMConfig(
    **{"image_shape": (12, 10, 1), "architecture": "unet", "width": 4, "blocks": 1, "embedding_dim": 4},
    **{"gamma_min": -13.0, "gamma_max": 5.0},
)


def gray_values(n=4, shape=(12, 10, 1)):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (n, *shape)), jnp.uint8)


def test_noisy_times_weigh_more_in_the_loss_and_no_more_in_the_bound():
    """Of a cascade, at both stages, and each per pixel of its own."""
    model = vdm.VDMConfig(**{**dataclasses.asdict(PIXELS), "image_shape": (12, 12, 1), "reduce": 2, "base_scales": 1})
    params, x, key = vdm.init(model, 0), gray_values(shape=(12, 12, 1)), jax.random.key(1)

    @partial(jax.jit, static_argnames="weight")
    def found(params, weight):
        network = vdm.merge(vdm.graph_of(model), params)
        loss, (metrics, _) = loss_fn(network, TrainConfig(crop=6, noise_weight=weight), x, None, key)
        parts = cascade.stages(network, x, crop=6, key=jax.random.fold_in(key, 3))
        return loss, metrics, cascade.stage_terms(parts, None, key=jax.random.split(key)[0])

    plain, before, terms = found(params, 0.0)
    loss, metrics, _ = found(params, 3.0)
    more = sum(
        float(jnp.mean((1 / (1 + jnp.exp(13.0 - 18.0 * one.times))) * one.diffusion)) / pixels / np.log(2)
        for one, pixels in zip(terms, (144, 36), strict=True)
    )
    assert float(loss) == pytest.approx(float(plain) + 3 * more, rel=1e-5) and more > 0.01
    assert metrics.vlb_bpd == before.vlb_bpd == plain
    with pytest.raises(InputError, match=r"^noise_weight: 3.0 with schedule 'monotonic'; expected 0"):
        step_.check(vdm.VDMConfig(schedule="monotonic"), TrainConfig(noise_weight=3.0))


@pytest.mark.parametrize("crop", [0, 6])
def test_a_step_on_pixels_reports_the_loss_of_its_crops_and_lowers_it(crop):
    """The crops are those of a key of their own, and the loss is per pixel of a crop."""
    config = TrainConfig(steps=8, batch_size=4, learning_rate=3e-3, warmup_steps=0, crop=crop)
    state, images = init_state(PIXELS, config), gray_values()
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    seen = cascade.cut(jax.random.fold_in(key, 3), [images], crop)[0] if crop else images

    @jax.jit
    def loss_of(params, seen):
        return loss_fn(vdm.merge(vdm.graph_of(PIXELS), params), config, seen, None, key)[0]

    before = loss_of(state.params, seen)
    shapes = jax.tree.map(lambda p: p.shape, state.params)
    state, metrics = jit_step(PIXELS, config)(state, images, None)
    np.testing.assert_allclose(metrics.loss, before, rtol=1e-5)
    assert float(metrics.loss) == float(metrics.vlb_bpd) > 1
    assert jax.tree.map(lambda p: p.shape, state.params) == shapes
    for _ in range(7):
        state, metrics = jit_step(PIXELS, config)(state, images, None)
    assert loss_of(state.params, seen) < before


def test_crops_have_a_key_of_their_own_at_each_step(monkeypatch):
    """Neither that of the augmentation, nor the step's key, nor one of the two that the loss splits it into."""

    class Stop(Exception):
        pass

    def stop(*_, key, **__):
        seen.append(key)
        raise Stop

    seen, config = [], TrainConfig(crop=6, augment_shift=0.1)
    monkeypatch.setattr(cascade, "cut", lambda key, images, *_: (seen.append(key), images)[1])
    monkeypatch.setattr(augmentation, "augment", lambda key, images, **_: (seen.append(key), images)[1])
    monkeypatch.setattr(bound, "terms", stop)
    for number in (0, 1):
        state = init_state(PIXELS, config)._replace(step=jnp.asarray(number, jnp.int32))
        with pytest.raises(Stop):
            make_step(PIXELS, config)(state, gray_values(), None)
        step_key = jax.random.fold_in(jax.random.key(config.seed), number)
        seen.extend([step_key, jax.random.split(step_key)[1]])
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in seen}) == len(seen) == 10


def test_the_gradient_of_a_learned_schedule_is_of_the_pixels_of_a_crop():
    """Cut out before or inside, the loss and its gradient are the same, those of the spread of the loss too."""
    model = dataclasses.replace(PIXELS, schedule="monotonic")
    config = TrainConfig(batch_size=4, schedule_objective="variance", crop=6)
    params, images, key = vdm.new_params(model, 0), gray_values(), jax.random.key(5)
    (cut,) = cascade.cut(jax.random.fold_in(key, 3), [images], 6)

    def gradient(config, images):
        return jax.jit(lambda p, x: step_.gradient(vdm.graph_of(model), config, p, x, None, key)[0])(params, images)

    inside, before = gradient(config, images), gradient(dataclasses.replace(config, crop=0), cut)
    assert max(np.abs(g).max() for g in jax.tree.leaves(inside["schedule"])) > 0
    for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        ({"architecture": "residual"}, {"crop": 8}, "crop: 8 with architecture 'residual'; expected 'unet'"),
        ({"architecture": "linear-start"}, {"crop": 8}, "crop: 8 with architecture 'linear-start'; expected 'unet'"),
        ({}, {"crop": 3}, "crop: 3; expected at least 4, the smallest side that the U-Net takes"),
        ({}, {"augment_size": 0.1}, "augment_size: 0.1 with architecture 'unet'; expected 0, since its 8-bit"),
        ({}, {"augment_exposure": 0.2}, "augment_exposure: 0.2 with architecture 'unet'; expected 0"),
        ({}, {"gradient_difference_weight": 1.0}, "gradient_difference_weight: 1.0 with architecture 'unet'"),
    ],
)
def test_settings_that_do_not_fit_the_likelihood_or_the_networks_are_refused(model, changes, says):
    with pytest.raises(InputError) as no:
        make_step(dataclasses.replace(PIXELS, **model), TrainConfig(**changes))
    assert str(no.value).startswith(says) and "\n" not in str(no.value)
