"""The bound against problems whose answer is known (tests/oracle.py). Tolerances are 5 standard errors, computed."""

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.errors import InputError
from medvdm.theory import bound, gaussian, schedules

S = 0.7
KEY = jax.random.key(0)
loss_of = jax.jit(bound.diffusion_loss, static_argnums=0)


def near(estimate, expected, standard_error, k=5):
    assert abs(estimate - expected) < k * standard_error + 1e-6 * abs(expected), (estimate, expected, standard_error)


def mean_and_error(values):
    values = np.asarray(values, np.float64)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def monotonic(low, high):
    net = schedules.MonotonicNetwork(low, high, hidden=16, rngs=nnx.Rngs(3))
    rng = np.random.default_rng(0)
    for parameter in (net.w2, net.b2, net.w3):
        parameter[...] = parameter[...] + rng.standard_normal(parameter.shape).astype(np.float32)
    return net


def bent(t):
    """Strictly rising from -8 to 6 and far from straight."""
    return -8.0 + 14.0 * (0.2 * t + 0.8 * t**3)


SCHEDULES = {
    "fixed": schedules.FixedLinear(-8.0, 6.0),
    "learned": schedules.LearnedLinear(-8.0, 6.0),
    "monotonic": monotonic(-8.0, 6.0),
    "bent": bent,
}


# --- times


@pytest.mark.parametrize("n", [1, 2, 49, 98, 103, 107, 196])
def test_stratified_times_are_n_in_the_unit_interval_one_a_stratum(n):
    for seed in range(5):
        times = np.asarray(bound.sample_times(jax.random.key(seed), n))
        assert times.shape == (n,) and times.min() >= 0.0 and times.max() < 1.0
        np.testing.assert_allclose(np.diff(np.sort(times)), 1 / n, atol=1e-6)  # one offset, evenly spread


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (1, 8), (5, 3), (32, 8)])
def test_spread_times_are_even_for_each_image_and_for_all(n, draws):
    times = np.asarray(bound.spread_times(KEY, n, draws))
    assert times.shape == (draws, n)
    np.testing.assert_array_equal(np.floor(times * draws), np.broadcast_to(np.arange(draws)[:, None], (draws, n)))
    np.testing.assert_allclose(np.diff(np.sort(times.ravel())), 1 / (n * draws), atol=1e-6)


def test_the_mean_over_spread_times_is_unbiased_and_varies_less():
    keys = jax.random.split(KEY, 2000)
    spread = np.asarray(jax.vmap(lambda k: jnp.mean(jnp.exp(4 * bound.spread_times(k, 1, 8))))(keys))
    alone = np.asarray(jax.vmap(lambda k: jnp.mean(jnp.exp(4 * jax.random.uniform(k, (8,)))))(keys))
    for found in (spread, alone):
        mean, error = mean_and_error(found)
        near(mean, math.expm1(4.0) / 4, error)
    assert spread.std() < 0.5 * alone.std()


def test_each_stratified_time_is_uniform_on_its_own():
    n, draws = 5, 4000
    times = np.asarray(jax.vmap(lambda k: bound.sample_times(k, n))(jax.random.split(KEY, draws)))
    for i in range(n):
        distance = np.max(np.abs(np.sort(times[:, i]) - (np.arange(draws) + 0.5) / draws))
        assert distance < 1.95 / math.sqrt(draws)  # Kolmogorov-Smirnov, level 0.001
    assert len(np.unique(times[:, 0])) > 0.99 * draws


def test_independent_times_are_uniform_and_do_not_share_an_offset():
    times = np.asarray(bound.sample_times(KEY, 4000, stratified=False))
    assert times.shape == (4000,) and times.min() >= 0.0 and times.max() < 1.0
    assert np.max(np.abs(np.sort(times) - (np.arange(4000) + 0.5) / 4000)) < 1.95 / math.sqrt(4000)
    assert np.histogram(times, 4000, (0, 1))[0].max() > 1


@pytest.mark.parametrize("timesteps", [1, 3, 7, 1000])
def test_step_index_runs_from_1_to_t_and_never_0(timesteps):
    u = jnp.asarray([0.0, 1e-9, 0.5, np.nextafter(np.float32(1), np.float32(0))], jnp.float32)
    i = np.asarray(bound.step_index(u, timesteps))
    assert i[0] == 1 and i[1] == 1 and i[-1] == timesteps and i.min() >= 1 and i.max() <= timesteps
    u = (jnp.arange(10 * timesteps, dtype=jnp.float32) + 0.5) / (10 * timesteps)
    np.testing.assert_array_equal(np.bincount(np.asarray(bound.step_index(u, timesteps)))[1:], 10)


