"""Schedules: exact ends, strictly rising, and a slope that is the derivative, also after training."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvdm.errors import InputError
from medvdm.theory import gaussian, schedules

quick = settings(max_examples=15, deadline=None)
low_ends = st.floats(-15.0, 5.0, width=32, allow_subnormal=False)  # XLA takes subnormal numbers for 0
ends = st.tuples(low_ends, st.floats(0.5, 20.0, width=32)).map(lambda e: (e[0], e[0] + e[1]))
GRID = jnp.linspace(0.0, 1.0, 257)
slopes = schedules.with_slope


def monotonic(low, high, *, seed=0, moved=0.0, learn_ends=False):
    """A MonotonicNetwork; ``moved`` adds noise of that size to every parameter of its shape, as training might."""
    net = schedules.MonotonicNetwork(low, high, hidden=16, learn_ends=learn_ends, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for name in ("w1", "b1", "w2", "b2", "w3"):
        parameter = getattr(net, name)
        parameter[...] = parameter[...] + moved * rng.standard_normal(parameter.shape).astype(np.float32)
    return net


def all_schedules(low=-5.0, high=1.0):
    return [
        schedules.FixedLinear(low, high),
        schedules.FixedCosine(low, high),
        schedules.LearnedLinear(low, high),
        monotonic(low, high),
        monotonic(low, high, moved=1.0),
    ]


@quick
@given(ends)
def test_linear_schedules_are_the_line_between_their_ends(pair):
    low, high = pair
    line = low + (high - low) * np.asarray(GRID, np.float64)
    fixed = np.asarray(schedules.FixedLinear(low, high)(GRID))
    assert fixed[0] == np.float32(low) and fixed[-1] == np.float32(high)
    np.testing.assert_allclose(fixed, line, atol=1e-5)
    np.testing.assert_allclose(schedules.LearnedLinear(low, high)(GRID), line, atol=2e-5)


@quick
@given(ends)
def test_cosine_schedule_is_its_formula_between_exact_ends(pair):
    low, high = pair
    t = np.asarray(GRID, np.float64)
    first, last = (np.arctan(np.exp(end / 2)) for end in pair)
    gamma = np.asarray(schedules.FixedCosine(low, high)(GRID))
    assert gamma[0] == np.float32(low) and gamma[-1] == np.float32(high)
    assert np.all(np.diff(gamma) > 0)
    np.testing.assert_allclose(gamma, 2 * np.log(np.tan((1 - t) * first + t * last)), rtol=2e-5, atol=1e-4)


def test_cosine_schedule_has_a_cosine_for_alpha():
    alpha = jnp.sqrt(jax.nn.sigmoid(-schedules.FixedCosine(-30.0, 30.0)(GRID)))
    np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * np.asarray(GRID)), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("moved", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("low", "high"), [(-13.3, 5.0), (-5.1, 0.7)])
def test_monotonic_network_keeps_its_ends_and_rises_whatever_training_did(low, high, seed, moved):
    net = monotonic(low, high, seed=seed, moved=moved)
    gamma = np.asarray(net(GRID))
    assert gamma[0] == np.float32(low) and gamma[-1] == np.float32(high)
    assert np.all(np.diff(gamma) >= 0)
    assert np.all(np.diff(gamma[::16]) > 0)
    assert np.all(np.asarray(slopes(net, GRID)[1]) > 0)


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda s: type(s).__name__)
def test_slope_is_the_finite_difference_and_not_zero_at_either_end(schedule):
    h = 1 / 256
    gamma, slope = slopes(schedule, GRID)
    np.testing.assert_allclose(gamma, schedule(GRID), atol=2e-6)
    middle = np.asarray(slopes(schedule, GRID[:-1] + h / 2)[1])
    np.testing.assert_allclose(middle, np.diff(np.asarray(gamma, np.float64)) / h, rtol=2e-3)
    assert np.all(np.asarray(slope) > 0.1)
    # A clamp at the ends would halve or remove the derivative there; the neighbours tell.
    np.testing.assert_allclose(slope[0], 2 * slope[1] - slope[2], rtol=2e-2)
    np.testing.assert_allclose(slope[-1], 2 * slope[-2] - slope[-3], rtol=2e-2)


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda s: type(s).__name__)
def test_gamma_rises_with_time_on_any_shape_of_times(schedule):
    assert schedule(jnp.ones(())) > schedule(jnp.full((), 0.5)) > schedule(jnp.zeros(()))
    assert schedule(jnp.full((2, 3), 0.3)).shape == (2, 3)
    np.testing.assert_allclose(schedule(jnp.full((2, 3), 0.3)), schedule(jnp.full((), 0.3)), rtol=1e-5)


def test_the_mean_slope_is_the_range_for_the_bound_depends_on_nothing_else():
    for schedule in all_schedules():
        t = (jnp.arange(4096, dtype=jnp.float32) + 0.5) / 4096
        np.testing.assert_allclose(np.mean(np.asarray(slopes(schedule, t)[1], np.float64)), 6.0, rtol=1e-4)


def test_learned_ends_cannot_cross():
    schedule = schedules.LearnedLinear(-5.0, 1.0)
    schedule.log_width[...] = jnp.float32(-20.0)  # far along the gradient that shrinks the range
    assert schedule(jnp.ones(())) >= schedule(jnp.zeros(()))
    assert slopes(schedule, GRID)[1][0] > 0


def test_which_schedules_are_trained():
    def trained(schedule):
        gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(GRID) ** 2))
        graph, params = nnx.split(schedule, nnx.Param)
        return [float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient(params))]

    assert not trained(schedules.FixedLinear(-5.0, 1.0))
    assert len(trained(schedules.LearnedLinear(-5.0, 1.0))) == 2
    assert min(trained(schedules.LearnedLinear(-5.0, 1.0))) > 0
    assert len(trained(monotonic(-5.0, 1.0, learn_ends=True))) == len(trained(monotonic(-5.0, 1.0))) + 2


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, -5.0), (1.0, 1.0), (float("nan"), 1.0), (-5.0, float("inf")), (float("-inf"), 0.0)]
)
def test_ends_out_of_order_or_not_finite_are_refused(low, high):
    for build in (schedules.FixedLinear, schedules.FixedCosine, schedules.LearnedLinear, monotonic):
        with pytest.raises(InputError, match="gamma_min"):
            build(low, high)


@pytest.mark.parametrize("kind", ["fixed-linear", "fixed-cosine", "learned-linear", "monotonic"])
def test_ends_within_the_precision_of_float32_are_exact_and_what_is_beyond_is_refused(kind):
    most = float(np.float32(schedules.MAX_GAMMA) - np.float32(1e-4))
    gamma, slope = slopes(schedules.make(kind, -most, most, rngs=nnx.Rngs(0)), jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(gamma[::2], [-most, most], rtol=1e-6)
    assert np.all(np.isfinite(slope)) and np.all(np.diff(gamma) > 0)
    # There the weaker of signal and noise is the rounding error of the other.
    assert float(gaussian.sigma(gamma[0])) == pytest.approx(np.finfo(np.float32).eps / 2, rel=1e-3)
    for low, high in ((-200.0, 200.0), (-33.5, 1.0), (-5.0, 33.5)):
        with pytest.raises(InputError, match=rf"gamma_min, gamma_max: {low}, {high}; expected within \+-33.3"):
            schedules.make(kind, low, high, rngs=nnx.Rngs(0))


def test_make_knows_every_name_and_suggests_the_nearest():
    for name in schedules.KINDS:
        assert float(schedules.make(name, -5.0, 1.0, rngs=nnx.Rngs(0))(jnp.zeros(()))) == -5.0
    with pytest.raises(InputError, match="did you mean 'fixed-linear'"):
        schedules.make("fixed_linear", -5.0, 1.0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("schedule", all_schedules(-13.0, 5.0), ids=lambda s: type(s).__name__)
def test_the_time_of_a_gamma_is_the_inverse(schedule):
    found = jax.jit(lambda t: schedules.time_of(schedule, schedule(t)))(GRID)
    np.testing.assert_allclose(found, GRID, rtol=0, atol=4e-6)
    assert found[0] == 0 and found[-1] == 1
    beyond = schedules.time_of(schedule, jnp.array([-20.0, 20.0]))
    assert beyond.tolist() == [0, 1]
