"""The closed-form baselines against SVD, numerical paths through the bound, and Monte Carlo."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from medvdm.errors import RunError
from medvdm.evaluation import baselines
from medvdm.evaluation.components import exact_components
from medvdm.theory import bound, linear_gaussian, schedules


def images(n, shape=(4, 5, 1), seed=0):
    """Smooth correlated images in [0, 1] with falling component variances."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).standard_normal((math.prod(shape), math.prod(shape)))
    scales = 0.5 * 0.7 ** np.arange(math.prod(shape))
    logits = rng.standard_normal((n, math.prod(shape))) * scales @ basis
    return (1 / (1 + np.exp(-0.3 * logits))).reshape(n, *shape).astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(12, 5), (60, 20), (60, 200)])
def test_principal_components_are_the_svds(n, k):
    x = images(n).reshape(n, -1)
    mean, components, variances = exact_components(x, k)
    _, singular, rows = np.linalg.svd(x.astype(np.float64) - x.mean(0, dtype=np.float64), full_matrices=False)
    kept = len(components)
    assert min(k, 10) <= kept + 5 and kept <= min(k, n - 1, 20)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(variances, singular[:kept] ** 2 / (n - 1), rtol=1e-3, atol=1e-7)
    leading = min(kept, 6)
    np.testing.assert_allclose(np.abs(np.sum(components[:leading] * rows[:leading], axis=1)), 1.0, atol=1e-3)
    np.testing.assert_allclose(components[:leading] @ components[:leading].T, np.eye(leading), atol=1e-3)


def test_components_of_no_variance_are_left_out():
    x = np.outer(np.arange(6.0), np.ones(9)).astype(np.float32)
    assert len(exact_components(x, 5)[1]) == 1
    assert len(exact_components(np.ones((6, 9), np.float32), 5)[1]) == 0


def test_cross_entropy_is_the_librarys_with_clipped_probabilities():
    from medvdm.models import likelihoods

    rng = np.random.default_rng(0)
    x, logits = rng.random((3, 20)).astype(np.float32), rng.standard_normal((3, 20)).astype(np.float32)
    expected = likelihoods.bernoulli_nll(jnp.asarray(x), jnp.asarray(logits))
    np.testing.assert_allclose(linear_gaussian.cross_entropy(x, 1 / (1 + np.exp(-logits))), expected, rtol=1e-5)
    np.testing.assert_allclose(linear_gaussian.cross_entropy(np.ones((1, 2)), np.zeros((1, 2))), [-2 * math.log(1e-3)])


def toy():
    """Three orthonormal components in six pixels, their variances, a mean and some images."""
    rng = np.random.default_rng(1)
    components = np.linalg.qr(rng.standard_normal((6, 3)))[0].T
    variances = np.array([0.05, 0.02, 0.005])
    mean = np.full(6, 0.5)
    x = mean + rng.standard_normal((2, 3)) * np.sqrt(variances) @ components
    return x, mean, components, variances


def test_rate_of_the_linear_gaussian_vdm_is_its_kl_by_the_bound_with_the_exact_denoiser():
    x, mean, components, variances = toy()
    noise = 0.1
    _, rate = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, noise)
    f = (x - mean) @ components.T
    # p is N(0, Lambda); its exact denoiser; gamma_0 such that r = 0.1; gamma_1 so large that N(0, I) is z_1's law.
    schedule = schedules.FixedLinear(2 * math.log(noise), 9.0)
    model = oracle.Mixture([1.0], np.zeros((1, 3)), np.diag(variances), schedule)
    n = 100_000
    for i in range(2):
        rows = jnp.tile(jnp.asarray(f[i : i + 1], jnp.float32), (n, 1))
        u = (jnp.arange(n, dtype=jnp.float32) + 0.5) / n
        diffusion = np.asarray(bound.diffusion_loss(model, rows, jnp.zeros((n, 1)), u, jax.random.key(i)), np.float64)
        estimate = diffusion.mean() + float(bound.prior_loss(model, rows[:1])[0])
        assert abs(estimate - rate[i]) < 5 * diffusion.std() / math.sqrt(n) + 3e-3


def test_rate_is_zero_for_no_information_and_grows_as_the_noise_falls():
    x, mean, components, variances = toy()
    rates = [
        linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, r)[1].mean()
        for r in (100.0, 1.0, 0.1, 0.01)
    ]
    assert rates[0] == pytest.approx(0.0, abs=1e-4) and np.all(np.diff(rates) > 0)


