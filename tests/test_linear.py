"""The linear-start model begins as the closed form that it is named after, and its measured part is never trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvdm import baselines, config, data, fitting, linear, training, vdm, vlb
from medvdm.devices import Layout
from medvdm.errors import InputError, InputTypeError

LATENT = 12


@pytest.fixture(scope="module")
def start():
    """Settings, images and the first state of a small linear-start model on phantoms."""
    settings = config.preset(
        "linear-start", data="phantom", num_images=120, image_size=32, latent=LATENT, batch_size=8, basis_copies=2
    )
    images = data.load(settings.data)
    settings = fitting.fill_in(settings, images)
    return settings, images, fitting.first_state(settings, images, Layout(1))


@pytest.fixture(scope="module")
def model(start):
    settings, _, state = start
    return vdm.merge(vdm.graph_of(settings.model), state.params)


def closed_form(state, settings, x):
    basis = jax.tree.map(np.asarray, state.params[vdm.BASIS])
    noise = float(np.exp(settings.model.gamma_min / 2))
    return baselines.linear_gaussian_vdm(
        x.reshape(len(x), -1), basis["mean"], basis["components"], basis["variances"], noise
    )


def test_before_training_the_rate_is_that_of_the_closed_form(start, model):
    settings, images, state = start
    x = images.read(images.indices("test"))
    rate = closed_form(state, settings, x)[1].mean()

    @jax.jit
    def estimate(key):
        terms = vlb.bound(model, jnp.asarray(x), key=key)
        return jnp.mean(terms.diffusion + terms.prior)

    draws = np.asarray([estimate(key) for key in jax.random.split(jax.random.key(0), 200)])
    assert abs(draws.mean() - rate) < 4 * draws.std(ddof=1) / np.sqrt(200)
    assert draws.std() / np.sqrt(200) < 0.03 * rate  # the test could fail


def test_before_training_the_noise_prediction_is_the_exact_denoiser(start, model):
    _, _, state = start
    variances = np.asarray(state.params[vdm.BASIS]["variances"], np.float64)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, LATENT)), jnp.float32)
    for gamma in (-1.67, 2.0, 9.0):
        condition = model.condition(jnp.full((1,), gamma), model.embed(None, n=1))
        alpha2, sigma2 = 1 / (1 + np.exp(gamma)), 1 / (1 + np.exp(-gamma))
        exact = np.sqrt(sigma2) * np.asarray(z) / (alpha2 * variances + sigma2)
        np.testing.assert_allclose(model.eps_hat(z, condition), exact, rtol=2e-4)


def test_before_training_the_picture_is_the_posterior_mean_where_the_clip_does_not_reach(start, model):
    settings, images, state = start
    basis = jax.tree.map(np.asarray, state.params[vdm.BASIS])
    f = model.encode(jnp.asarray(images.read(images.indices("test")[:4])))
    shrink = basis["variances"] / (basis["variances"] + np.exp(settings.model.gamma_min))
    mean = basis["mean"] + (np.asarray(f) * shrink) @ basis["components"]
    picture = np.asarray(jax.nn.sigmoid(model.decode(f))).reshape(4, -1)
    inside = (mean > 0.1) & (mean < 0.9)
    assert inside.mean() > 0.5
    assert np.abs(picture - mean)[inside].max() < linear.CLIP**2 / (4 * 0.1)  # the clip adds delta^2 / (4 p) at most


def test_the_smooth_clip_is_positive_and_its_formula_far_below_zero_too():
    p = np.array([-3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 4.0])
    exact = 0.5 * (p + np.sqrt(p**2 + linear.CLIP**2))  # float64 has the digits
    np.testing.assert_allclose(linear._clip(jnp.asarray(p, jnp.float32)), exact, rtol=1e-5)


def test_components_agree_with_a_dense_decomposition(start):
    images = start[1]
    x = images.read(images.indices("train"))
    found = linear.principal_components(x, 6, key=jax.random.key(0), batch_size=13)
    mean, components, variances = baselines.principal_components(x.reshape(len(x), -1), 6)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["variances"], variances, rtol=1e-3)
    overlap = np.abs(np.asarray(found["components"]) @ components.T)
    np.testing.assert_allclose(overlap, np.eye(6), atol=0.02)
    np.testing.assert_allclose(found["components"] @ found["components"].T, np.eye(6), atol=1e-4)


def test_components_do_not_depend_on_the_random_start_in_their_sign_either(start):
    images = start[1]
    x = images.read(images.indices("train"))
    one, other = (linear.principal_components(x, 6, key=jax.random.key(seed))["components"] for seed in (0, 1))
    np.testing.assert_allclose(one, other, atol=0.01)


def test_augmented_copies_widen_the_variances(start):
    images = start[1]
    x = images.read(images.indices("train"))
    plain = linear.principal_components(x, 20, key=jax.random.key(0))
    wide = linear.principal_components(x, 20, key=jax.random.key(0), copies=2, shift=0.1)
    assert float(wide["variances"].sum()) > float(plain["variances"].sum())


def test_training_changes_everything_but_the_measured_part(start):
    settings, images, state = start
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, ema_decay=0.9))
    state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    before = jax.tree.map(np.asarray, state.params)
    step = training.jit_step(settings.model, settings.training)
    x = jnp.asarray(images.read(images.indices("train")[:8]))
    for _ in range(3):
        state, _ = step(state, x, None)
    for tree in (state.params, state.ema):
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), tree[vdm.BASIS], before[vdm.BASIS])
        assert all(jax.tree.leaves(same))
    assert not np.array_equal(state.params["decoder"]["leave"]["kernel"], before["decoder"]["leave"]["kernel"])
    assert len(jax.tree.leaves(state.opt_state)) < 3 * len(jax.tree.leaves(before))  # no moments of the measured part


def test_a_run_trains_resumes_and_samples(tmp_path):
    import medvdm

    settings = config.preset(
        "linear-start", data="phantom", num_images=60, image_size=16, latent=6, batch_size=8, steps=4, basis_copies=1
    )
    run = medvdm.fit(settings, tmp_path / "run", progress=False)
    loaded = medvdm.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.params[vdm.BASIS]["components"], run.params[vdm.BASIS]["components"])
    result = medvdm.evaluate(loaded, split="test", draws=2, save=False)
    assert result["over_lingauss_bpd"] == pytest.approx(result["vlb_bpd"] - result["lingauss_bpd"], abs=1e-6)
    assert result["over_lingauss_bpd_stderr"] > 0
    assert medvdm.sample(loaded, num=2, steps=5).images.shape == (2, 16, 16, 1)


def test_too_many_components_are_refused_before_anything_is_written(tmp_path):
    import medvdm

    settings = config.preset(
        "linear-start", data="phantom", num_images=60, image_size=16, latent=50, batch_size=8, basis_copies=0
    )
    with pytest.raises(InputError, match="latent: 50; expected at most"):
        medvdm.fit(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_images_and_architectures_are_refused(model, unchecked):
    with pytest.raises(InputTypeError, match="dtype int32"):
        model.encode(jnp.zeros((1, 32, 32, 1), jnp.int32))
    with pytest.raises(InputError, match="shape"):
        model.encode(jnp.zeros((1, 16, 32, 1)))
    with pytest.raises(InputError, match="architecture: 'linear'; did you mean 'linear-start'"):
        vdm.VDMConfig(architecture="linear")