# --- diffusion loss


@pytest.mark.parametrize("name", SCHEDULES)
def test_continuous_loss_depends_on_the_schedule_through_its_ends_only(name):
    model = oracle.Isotropic(S, SCHEDULES[name])
    n, d = 20_000, 8
    f = S * jax.random.normal(jax.random.key(1), (n, d))
    u = bound.sample_times(jax.random.key(2), n, stratified=False)
    estimate, error = mean_and_error(loss_of(model, f, jnp.zeros((n, 1)), u, KEY) / d)
    assert error < 0.05
    near(estimate, oracle.isotropic_diffusion(S, -8.0, 6.0), error)


def test_stratified_times_estimate_the_same_number_with_less_variance():
    model = oracle.Isotropic(S, SCHEDULES["fixed"])
    n, d = 16, 64

    def batch(key, stratified):
        key_f, key_u, key = jax.random.split(key, 3)
        f = S * jax.random.normal(key_f, (n, d))
        u = bound.sample_times(key_u, n, stratified=stratified)
        return jnp.mean(bound.diffusion_loss(model, f, jnp.zeros((n, 1)), u, key)) / d

    keys = jax.random.split(jax.random.key(5), 1500)
    stratified, independent = (np.asarray(jax.jit(jax.vmap(lambda k, s=s: batch(k, s)))(keys)) for s in (True, False))
    estimate, error = mean_and_error(stratified)
    near(estimate, oracle.isotropic_diffusion(S, -8.0, 6.0), error)
    assert stratified.std() < 0.5 * independent.std()


def test_discrete_loss_has_its_known_values_and_falls_to_the_limit():
    steps = (4, 8, 16, 32, 64, 128)
    exact = [oracle.isotropic_discrete(S, np.linspace(-8, 6, T + 1)) for T in steps]
    np.testing.assert_allclose(exact, [25.5, 8.71, 5.48, 4.43, 4.01, 3.82], rtol=2e-3)
    limit = oracle.isotropic_diffusion(S, -8.0, 6.0)
    assert round(limit, 3) == 3.643
    assert np.all(np.diff(exact) < 0) and exact[-1] > limit
    assert abs(oracle.isotropic_discrete(S, np.linspace(-8, 6, 100_001)) - limit) < 1e-3
    for T, value in zip(steps, exact, strict=True):
        # The library at every step once, in many dimensions: the sum over steps is exact, the noise average nearly.
        d = 4000
        model = oracle.Isotropic(S, SCHEDULES["fixed"], timesteps=T)
        f = S * jax.random.normal(jax.random.key(T), (T, d))
        u = (jnp.arange(T, dtype=jnp.float32) + 0.5) / T
        estimate = float(jnp.mean(loss_of(model, f, jnp.zeros((T, 1)), u, KEY))) / d
        gammas = np.linspace(-8, 6, T + 1)
        per_step = np.expm1(np.diff(gammas)) / 2 * oracle.isotropic_mse(S, gammas[1:])
        near(estimate, value, math.sqrt(np.sum(per_step**2) * 2 / d))  # a squared Gaussian has variance 2 mse^2


def test_many_discrete_steps_give_the_continuous_loss_pathwise():
    n, d = 64, 16
    f = S * jax.random.normal(KEY, (n, d))
    u = (jnp.arange(n, dtype=jnp.float32) + 0.5) / n
    continuous = loss_of(oracle.Isotropic(S, bent), f, jnp.zeros((n, 1)), u, KEY)
    fine = loss_of(oracle.Isotropic(S, bent, timesteps=n * 101), f, jnp.zeros((n, 1)), u, KEY)
    np.testing.assert_allclose(fine, continuous, rtol=2e-2, atol=0.01 * float(jnp.mean(continuous)))


# --- the other terms


@pytest.mark.parametrize(("gamma_0", "gamma_1"), [(-8.0, 6.0), (-5.0, 1.0), (-2.0, 0.5)])
def test_prior_loss_is_the_kl_by_numerical_integration(gamma_0, gamma_1):
    f = np.array([[0.0, 1.5], [-2.0, 0.3], [3.0, -4.0]])
    alpha, sigma = 1 / math.sqrt(1 + math.exp(gamma_1)), 1 / math.sqrt(1 + math.exp(-gamma_1))
    z = np.linspace(-12, 12, 20_001)
    log_q = -0.5 * ((z - alpha * f[..., None]) / sigma) ** 2 - math.log(sigma)
    integrand = np.exp(log_q) / math.sqrt(2 * math.pi) * (log_q + 0.5 * z**2)
    expected = np.trapezoid(integrand, z, axis=-1).sum(axis=-1)
    model = oracle.Isotropic(S, schedules.FixedLinear(gamma_0, gamma_1))
    np.testing.assert_allclose(bound.prior_loss(model, jnp.asarray(f, jnp.float32)), expected, rtol=1e-4, atol=2e-6)