def test_reconstruction_of_the_linear_gaussian_vdm_is_its_monte_carlo_mean():
    x, mean, components, variances = toy()
    noise = 0.15
    reconstruction, _ = linear_gaussian.linear_gaussian_vdm(x, mean, components, variances, noise)
    rng = np.random.default_rng(2)
    f = (x - mean) @ components.T
    n = 100_000
    for i in range(2):
        y = f[i] + noise * rng.standard_normal((n, 3))
        decoded = mean + (variances / (variances + noise**2) * y) @ components  # the posterior mean
        losses = linear_gaussian.cross_entropy(np.broadcast_to(x[i], decoded.shape), decoded)
        assert abs(losses.mean() - reconstruction[i]) < 5 * losses.std() / math.sqrt(n) + 1e-3


def test_fewer_than_64_images_have_no_pca_64_but_a_mean_image():
    fitted = baselines.fit(images(30, (9, 9, 1)), images(8, (9, 9, 1), seed=1))
    x = images(5, (9, 9, 1), seed=2)
    assert fitted.pca(x) is None
    assert fitted.pca(x, 4).shape == (5,) and fitted.mean_image(x).shape == (5,)
    assert np.mean(fitted.pca(x, 4)) < np.mean(fitted.mean_image(x))


def test_without_validation_images_or_enough_training_images_there_is_no_linear_gaussian_vdm():
    x = images(5)
    for fitted in (baselines.fit(images(30), None), baselines.fit(images(4), x), baselines.fit(images(30), x[:0])):
        assert fitted.latent == 0 and fitted.linear_gaussian(x) is None
        assert fitted.mean_image(x).shape == (5,)
    assert baselines.fit(images(1), x).mean_image(x).shape == (5,)


def test_choices_are_the_best_candidates_on_validation_and_never_use_other_images():
    train, validation = images(80, (9, 9, 1)), images(20, (9, 9, 1), seed=1)
    fitted = baselines.fit(train, validation)
    mean, components, variances = exact_components(train.reshape(80, -1), 79)

    def total(k, r):
        flat = validation.reshape(20, -1)
        return sum(t.mean() for t in linear_gaussian.linear_gaussian_vdm(flat, mean, components[:k], variances[:k], r))

    candidates = [k for k in linear_gaussian.LATENTS if k <= len(components)]
    assert fitted.latent == min(candidates, key=lambda k: total(k, 0.7 * math.sqrt(variances[k - 1])))
    last = math.sqrt(variances[fitted.latent - 1])
    assert fitted.noise == pytest.approx(last * min(baselines.NOISES, key=lambda r: total(fitted.latent, r * last)))
    # Evaluating changes nothing, and images past the stated limits are not looked at.
    before = {k: np.copy(v) for k, v in vars(fitted).items()}
    fitted.linear_gaussian(1 - validation)
    fitted.pca(1 - validation)
    for name, value in vars(fitted).items():
        np.testing.assert_array_equal(value, before[name])
    long = np.concatenate([np.tile(validation, (4, 1, 1, 1))[: baselines.MAX_VALIDATION_IMAGES], 1 - validation])
    limited = baselines.fit(train, long)
    alone = baselines.fit(train, long[: baselines.MAX_VALIDATION_IMAGES])
    assert (limited.latent, limited.noise) == (alone.latent, alone.noise)


def test_save_and_load_round_trip(tmp_path):
    fitted = baselines.fit(images(40), images(8, seed=1))
    baselines.save(fitted, tmp_path / "baselines.npz")
    loaded = baselines.load(tmp_path / "baselines.npz")
    for name, value in vars(fitted).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
        assert type(getattr(loaded, name)) is type(value)
    x = images(3, seed=2)
    np.testing.assert_array_equal(loaded.linear_gaussian(x), fitted.linear_gaussian(x))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_a_run_error_naming_it(tmp_path, keep):
    path = tmp_path / "baselines.npz"
    baselines.save(baselines.fit(images(40), None), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(RunError, match="baselines.npz"):
        baselines.load(path)


def test_a_damaged_or_missing_or_foreign_file_is_a_run_error(tmp_path):
    path = tmp_path / "baselines.npz"
    with pytest.raises(RunError, match="baselines.npz"):
        baselines.load(path)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(RunError, match="components"):
        baselines.load(path)
    baselines.save(baselines.fit(images(40), None), path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # a bit flip in the data: the archive's checksum finds it
    path.write_bytes(damaged)
    with pytest.raises(RunError, match="baselines.npz"):
        baselines.load(path)
