"""The objective of a schedule's interior: one backward pass gives the gradients that two would, and they lead there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import medvdm
from medvdm.errors import InputError
from medvdm.models import vdm
from medvdm.models.vdm import VDMConfig
from medvdm.runs import config as config_
from medvdm.theory import bound, schedules
from medvdm.training import schedule_variance
from medvdm.training import step as step_
from medvdm.training.step import (
    TrainConfig,
    TrainState,
    gradient,
    init_state,
    jit_step,
    loss_fn,
    make_step,
)

LEARNED = TrainConfig(steps=60, batch_size=8, warmup_steps=0, schedule_objective="variance", weight_decay=0.0)


def monotonic(small, *, learn_ends=True):
    """The tests' small VDM with random weights, and a bent monotonic schedule: config, graph, parameters."""
    config = dataclasses.replace(small[0], schedule="monotonic", learn_ends=learn_ends)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), vdm.init(config, 0)["schedule"]
    )
    return config, vdm.graph_of(config), {**small[2], "schedule": moved}


def batch(config, n=8):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.05, 0.95, (n, *config.image_shape)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(np.eye(config.classes, dtype=np.float32)[np.arange(n) % config.classes])


def close(one, two, rtol=2e-4):
    """Equal up to rounding: each leaf by its own largest entry."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max())), one, two
    )


# --- the gradient


def spread_by_hand(losses, in_time):
    """The two measures, by the order of the times instead of the wrapped neighbours."""
    return jnp.mean(losses**2) if in_time is None or len(in_time) == 1 else jnp.mean(jnp.diff(losses[in_time]) ** 2) / 2


@pytest.mark.parametrize("stratified", [True, False])
def test_one_pass_gives_the_gradient_of_two_to_all_digits(stratified):
    net = schedules.MonotonicNetwork(-4.0, 2.0, hidden=8, learn_ends=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    rng, n = np.random.default_rng(0), 9
    times = np.mod(0.37 + np.arange(n) / n, 1.0) if stratified else rng.random(n)
    in_time = np.argsort(times) if stratified else None
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        x, u = jnp.asarray(rng.standard_normal((n, 3))), jnp.asarray(times)

        def losses_of(params, probe=None):
            model = oracle.Isotropic(0.7, nnx.merge(graph, params))
            return bound.diffusion_loss(model, x, jnp.zeros((n, 1)), u, jax.random.key(1), probe)

        @jax.jit
        def both(params):
            losses = losses_of(params)
            by = jax.grad(lambda probe: losses_of(params, probe).sum())(bound.Probe(jnp.zeros(n), jnp.zeros(n)))
            one = schedule_variance.gradient(
                lambda p: nnx.merge(graph, p), params, u, losses, by, stratified=stratified
            )
            return one, jax.grad(lambda p: spread_by_hand(losses_of(p), in_time))(params)

        one, two = both(params)
        assert len(jax.tree.leaves(one)) == 7 and one["w3"][...].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), one, two)


def test_in_the_whole_model_the_interior_follows_the_spread_and_all_else_the_bound(small):
    config, graph, params = monotonic(small)
    train = dataclasses.replace(LEARNED, gradient_difference_weight=0.1)
    images, labels = batch(config)
    key = jax.random.key(3)

    def both(params):  # the second all the way through the score network again
        model = vdm.merge(graph, params)
        loss, (metrics, terms) = loss_fn(model, train, images, labels, key)
        return jnp.stack([loss, spread_by_hand(terms.diffusion, jnp.argsort(terms.times))]), metrics

    @jax.jit
    def all_three(params):
        two, metrics = jax.jacrev(both, has_aux=True)(params)
        return two, metrics, gradient(graph, train, params, images, labels, key)

    two, metrics, (grads, reported) = all_three(params)
    by_bound, by_spread = (jax.tree.map(lambda g, i=i: g[i], two) for i in (0, 1))
    assert set(params["schedule"]) == {"w1", "b1", "w2", "b2", "w3", "ends"}
    for name in params:
        if name != "schedule":
            close(grads[name], by_bound[name])
    close(grads["schedule"]["ends"], by_bound["schedule"]["ends"])
    interior = [name for name in params["schedule"] if name != "ends"]
    scale = max(float(jnp.abs(by_spread["schedule"][name]).max()) for name in interior)
    for name in interior:  # in single precision a sum of opposite terms keeps fewer digits
        np.testing.assert_allclose(grads["schedule"][name], by_spread["schedule"][name], rtol=1e-3, atol=1e-4 * scale)
        assert np.abs(grads["schedule"][name]).max() > 0
    np.testing.assert_allclose(reported, metrics, rtol=1e-5)


def test_a_probe_is_a_change_of_gamma_and_of_its_slope():
    # A schedule moved by a constant, and one turned about its middle, at a single time.
    f, u, key = jnp.ones((5, 3)), jnp.full((5,), 0.5), jax.random.key(0)
    base = oracle.Isotropic(0.7, schedules.FixedLinear(-4.0, 2.0))
    for low, high, probe in ((-3.8, 2.2, (0.2, 0.0)), (-4.1, 2.1, (0.0, 0.2))):
        moved = oracle.Isotropic(0.7, schedules.FixedLinear(low, high))
        probe = bound.Probe(*(jnp.full((5,), value) for value in probe))
        label = jnp.zeros((5, 1))
        np.testing.assert_allclose(
            bound.diffusion_loss(base, f, label, u, key, probe),
            bound.diffusion_loss(moved, f, label, u, key),
            rtol=1e-5,
        )


# --- the two measures of spread


def test_within_strata_takes_neighbours_in_time_only():
    u = jnp.mod(0.6 + jnp.arange(5) / 5, 1.0)  # 0.6, 0.8, 0, 0.2, 0.4
    losses = jnp.asarray([7.0, 100.0, 1.0, 2.0, 4.0])
    in_order = np.array([1.0, 2.0, 4.0, 7.0, 100.0])
    assert float(schedule_variance.within_strata(losses, u)) == pytest.approx(np.mean(np.diff(in_order) ** 2) / 2)
    assert float(schedule_variance.within_strata(losses[:1], u[:1])) == 49.0
    assert float(schedule_variance.second_moment(losses)) == pytest.approx(np.mean(np.asarray(losses) ** 2))


def test_the_measures_of_spread_are_the_variances_of_the_batch_mean():
    # n times the variance of the mean of n losses, for x ~ N(0, s^2 I) and its exact denoiser, whose moments are known.
    s, d, n, batches = 0.7, 4, 32, 2000
    schedule = schedules.FixedCosine(-4.0, 3.0)
    t = (np.arange(4000) + 0.5) / 4000
    gamma, slope = (np.asarray(v, np.float64) for v in schedules.with_slope(schedule, jnp.asarray(t, jnp.float32)))
    m = d * slope * oracle.isotropic_mse(s, gamma) / 2  # the mean of the loss at each time
    v = 2 / d * m**2  # and its variance
    offsets, later = m.reshape(n, -1).mean(0), len(t) // n
    exact_of_mean = {True: v.mean() + n * offsets.var(), False: v.mean() + m.var()}
    pairs = (v[:-later] + v[later:] + (m[later:] - m[:-later]) ** 2) / 2
    exact = {True: pairs.mean(), False: v.mean() + np.mean(m**2)}
    assert exact[True] < 1.3 * exact_of_mean[True]  # neighbours are close enough

    @jax.jit
    @jax.vmap
    def draw(key):
        key_x, key_u, key_eps = jax.random.split(key, 3)
        x = s * jax.random.normal(key_x, (n, d))
        out = []
        for stratified in (True, False):
            u = bound.sample_times(key_u, n, stratified=stratified)
            losses = bound.diffusion_loss(oracle.Isotropic(s, schedule), x, jnp.zeros((n, 1)), u, key_eps)
            spread = (
                schedule_variance.within_strata(losses, u) if stratified else schedule_variance.second_moment(losses)
            )
            out += [losses.mean(), spread]
        return out

    mean_s, within, mean_i, second = (np.asarray(v) for v in draw(jax.random.split(jax.random.key(0), batches)))
    for stratified, means, spreads in ((True, mean_s, within), (False, mean_i, second)):
        assert abs(spreads.mean() - exact[stratified]) < 5 * spreads.std() / math.sqrt(batches)
        squares = n * (means - means.mean()) ** 2
        assert abs(squares.mean() - exact_of_mean[stratified]) < 5 * squares.std() / math.sqrt(batches)


# --- where it leads


def learn_gaussian(s, low, high, *, stratified, steps=400, n=64, d=8):
    """A monotonic schedule trained by `schedule_variance.gradient` alone, for x ~ N(0, s^2 I), exactly denoised."""
    graph, params = nnx.split(schedules.MonotonicNetwork(low, high, hidden=64, rngs=nnx.Rngs(0)), nnx.Param)
    adam = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(carry, key):
        params, state = carry
        key_x, key_u, key_eps = jax.random.split(key, 3)
        x, u = s * jax.random.normal(key_x, (n, d)), bound.sample_times(key_u, n, stratified=stratified)

        def loss(probe):
            model = oracle.Isotropic(s, nnx.merge(graph, params))
            losses = bound.diffusion_loss(model, x, jnp.zeros((n, 1)), u, key_eps, probe)
            return losses.sum(), losses

        by, losses = jax.grad(loss, has_aux=True)(bound.Probe(jnp.zeros(n), jnp.zeros(n)))
        grads = schedule_variance.gradient(lambda p: nnx.merge(graph, p), params, u, losses, by, stratified=stratified)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, adam.init(params)))
    return nnx.merge(graph, params)


@pytest.mark.parametrize("stratified", [True, False])
def test_gaussian_data_lead_to_the_known_schedule_of_least_variance(stratified):
    # gamma'(t) sqrt(E ||eps - eps_hat||^4) is constant where log(1 + s^2 SNR) is linear in time.
    s, low, high = 0.7, -4.0, 1.0
    learned = learn_gaussian(s, low, high, stratified=stratified)
    t = np.linspace(0.0, 1.0, 101)
    a = np.log1p(s**2 * np.exp([-low, -high]))
    best = -np.log(np.expm1((1 - t) * a[0] + t * a[1]) / s**2)
    gamma, slope = (np.asarray(v) for v in schedules.with_slope(learned, jnp.asarray(t, jnp.float32)))
    linear = low + (high - low) * t
    assert np.sqrt(np.mean((gamma - best) ** 2)) < 0.15 * np.sqrt(np.mean((linear - best) ** 2))
    assert gamma[0] == low and gamma[-1] == high

    def spread(gamma, slope):  # of gamma' M over time, relative to its mean, which is that of the bound
        product = slope * oracle.isotropic_mse(s, gamma)
        return product.std() / product.mean()

    assert spread(gamma, slope) < 0.3 * spread(linear, np.full(101, high - low))


def test_the_bound_does_not_change_when_only_the_interior_does(small):
    config, graph, params = monotonic(small)
    bent = {"w2": params["schedule"]["w2"] + 8.0, "b2": jnp.full(1024, -5.0), "w3": jnp.full(1024, 2.0)}
    other = {**params, "schedule": {**params["schedule"], **bent}}
    images, labels = batch(config)
    t = jnp.linspace(0.0, 1.0, 9)
    before, after = (np.asarray(vdm.merge(graph, p).gamma(t)) for p in (params, other))
    assert np.abs(after - before).max() > 0.2, np.abs(after - before).max()
    np.testing.assert_array_equal(before[[0, -1]], after[[0, -1]])

    @jax.jit
    @jax.vmap
    def paired(key):
        a, b = (bound.terms(vdm.merge(graph, p), images, labels, key=key) for p in (params, other))
        return a.total.mean() - b.total.mean(), a.prior - b.prior, a.reconstruction - b.reconstruction, a.total.mean()

    difference, prior, reconstruction, total = map(np.asarray, paired(jax.random.split(jax.random.key(7), 500)))
    assert np.all(prior == 0) and np.abs(reconstruction).max() < 1e-4  # only the ends enter these
    error = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) < 5 * error < 0.1 * total.mean()


# --- in training


def test_training_moves_the_interior_and_keeps_the_ends_exact(small):
    config = dataclasses.replace(small[0], schedule="monotonic")
    graph, params = vdm.graph_of(config), vdm.init(config, 0)
    train = dataclasses.replace(LEARNED, learning_rate=1e-3, schedule_rate=100.0, clip_norm=1.0)
    optimiser = step_.optimiser(train, learned_schedule=True)
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimiser.init(params), None)
    step = jit_step(config, train)
    images, labels = batch(config)
    start = np.asarray(vdm.merge(graph, params).gamma(jnp.linspace(0, 1, 11)))
    for _ in range(40):
        state, _ = step(state, images, labels)
        gamma = np.asarray(vdm.merge(graph, state.params).gamma(jnp.linspace(0, 1, 11)))
        assert gamma[0] == np.float32(config.gamma_min) and gamma[-1] == np.float32(config.gamma_max)
        assert np.all(np.diff(gamma) > 0)
    assert np.abs(gamma - start).max() > 0.02, np.abs(gamma - start).max()


def test_the_networks_train_as_if_the_schedule_were_not_clipped_with_them():
    train = TrainConfig(steps=10, warmup_steps=0, clip_norm=1.0, weight_decay=0.1, schedule_rate=5.0)
    params = {"net": jnp.asarray([2.0]), "schedule": {"w": jnp.asarray([2.0])}}
    grads = {"net": jnp.asarray([0.5]), "schedule": {"w": jnp.asarray([1e6])}}
    group, alone = step_.optimiser(train, learned_schedule=True), step_.optimiser(train)
    state, state_alone = group.init(params), alone.init({"net": params["net"]})
    for scale in (1.0, 0.1):
        given = jax.tree.map(lambda g, s=scale: s * g, grads)
        updates, state = group.update(given, state, params)
        expected, state_alone = alone.update({"net": given["net"]}, state_alone, {"net": params["net"]})
        np.testing.assert_allclose(updates["net"], expected["net"], rtol=1e-6)
        if scale == 1.0:
            np.testing.assert_allclose(updates["schedule"]["w"], -5 * 8e-4, rtol=1e-4)  # rate, no decay, no clipping


def test_learned_ends_go_where_the_bound_sends_them(small):
    # The network is told gamma normalised by constants, so ends that move do not change what it is told at a gamma.
    config = dataclasses.replace(small[0], schedule="monotonic", learn_ends=True)
    train = dataclasses.replace(LEARNED, steps=150, learning_rate=2e-3, schedule_rate=10.0)
    state = init_state(config, train)
    step, graph = jit_step(config, train), vdm.graph_of(config)
    images, labels = batch(config)
    ends = jnp.asarray([0.0, 1.0])
    losses = []
    for _ in range(train.steps):
        state, metrics = step(state, images, labels)
        losses.append(float(metrics.vlb_bpd))
    gamma = np.asarray(vdm.merge(graph, state.params).gamma(ends))
    assert np.all(np.isfinite(losses)) and np.mean(losses[-20:]) < np.mean(losses[:20])
    assert np.all(np.abs(gamma - [config.gamma_min, config.gamma_max]) > 0.2)
    # Against fixed ends from the same weights: the bound at the learned ends is lower.
    back = {"gamma_0": jnp.float32(config.gamma_min), "log_width": jnp.log(config.gamma_max - config.gamma_min)}
    old = {**state.params["schedule"], "ends": back}

    @jax.jit
    @jax.vmap
    def paired(key):
        a, b = (
            bound.terms(vdm.merge(graph, {**state.params, "schedule": s}), images, labels, key=key).total.mean()
            for s in (state.params["schedule"], old)
        )
        return b - a

    gain = np.asarray(paired(jax.random.split(jax.random.key(1), 100)))
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


# --- settings


@pytest.mark.parametrize("changes", [{}, {"schedule": "learned-linear"}, {"schedule": "monotonic", "timesteps": 10}])
def test_the_objective_is_refused_for_other_schedules_and_for_discrete_time(changes):
    with pytest.raises(InputError, match=r"^schedule_objective: 'variance' with schedule .*expected .* 'monotonic'"):
        medvdm.preset("demo", schedule_objective="variance", **changes)
    with pytest.raises(InputError, match="schedule_objective"):
        make_step(VDMConfig(**changes), TrainConfig(schedule_objective="variance"))


def test_other_settings_that_cannot_be(unchecked):
    with pytest.raises(InputError, match="schedule_objective: 'varience'; did you mean 'variance'"):
        TrainConfig(schedule_objective="varience")
    with pytest.raises(InputError, match="schedule_rate: -1.0"):
        TrainConfig(schedule_rate=-1.0)
    for schedule in ("fixed-linear", "fixed-cosine", "learned-linear"):
        with pytest.raises(InputError, match=f"learn_ends: True with schedule '{schedule}'; expected .*'monotonic'"):
            VDMConfig(schedule=schedule, learn_ends=True)


def test_the_objective_leaves_a_trace_in_the_fingerprint():
    learned = medvdm.preset("demo", schedule="monotonic", schedule_objective="variance")
    assert config_.fingerprint(learned) != config_.fingerprint(medvdm.preset("demo", schedule="monotonic"))
    assert config_.from_json(config_.to_json(learned)) == learned
