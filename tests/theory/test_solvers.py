"""Solvers against their own recursions on Gaussian data, against the exact flow, and against one another."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.errors import InputError
from medvdm.models import generate as generate_
from medvdm.theory import gaussian, sampling, schedules, solvers

S, LOW, HIGH = 0.7, -8.0, 6.0
MODEL = oracle.Isotropic(S, schedules.FixedLinear(LOW, HIGH))
MIXTURE = oracle.Mixture([0.7, 0.3], [[-2.0], [2.0]], [[0.04]], schedules.FixedLinear(LOW, HIGH))
NO_LABEL = jnp.zeros((1, 1))
WITHOUT_NOISE = ("ddim", "heun", "dpmpp")
chain = jax.jit(sampling.chain, static_argnums=0, static_argnames=("num_states", "solver"))


def keys_of(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def drawn(z, steps, solver, model=MODEL, label=NO_LABEL, **more):
    out = chain(model, z, label, keys=keys_of(len(z)), steps=steps, first=steps, solver=solver, **more)
    return np.asarray(out[-1], np.float64)


def coefficients(gamma):
    gamma = np.asarray(gamma, np.float64)
    return 1 / np.sqrt(1 + np.exp(gamma)), 1 / np.sqrt(1 + np.exp(-gamma))


def exact_gain(low, high):
    """z at gamma low over z at gamma high along the flow of N(0, S^2): as their deviations."""
    (a, b), (c, d) = coefficients(low), coefficients(high)
    return np.sqrt((a**2 * S**2 + b**2) / (c**2 * S**2 + d**2))


def gain(solver, gammas):
    """z at the last of several gammas over z at the first, step by step, each solver in the variables of its paper."""
    alpha, sigma = coefficients(gammas)
    tau, z, before = sigma / alpha, 1.0, None
    x_of = lambda i, z: alpha[i] * S**2 / (alpha[i] ** 2 * S**2 + sigma[i] ** 2) * z  # noqa: E731
    eps_of = lambda i, z: (z - alpha[i] * x_of(i, z)) / sigma[i]  # noqa: E731
    for i in range(len(gammas) - 1):
        if solver == "ddim":  # equation 12 of its paper
            z = alpha[i + 1] * x_of(i, z) + sigma[i + 1] * eps_of(i, z)
        elif solver == "heun":  # algorithm 1 of its paper, in y = z / alpha and tau
            y, d = z / alpha[i], eps_of(i, z)
            guess = y + (tau[i + 1] - tau[i]) * d
            z = alpha[i + 1] * (y + (tau[i + 1] - tau[i]) * 0.5 * (d + eps_of(i + 1, alpha[i + 1] * guess)))
        else:  # algorithm 2 of its paper, in lambda = log(alpha / sigma)
            h, x = np.log(alpha[i + 1] / sigma[i + 1]) - np.log(alpha[i] / sigma[i]), x_of(i, z)
            ahead = x
            if before is not None:
                r = before[0] / h
                ahead = (1 + 1 / (2 * r)) * x - 1 / (2 * r) * before[1]
            z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * np.expm1(-h) * ahead
            before = (h, x)
    return z


@pytest.mark.parametrize("T", [1, 2, 5, 63, 64, 65, 129])
@pytest.mark.parametrize("solver", WITHOUT_NOISE)
def test_a_chain_follows_the_recursion_of_its_solver_through_all_blocks_of_steps(solver, T):
    z = jax.random.normal(jax.random.key(0), (3, 4))
    expected = gain(solver, np.linspace(HIGH, LOW, T + 1)) * np.asarray(z, np.float64)
    np.testing.assert_allclose(drawn(z, T, solver), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("solver", WITHOUT_NOISE)
def test_the_error_against_the_exact_flow_falls_with_the_order(solver):
    z, order = jnp.ones((1, 1)), solvers.SOLVERS[solver].order
    steps = (32, 64, 128)
    errors = [abs(float(drawn(z, T, solver)[0, 0]) / exact_gain(LOW, HIGH) - 1) for T in steps]
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert 0.8 * 2**order < ratios[-1] < 1.25 * 2**order, (errors, ratios)
    assert errors[-1] < (0.05 if order == 1 else 2e-3)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_variance_of_ddim_with_noise_follows_its_recursion(eta):
    T, n = 40, 40_000
    gammas = np.linspace(HIGH, LOW, T + 1)
    alpha, sigma = coefficients(gammas)
    variance = 1.0
    for i in range(T):  # equation 12 and 16 of its paper
        v = eta * sigma[i + 1] * np.sqrt(1 - (alpha[i] / alpha[i + 1]) ** 2 * (sigma[i + 1] / sigma[i]) ** 2)
        x = alpha[i] * S**2 / (alpha[i] ** 2 * S**2 + sigma[i] ** 2)
        eps = (1 - alpha[i] * x) / sigma[i]
        variance = (alpha[i + 1] * x + np.sqrt(sigma[i + 1] ** 2 - v**2) * eps) ** 2 * variance + v**2
    found = drawn(jax.random.normal(jax.random.key(1), (1, n)), T, "ddim", eta=eta).var()
    assert abs(found - variance) < 5 * variance * math.sqrt(2 / n)
    if eta == 1:
        assert variance == pytest.approx(oracle.isotropic_chain_variance(S, np.linspace(LOW, HIGH, T + 1)), rel=1e-9)


def test_ddim_with_all_its_noise_is_the_ancestral_chain():
    z, label = jax.random.normal(jax.random.key(2), (3, 4)), jnp.asarray([[-1.0], [0.5], [2.0]])
    np.testing.assert_allclose(
        drawn(z, 70, "ddim", label=label, eta=1.0), drawn(z, 70, "ancestral", label=label), atol=1e-4
    )
    assert np.abs(drawn(z, 70, "ddim", eta=0.5) - drawn(z, 70, "ddim")).max() > 0.05


@pytest.mark.parametrize("gamma_s", [-9.0, 2.99999, 3.0, 3.00001, 9.0])
def test_one_step_of_ddim_up_and_down_is_the_textbooks(gamma_s):
    z, eps = np.array([[0.4, -1.0]]), np.array([[-0.7, 0.3]])
    (a_t, s_t), (a_s, s_s) = coefficients(3.0), coefficients(gamma_s)
    expected = a_s * (z - s_t * eps) / a_t + s_s * eps
    step = solvers.ddim_step(
        jnp.asarray(z, jnp.float32), jnp.asarray(eps, jnp.float32), jnp.float32(gamma_s), jnp.float32(3.0)
    )
    np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_solvers_agree_as_steps_grow_where_the_data_are_not_gaussian():
    """On a mixture, whose flow is known too: it keeps the quantiles."""
    n = 400
    z = jax.random.normal(jax.random.key(3), (n, 1))
    ends = {solver: drawn(z, 2000 if solver == "ddim" else 500, solver, MIXTURE)[:, 0] for solver in WITHOUT_NOISE}
    (a_0, s_0), (a_1, s_1) = coefficients(LOW), coefficients(HIGH)

    def law(values, a, s):  # the distribution function of z
        part = lambda m: 0.5 * (1 + np.vectorize(math.erf)((values - a * m) / np.sqrt(2 * (a**2 * 0.04 + s**2))))  # noqa: E731
        return 0.7 * part(-2.0) + 0.3 * part(2.0)

    for solver, z_0 in ends.items():
        np.testing.assert_allclose(law(z_0, a_0, s_0), law(np.asarray(z)[:, 0], a_1, s_1), atol=4e-3, err_msg=solver)
    few = {solver: np.abs(drawn(z, 24, solver, MIXTURE)[:, 0] - ends["heun"]).mean() for solver in WITHOUT_NOISE}
    assert few["heun"] < 0.5 * few["ddim"] and few["dpmpp"] < 0.5 * few["ddim"], few


@pytest.mark.parametrize("solver", WITHOUT_NOISE)
def test_a_falling_grid_runs_upwards_and_the_way_back_returns(solver):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    up = jnp.linspace(1.0, 0.0, solvers.KNOTS)
    errors = []
    for T in (40, 80):
        z_1 = drawn(x, T, solver, grid=up)
        np.testing.assert_allclose(
            z_1, gain(solver, np.linspace(LOW, HIGH, T + 1)) * np.asarray(x, np.float64), rtol=1e-4, atol=1e-5
        )
        errors.append(np.abs(drawn(jnp.asarray(z_1, jnp.float32), T, solver) - x).max())
    assert errors[0] / errors[1] > 1.6 ** solvers.SOLVERS[solver].order, errors


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_guidance_labels_and_shapes_are_the_same_for_all_solvers(solver):
    z, label = jax.random.normal(jax.random.key(4), (2, 2, 3, 1)), jnp.asarray([[0.8], [-0.4]])
    flat = z.reshape(2, -1)
    rows = drawn(flat, 25, solver, label=label)
    for i in range(2):
        alone = chain(
            MODEL, flat[i : i + 1], label[i : i + 1], keys=keys_of(2)[i : i + 1], steps=25, first=25, solver=solver
        )
        np.testing.assert_allclose(alone[-1], rows[i : i + 1], atol=1e-5)
    on_images = oracle.OnImages(S, MODEL.schedule)
    np.testing.assert_allclose(drawn(z, 25, solver, on_images, label).reshape(2, -1), rows, atol=1e-5)
    # The exact denoiser is affine in the class mean and the null's is 0.
    guided = chain(MODEL, flat, label, NO_LABEL, keys=keys_of(2), steps=25, first=25, guidance=1.5, solver=solver)[-1]
    np.testing.assert_allclose(guided, drawn(flat, 25, solver, label=2.5 * label), atol=2e-4)


# Grids


@pytest.mark.parametrize("schedule", [schedules.FixedLinear(LOW, HIGH), schedules.FixedCosine(LOW, HIGH)])
def test_a_grid_even_in_gamma_is_even_in_gamma(schedule):
    grid = solvers.gamma_grid(schedule)
    fractions = jnp.asarray([0.0, 0.1, 0.37, 0.5, 0.99, 1.0])
    found = schedule(solvers.time_at(fractions, grid))
    np.testing.assert_allclose(found, LOW + (HIGH - LOW) * fractions, atol=0.02)
    np.testing.assert_allclose(found[jnp.array([0, -1])], [LOW, HIGH], atol=1e-4)


def test_a_grid_by_error_is_the_closed_form_and_lets_ddim_err_less():
    r"""Along the flow of N(0, s^2), x_hat = s^2 / sqrt(s^2 + tau^2) times a constant."""
    even, states = solvers.gamma_grid(MODEL.gamma), 64
    z = jax.random.normal(jax.random.key(5), (4, 50))
    trail = chain(
        MODEL, z, NO_LABEL, keys=keys_of(4), steps=states, first=states, num_states=states, solver="ddim", grid=even
    )
    grid = solvers.error_grid(MODEL.gamma, jnp.concatenate([z[None], trail]))
    assert grid.shape == (solvers.KNOTS,) and grid[0] == 0 and grid[-1] == 1 and (jnp.diff(grid) > 0).all()
    gammas = np.linspace(LOW, HIGH, 4001)
    tau2 = np.exp(gammas)
    density = np.sqrt(tau2 / (S**2 + tau2) ** 1.5)  # of |d x_hat / d lambda|
    density = np.maximum(density, 0.1 * density.mean())
    share = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    expected = (np.interp(np.linspace(0, 1, solvers.KNOTS), share / share[-1], gammas) - LOW) / (HIGH - LOW)
    np.testing.assert_allclose(grid, expected, atol=0.02)
    off = [abs(drawn(jnp.ones((1, 1)), 16, "ddim", grid=g)[0, 0] / exact_gain(LOW, HIGH) - 1) for g in (even, grid)]
    assert off[1] < 0.8 * off[0], off


# In the whole of generate


def generate(small, num=5, **settings):
    _, graph, params = small
    return generate_.generate(graph, params, num=num, **{"steps": 10} | settings)


@pytest.mark.parametrize(
    ("solver", "grid"), [("ancestral", "time"), ("ddim", "gamma"), ("heun", "time"), ("dpmpp", "error")]
)
def test_sample_i_does_not_depend_on_num_or_batch_size(small, solver, grid):
    labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0]]
    settings = {"solver": solver, "grid": grid, "labels": labels, "guidance": 0.5, "num_states": 2}
    whole = generate(small, **settings)
    parts = generate(small, **settings, batch_size=2)
    np.testing.assert_allclose(parts.latents, whole.latents, atol=1e-4)
    assert whole.times[-1] == 0 and 0 < whole.times[0] < 1
    other = generate(small, **settings | {"seed": 1})
    assert np.abs(other.latents - whole.latents).min() > 0


def test_without_noise_the_end_depends_on_the_start_only_and_solvers_meet(small):
    z = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    for solver in WITHOUT_NOISE:
        one, other = (generate(small, solver=solver, z=z, seed=seed).latents for seed in (0, 1))
        np.testing.assert_array_equal(one, other)
    many = [generate(small, solver=solver, z=z, steps=800).latents for solver in WITHOUT_NOISE]
    np.testing.assert_allclose(many[1], many[2], atol=2e-3)
    np.testing.assert_allclose(many[0], many[1], atol=3e-2)


def test_other_numbers_of_steps_and_another_eta_compile_nothing(small):
    generate(small, solver="ddim", grid="error")
    compiled = generate_._generate._cache_size()
    generate(small, solver="ddim", grid="error", eta=0.4, steps=31, seed=3)
    assert generate_._generate._cache_size() == compiled


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"solver": "euler"}, "^solver: 'euler'; .*heun"),
        ({"solver": "dpmp"}, "^solver: 'dpmp'; did you mean 'dpmpp'"),
        ({"grid": "errors"}, "^grid: 'errors'; did you mean 'error'"),
        ({"eta": 0.5}, "^eta: 0.5 with solver 'ancestral'; expected 0, or up to 1 with 'ddim'"),
        ({"eta": 1.5, "solver": "ddim"}, "^eta: 1.5 with solver 'ddim'"),
        ({"eta": -0.1, "solver": "ddim"}, "^eta: -0.1"),
        ({"eta": float("nan"), "solver": "ddim"}, "^eta: nan"),
    ],
)
def test_solvers_and_grids_that_cannot_be_used_are_refused(small, wrong, says):
    with pytest.raises(InputError, match=says):
        generate(small, **wrong)


def test_the_step_of_a_plain_chain_is_that_of_the_solvers():
    assert sampling.ancestral_step is solvers.ancestral_step
    z, eps = jnp.full((1, 1), 0.4), jnp.full((1, 1), -0.7)
    for noise in (-1.0, 2.0):
        expected = gaussian.posterior_from_eps(eps, z, jnp.float32(-1.0), jnp.float32(0.5))
        with_all_noise = solvers.ddim_step(z, eps, jnp.float32(-1.0), jnp.float32(0.5), jnp.full((1, 1), noise), 1.0)
        np.testing.assert_allclose(with_all_noise, expected.mean + noise * math.sqrt(expected.variance), rtol=1e-5)