def test_decoder_sees_the_encoding_at_its_own_scale_with_noise_sigma_over_alpha():
    f = jnp.full((1, 100_000), 2.0)
    for gamma_0 in (-5.0, 0.0):
        model = oracle.Isotropic(S, schedules.FixedLinear(gamma_0, 3.0))
        decoded = np.asarray(bound.decode_z0(model, f, KEY))
        variance = math.exp(gamma_0)
        near(decoded.mean(), 2.0, math.sqrt(variance / 1e5))
        near(decoded.var(), variance, variance * math.sqrt(2 / 1e5))
        np.testing.assert_array_equal(bound.decode_z0(model, f, None), f)
        # and this is z_0 / alpha_0 with the same noise
        z_0 = gaussian.diffuse(f, jax.random.normal(KEY, f.shape), jnp.float32(gamma_0))
        np.testing.assert_allclose(decoded, z_0 / gaussian.alpha(jnp.float32(gamma_0)), rtol=1e-5, atol=1e-5)


def test_reconstruction_loss_of_the_exact_posterior_is_its_entropy():
    model = oracle.Isotropic(S, schedules.FixedLinear(-2.0, 3.0))
    n, d = 50_000, 3
    x = S * jax.random.normal(jax.random.key(4), (n, d))
    estimate, error = mean_and_error(bound.reconstruction_loss(model, x, x, KEY))
    r2 = math.exp(-2.0)
    near(estimate, d * 0.5 * math.log(2 * math.pi * math.e * S**2 * r2 / (S**2 + r2)), error)


# --- the bound as a whole

jitted_bound = jax.jit(bound.terms, static_argnums=0, static_argnames=("stratified",))


@pytest.mark.parametrize(("s", "gamma_0", "gamma_1"), [(0.7, -8.0, 6.0), (2.0, -6.0, 1.0)])
def test_expected_bound_is_entropy_plus_the_priors_mismatch(s, gamma_0, gamma_1):
    gap = oracle.isotropic_prior_gap(s, gamma_1)
    assert (gap < 5e-7) if gamma_1 == 6.0 else (0.10 < gap < 0.12)  # the design's numbers
    n, d = 40_000, 8
    model = oracle.Isotropic(s, schedules.FixedLinear(gamma_0, gamma_1))
    terms = jitted_bound(model, s * jax.random.normal(jax.random.key(6), (n, d)), key=KEY, stratified=False)
    estimate, error = mean_and_error(terms.total)
    assert error < 0.02 * d
    near(estimate, d * (oracle.isotropic_entropy(s) + gap), error)
    assert terms.total.shape == (n,)
    np.testing.assert_allclose(terms.total, terms.reconstruction + terms.prior + terms.diffusion, rtol=1e-6)


def test_bound_is_tight_for_a_full_covariance():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    covariance = root @ root.T / 4 + 0.1 * np.eye(4)
    model = oracle.Mixture([1.0], np.zeros((1, 4)), covariance, schedules.FixedLinear(-7.0, 7.0))
    x = model.sample(rng, 40_000)
    estimate, error = mean_and_error(jitted_bound(model, jnp.asarray(x), key=KEY, stratified=False).total)
    alpha2 = 1 / (1 + math.exp(7.0))
    at_1 = alpha2 * covariance + (1 - alpha2) * np.eye(4)
    gap = 0.5 * (np.trace(at_1) - 4 - np.linalg.slogdet(at_1)[1])
    near(estimate, 0.5 * np.linalg.slogdet(2 * math.pi * math.e * covariance)[1] + gap, error)


def test_bound_is_tight_for_a_mixture():
    means = np.array([[-1.5], [0.5], [2.0]])
    weights = np.array([0.5, 0.3, 0.2])
    model = oracle.Mixture(weights, means, [[0.09]], schedules.FixedLinear(-7.0, 7.0))
    rng = np.random.default_rng(1)
    n = 60_000
    estimate, error = mean_and_error(
        jitted_bound(model, jnp.asarray(model.sample(rng, n)), key=KEY, stratified=False).total
    )
    z = np.linspace(-8, 8, 40_001)

    def density(scale, variance):
        parts = np.exp(-0.5 * (z[:, None] - scale * means.T) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        return parts @ weights

    p = density(1.0, 0.09)
    entropy = -np.trapezoid(p * np.log(p + 1e-300), z)
    alpha2 = 1 / (1 + math.exp(7.0))
    q1 = density(math.sqrt(alpha2), alpha2 * 0.09 + 1 - alpha2)
    gap = np.trapezoid(q1 * (np.log(q1 + 1e-300) + 0.5 * z**2 + 0.5 * math.log(2 * math.pi)), z)
    near(estimate, entropy + gap, error)


def test_a_wrong_denoiser_only_raises_the_bound():
    class Wrong(oracle.Isotropic):
        def eps_hat(self, z, condition):
            return 0.5 * super().eps_hat(z, condition)

    x = S * jax.random.normal(KEY, (5000, 4))
    exact, wrong = (
        jitted_bound(kind(S, SCHEDULES["fixed"]), x, key=KEY).diffusion.mean() for kind in (oracle.Isotropic, Wrong)
    )
    assert wrong > 1.05 * exact


def test_labels_reach_the_denoiser_and_keep_drops_them():
    model = oracle.Isotropic(S, schedules.FixedLinear(-3.0, 3.0))
    n = 4000
    x = 3.0 + S * jax.random.normal(KEY, (n, 4))
    labels = jnp.full((n, 1), 3.0)
    told = jitted_bound(model, x, labels, key=KEY).diffusion.mean()
    dropped = jitted_bound(model, x, labels, key=KEY, keep=jnp.zeros(n)).diffusion.mean()
    untold = jitted_bound(model, x, key=KEY).diffusion.mean()
    assert told < 0.5 * untold
    np.testing.assert_array_equal(dropped, untold)


@pytest.mark.parametrize("timesteps", [0, 7])
def test_a_latent_of_the_images_shape_gives_the_terms_of_the_flat_one(timesteps):
    """The same noise, so the same numbers up to rounding; the flat one is tested against its closed form above."""
    shape = (3, 4, 2)
    x = S * jax.random.normal(jax.random.key(6), (50, *shape))
    labels = jnp.linspace(-1.0, 1.0, 50)[:, None]
    schedule = schedules.FixedLinear(-6.0, 5.0)
    flat = jitted_bound(oracle.Isotropic(S, schedule, timesteps), x.reshape(50, -1), labels, key=KEY)
    on_images = jitted_bound(oracle.OnImages(S, schedule, timesteps), x, labels, key=KEY)
    for name in ("reconstruction", "prior", "diffusion", "times"):
        assert getattr(on_images, name).shape == (50,)
        np.testing.assert_allclose(getattr(on_images, name), getattr(flat, name), rtol=1e-4, err_msg=name)


def test_the_times_of_the_terms_are_those_of_their_diffusion_loss():
    x, labels, key_zt = jnp.full((6, 3), 0.5), jnp.zeros((6, 1)), jax.random.split(KEY, 3)[2]
    for timesteps in (0, 5):
        model = oracle.Isotropic(S, SCHEDULES["fixed"], timesteps)
        terms = bound.terms(model, x, key=KEY)
        # In discrete time the loss takes u, which picks the step i = floor(u T) + 1; (i - 1/2) / T picks i.
        u = terms.times - 0.5 / timesteps if timesteps else terms.times
        by_hand = bound.diffusion_loss(model, x, labels, u, key_zt)
        np.testing.assert_array_equal(terms.diffusion, by_hand)
        assert len(set(np.asarray(terms.times).tolist())) == (timesteps or 6)
        if timesteps:
            np.testing.assert_allclose(np.sort(terms.times * timesteps) % 1, 0, atol=1e-6)
            assert terms.times.min() > 0 and terms.times.max() == 1


def test_prior_loss_keeps_its_digits_where_it_is_tiny():
    for gamma_1 in (3.0, 6.0, 11.0, 20.0):
        model = oracle.Isotropic(S, schedules.FixedLinear(-5.0, gamma_1))
        f = np.array([[0.0], [1e-3], [2.0]])
        small = math.exp(-gamma_1)  # -log sigma^2 = log1p(small), alpha^2 = small / (1 + small)
        alpha2 = small / (1 + small)
        noise = sum((-1) ** n * small**n * (1 - 1 / n) for n in range(2, 40))  # log1p(s) - s / (1 + s) as a series
        assert noise == pytest.approx(math.log1p(small) - alpha2, rel=1e-3, abs=1e-17)
        expected = 0.5 * (noise + alpha2 * f[:, 0] ** 2)
        found = bound.prior_loss(model, jnp.asarray(f, jnp.float32))
        # Two numbers of size e^-gamma are subtracted in float32 and leave half the square of it.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-7 * small)


# --- units and the extra term


def test_bits_per_dim_divides_by_ln_2_and_all_pixels_and_channels():
    assert bound.bits_per_dim(math.log(2.0) * 24, (3, 4, 2)) == pytest.approx(1.0)
    assert bound.bits_per_dim(65536 * 0.5, (256, 256, 1)) == pytest.approx(0.7213475)
    assert bound.nats_per_image(1.0, (28, 28, 1)) == pytest.approx(784 * 0.69314718)
    for nats in (0.3, 4567.8):
        assert bound.nats_per_image(bound.bits_per_dim(nats, (5, 7, 3)), (5, 7, 3)) == pytest.approx(nats)


def test_gradient_difference_by_hand_and_by_numpy():
    x = jnp.zeros((1, 2, 3, 1)).at[0, 1, 2, 0].set(0.5)  # one pixel in a corner: one step down, one to the right
    np.testing.assert_allclose(bound.gradient_difference(x, jnp.zeros_like(x)), [2 * 0.25], rtol=1e-6)
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 4, 5, 2)).astype(np.float32)
    rows = ((a[:, 1:] - a[:, :-1]) - (b[:, 1:] - b[:, :-1])) ** 2
    columns = ((a[:, :, 1:] - a[:, :, :-1]) - (b[:, :, 1:] - b[:, :, :-1])) ** 2
    expected = rows.sum((1, 2, 3)) + columns.sum((1, 2, 3))
    np.testing.assert_allclose(bound.gradient_difference(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)
    np.testing.assert_allclose(bound.gradient_difference(jnp.asarray(a), jnp.asarray(a) + 0.25), 0, atol=1e-9)


# --- value by value


@pytest.mark.parametrize("timesteps", [0, 5])
def test_the_terms_value_by_value_sum_to_those_of_the_image(timesteps):
    """With the same key and times; and none of them is negative."""
    model = oracle.Levels(oracle.gaussian_levels(-0.5, 0.2), SCHEDULES["fixed"], timesteps)
    x = jnp.asarray(model.sample(np.random.default_rng(0), (6, 3, 4, 2)))
    settings = {"key": KEY, "times": bound.sample_times(KEY, 6)}
    whole = jax.jit(lambda x: bound.terms(model, x, **settings))(x)
    parts = jax.jit(lambda x: bound.pixel_terms(model, x, **settings))(x)
    np.testing.assert_array_equal(parts.times, whole.times)
    for name in ("reconstruction", "prior", "diffusion"):
        part = np.asarray(getattr(parts, name), np.float64)
        assert part.shape == x.shape and part.min() >= 0
        np.testing.assert_allclose(part.sum(axis=(1, 2, 3)), getattr(whole, name), rtol=1e-5)


def test_independent_values_cost_their_own_information():
    """Of an image with few likely and few unlikely gray values, by many draws: -log p of each, plus two small gaps."""
    law = oracle.gaussian_levels(-0.5, 0.1)
    model = oracle.Levels(law, schedules.FixedLinear(-13.0, 5.0))
    levels = np.array([[64, 70], [40, 95]], np.uint8)[..., None]  # the bell's centre is 63.75, its deviation 12.75
    n = 2**13
    x = jnp.asarray(np.broadcast_to(levels, (n, *levels.shape)))
    times = bound.sample_times(KEY, n)
    found = jax.jit(lambda x: bound.pixel_terms(model, x, key=KEY, times=times).total)(x)
    by_time = np.asarray(found, np.float64)[np.argsort(times)]
    error = np.sqrt(np.mean(np.diff(by_time, axis=0) ** 2, axis=0) / 2 / n)
    information = -np.asarray(law)[levels]
    assert error.max() < 0.2 and np.ptp(information) > 2
    # A gap is an average over the law's values. Of one value it is less than 0.1 nats here.
    assert (np.abs(by_time.mean(axis=0) - information) < 4.5 * error + 0.1).all()


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 2), (3,)])
def test_a_network_that_answers_in_another_shape_is_refused(shape):
    """The difference from the noise would be broadcast, to a bound of something else."""

    class Wrong(oracle.Isotropic):
        def eps_hat(self, z, condition):
            return jnp.zeros(shape)

    model = Wrong(S, schedules.FixedLinear(-5.0, 5.0))
    with pytest.raises(InputError, match=r"eps_hat: shape .* expected that of z, \(4, 3\)"):
        bound.diffusion_loss(model, jnp.zeros((4, 3)), model.embed(None, n=4), jnp.linspace(0, 0.9, 4), KEY)
