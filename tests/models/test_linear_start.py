"""The linear-start model begins as the closed form that it is named after, and its measured part is never trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from medvdm import data
from medvdm.errors import InputError, InputTypeError
from medvdm.evaluation import baselines
from medvdm.evaluation.components import check_components, exact_components, principal_components
from medvdm.models import linear_start, vdm
from medvdm.models.linear_start import DELTA
from medvdm.runs.fit import fill_in, first_state
from medvdm.runs.presets import preset
from medvdm.theory import bound, linear_gaussian
from medvdm.training import augmentation
from medvdm.training.devices import Layout
from medvdm.training.step import jit_step

LATENT = 12


@pytest.fixture(scope="module")
def start():
    """Settings, images and the first state of a small linear-start model on phantoms."""
    settings = preset(
        "linear-start", data="phantom", num_images=120, image_size=32, latent=LATENT, batch_size=8, basis_copies=2
    )
    images = data.load(settings.data)
    settings = fill_in(settings, images)
    return settings, images, first_state(settings, images, Layout(1))


@pytest.fixture(scope="module")
def model(start):
    settings, _, state = start
    return vdm.merge(vdm.graph_of(settings.model), state.params)


def closed_form(state, settings, x):
    basis = jax.tree.map(np.asarray, state.params["basis"])
    noise = float(np.exp(settings.model.gamma_min / 2))
    return linear_gaussian.linear_gaussian_vdm(
        x.reshape(len(x), -1), basis["mean"], basis["components"], basis["variances"], noise
    )


def test_before_training_the_rate_is_that_of_the_closed_form(start):
    settings, images, state = start
    x = images.read(images.indices("test"))
    rate = closed_form(state, settings, x)[1].mean()

    def estimate(params, key):
        # The parameters are an argument: a model that is closed over becomes a constant, and XLA on a CPU (jaxlib
        # 0.10.2) miscompiles products with a constant of equal entries, as the last layers' zeros, in large batches.
        terms = bound.terms(vdm.merge(graph, params), jnp.asarray(x), key=key)
        return jnp.mean(terms.diffusion + terms.prior)

    graph, keys = vdm.graph_of(settings.model), jax.random.split(jax.random.key(0), 200)
    draws = np.asarray(jax.jit(jax.vmap(estimate, in_axes=(None, 0)))(state.params, keys), np.float64)
    assert np.isfinite(draws).all()
    assert abs(draws.mean() - rate) < 4 * draws.std(ddof=1) / np.sqrt(200)
    assert draws.std() / np.sqrt(200) < 0.03 * rate  # the test could fail
    alone = jax.jit(estimate)
    np.testing.assert_allclose([alone(state.params, key) for key in keys[:3]], draws[:3], rtol=1e-4)


def test_before_training_the_noise_prediction_is_the_exact_denoiser(start, model):
    _, _, state = start
    variances = np.asarray(state.params["basis"]["variances"], np.float64)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, LATENT)), jnp.float32)
    for gamma in (-1.67, 2.0, 9.0):
        condition = model.condition(jnp.full((1,), gamma), model.embed(None, n=1))
        alpha2, sigma2 = 1 / (1 + np.exp(gamma)), 1 / (1 + np.exp(-gamma))
        exact = np.sqrt(sigma2) * np.asarray(z) / (alpha2 * variances + sigma2)
        np.testing.assert_allclose(model.eps_hat(z, condition), exact, rtol=2e-4)


def test_the_correction_of_the_noise_is_scaled_by_the_deviation_of_the_exact_denoisers_error():
    """Random weights everywhere, and the formula of LinearScore in numpy but for the network inside."""
    settings = vdm.VDMConfig(
        architecture="linear-start", image_shape=(4, 4, 1), latent=3, embedding_dim=4, decoder_width=4, inner_width=8,
        decoder_layers=0, score_layers=1,
    )  # fmt: skip
    params = tiny.weights(settings, 0.5)
    variances = np.array([30.0, 2.0, 0.1])
    params["basis"]["variances"] = jnp.asarray(variances, jnp.float32)
    gamma, z = np.array([-4.0, 0.0, 1.5, 6.0]), np.random.default_rng(1).standard_normal((4, 3))
    alpha2, sigma2 = 1 / (1 + np.exp(gamma))[:, None], 1 / (1 + np.exp(-gamma))[:, None]
    v = alpha2 * variances + sigma2

    @jax.jit
    def predict(params, z, whitened, gamma):
        model = vdm.merge(vdm.graph_of(settings), params)
        label = model.embed(None, n=4)
        inner = model.score.net(whitened, model.score.net.condition(gamma, label))
        return model.eps_hat(z, model.condition(gamma, label)), inner

    arrays = (jnp.asarray(a, jnp.float32) for a in (z, z / np.sqrt(v), gamma))
    found, inner = (np.asarray(a, np.float64) for a in predict(params, *arrays))
    net = inner - z / np.sqrt(v)  # ScoreNet adds its input
    correction = np.sqrt(alpha2 * variances / v) * net
    np.testing.assert_allclose(found, np.sqrt(sigma2) * z / v + correction, rtol=1e-3, atol=1e-5)
    assert np.abs(correction).min() > 1e-3  # the test could fail


def test_before_training_the_picture_is_the_posterior_mean_where_the_clip_does_not_reach(start, model):
    settings, images, state = start
    basis = jax.tree.map(np.asarray, state.params["basis"])
    f = model.encode(jnp.asarray(images.read(images.indices("test")[:4])))
    shrink = basis["variances"] / (basis["variances"] + np.exp(settings.model.gamma_min))
    mean = basis["mean"] + (np.asarray(f) * shrink) @ basis["components"]
    picture = np.asarray(jax.nn.sigmoid(model.decode(f))).reshape(4, -1)
    inside = (mean > 0.1) & (mean < 0.9)
    assert inside.mean() > 0.5
    assert np.abs(picture - mean)[inside].max() < DELTA**2 / (4 * 0.1)  # the clip adds delta^2 / (4 p) at most


def test_the_smooth_clip_is_positive_and_its_formula_far_below_zero_too():
    p = np.array([-3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 4.0])
    exact = 0.5 * (p + np.sqrt(p**2 + DELTA**2))  # float64 has the digits
    np.testing.assert_allclose(linear_start._clip(jnp.asarray(p, jnp.float32)), exact, rtol=1e-5)


def decoder(shape, width=4):
    """A decoder with random weights everywhere, and its logits of three latents."""
    basis = linear_start.Basis(int(np.prod(shape)), 3)
    net = linear_start.LinearDecoder(shape, basis, width=width, layers=1, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(net)
    state = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), state)
    net = nnx.merge(graph, state)
    net.basis.variances[...] = jnp.ones(3)
    return net, jnp.asarray(rng.standard_normal((3, 3)), jnp.float32)


def by_cells(net, logits):
    """The decoder's correction of logits whose sides are multiples of 8, cell by cell."""
    n, h, w, c = logits.shape
    cells = np.asarray(0.3 * logits).reshape(n, h // 8, 8, w // 8, 8, c).transpose(0, 1, 3, 2, 4, 5)
    cells = cells.reshape(n, h // 8, w // 8, -1)
    place = np.stack(np.meshgrid(np.linspace(-1, 1, h // 8), np.linspace(-1, 1, w // 8), indexing="ij"), axis=-1)
    hidden = net.enter(jnp.asarray(np.concatenate([cells, np.stack([place] * n)], axis=-1), jnp.float32))
    for block in net.blocks:
        hidden = block(hidden)
    change = np.asarray(net.leave(nnx.swish(hidden))).reshape(n, h // 8, w // 8, 8, 8, c)
    return logits + change.transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)


@pytest.mark.parametrize("shape", [(16, 24, 1), (17, 24, 2), (15, 9, 1), (4, 4, 1), (1, 8, 3)])
def test_sides_that_are_no_multiples_of_the_cell_are_filled_up_and_cut_off(shape):
    net, z = decoder(shape)
    gamma_0 = jnp.asarray(-2.0)
    logits = np.asarray(net.mean_logits(z, gamma_0))
    more = [(0, -side % 8) for side in shape[:2]]
    expected = by_cells(net, np.pad(logits, [(0, 0), *more, (0, 0)], mode="edge"))[:, : shape[0], : shape[1]]
    found = net(z, gamma_0)
    assert found.shape == (3, *shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - logits).max() > 0.01  # the correction does something


def test_a_side_of_255_costs_what_256_does():
    def work(side):
        net, z = decoder((side, side, 1), width=8)
        graph, params = vdm.split(net)

        def loss(params):
            return vdm.merge(graph, params)(z, jnp.asarray(-2.0)).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    assert work(255) < 1.02 * work(256)
    assert work(17) < 1.1 * work(24)


def test_components_agree_with_a_dense_decomposition(start):
    images = start[1]
    x = images.read(images.indices("train"))
    found = principal_components(x, 6, key=jax.random.key(0), batch_size=13)
    mean, components, variances = exact_components(x.reshape(len(x), -1), 6)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["variances"], variances, rtol=1e-3)
    overlap = np.abs(np.asarray(found["components"]) @ components.T)
    np.testing.assert_allclose(overlap, np.eye(6), atol=0.02)
    np.testing.assert_allclose(found["components"] @ found["components"].T, np.eye(6), atol=1e-4)


def test_components_do_not_depend_on_the_random_start_in_their_sign_either(start):
    images = start[1]
    x = images.read(images.indices("train"))
    one, other = (principal_components(x, 6, key=jax.random.key(seed))["components"] for seed in (0, 1))
    np.testing.assert_allclose(one, other, atol=0.01)


def test_augmented_copies_widen_the_variances(start):
    images = start[1]
    x = images.read(images.indices("train"))
    plain = principal_components(x, 20, key=jax.random.key(0))
    wide = principal_components(x, 20, key=jax.random.key(0), copies=2, shift=0.1)
    assert float(wide["variances"].sum()) > float(plain["variances"].sum())


def test_every_copy_of_every_batch_is_augmented_by_a_key_of_its_own_the_same_in_each_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(
        augmentation, "augment", lambda key, x, **_: (seen.append(tuple(jax.random.key_data(key).tolist())), x)[1]
    )
    x = np.random.default_rng(0).random((6, 2, 3, 1), np.float32)
    with jax.disable_jit():  # so that keys are numbers
        for seed in (0, 1):
            principal_components(x, 2, key=jax.random.key(seed), copies=2, batch_size=4, rounds=1, shift=0.1)
    first, second = np.split(np.array(seen), 2)
    assert len({tuple(key) for key in (*first[:4], *second[:4])}) == 8  # two batches, two copies, two keys
    np.testing.assert_array_equal(first, np.tile(first[:4], (4, 1)))  # the mean, the start, one round, the variances


def test_copies_count_as_images_only_where_they_are_augmented():
    x = np.random.default_rng(0).random((20, 8, 8, 1), np.float32)
    for settings in ({}, {"shift": 0.0, "size": 0.0, "exposure": 0.0}):
        with pytest.raises(InputError, match="latent: 40; expected 1 to 19, for 20 training images") as problem:
            principal_components(x, 40, key=jax.random.key(0), copies=2, **settings)
        assert "\n" not in str(problem.value)
    found = principal_components(x, 40, key=jax.random.key(0), copies=2, rounds=1, shift=0.1)
    assert float(found["variances"].min()) > 1e-5  # the floor is 1e-6
    check_components(59, 20, 64, 2)
    with pytest.raises(InputError, match="latent: 60; expected 1 to 59"):
        check_components(60, 20, 64, 2)
    with pytest.raises(InputError, match="latent: 0; expected 1 to 16, for 20 training images of 16 pixels"):
        check_components(0, 20, 16, 0)


def test_one_image_has_no_components():
    with pytest.raises(InputError, match="latent: 1; expected more images: one alone has no components") as problem:
        principal_components(np.zeros((1, 8, 8, 1), np.float32), 1, key=jax.random.key(0), copies=3)
    assert "\n" not in str(problem.value)


def test_training_changes_everything_but_the_measured_part(start):
    settings, images, state = start
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, ema_decay=0.9))
    state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    before = jax.tree.map(np.asarray, state.params)
    step = jit_step(settings.model, settings.training)
    x = jnp.asarray(images.read(images.indices("train")[:8]))
    for _ in range(3):
        state, _ = step(state, x, None)
    for tree in (state.params, state.ema):
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), tree["basis"], before["basis"])
        assert all(jax.tree.leaves(same))
    assert not np.array_equal(state.params["decoder"]["leave"]["kernel"], before["decoder"]["leave"]["kernel"])
    assert len(jax.tree.leaves(state.opt_state)) < 3 * len(jax.tree.leaves(before))  # no moments of the measured part


def test_a_run_trains_resumes_and_samples(tmp_path):
    import medvdm

    of_data = {"data": "phantom", "num_images": 60, "image_size": 16, "batch_size": 8, "basis_copies": 1}
    of_networks = {"latent": 6, "decoder_width": 8, "decoder_layers": 1, "score_layers": 1, "inner_width": 16}
    settings = preset("linear-start", steps=4, **of_data, **of_networks)
    run = medvdm.fit(settings, tmp_path / "run", progress=False)
    loaded = medvdm.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.params["basis"]["components"], run.params["basis"]["components"])
    result = medvdm.evaluate(loaded, split="test", draws=2, save=False)
    assert result["over_lingauss_bpd"] == pytest.approx(result["vlb_bpd"] - result["lingauss_bpd"], abs=1e-6)
    assert result["over_lingauss_bpd_stderr"] > 0
    assert medvdm.sample(loaded, num=2, steps=5).images.shape == (2, 16, 16, 1)


OFF = {"augment_shift": 0.0, "augment_size": 0.0, "augment_exposure": 0.0}


@pytest.mark.parametrize(
    ("changes", "most", "words"),
    [
        ({"latent": 50, "basis_copies": 0}, 2000, "latent: 50; expected 1 to 45, for 46 training images"),
        ({"latent": 50, "basis_copies": 2, **OFF}, 2000, "latent: 50; expected 1 to 45, for 46 training images"),
        ({"latent": 30, "basis_copies": 0}, 20, "latent: 30; expected 1 to 19, for 20 training images"),
    ],
    ids=["too many", "copies that are the images again", "more images than are looked at"],
)
def test_too_many_components_are_refused_before_anything_is_written(tmp_path, monkeypatch, changes, most, words):
    import medvdm

    monkeypatch.setattr(baselines, "MAX_IMAGES", most)
    settings = preset("linear-start", data="phantom", num_images=60, image_size=16, batch_size=8, **changes)
    with pytest.raises(InputError, match=words) as problem:
        medvdm.fit(settings, tmp_path / "run")
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "run").exists()


def test_bad_images_and_architectures_are_refused(model, unchecked):
    with pytest.raises(InputTypeError, match="dtype int32"):
        model.encode(jnp.zeros((1, 32, 32, 1), jnp.int32))
    with pytest.raises(InputError, match="shape"):
        model.encode(jnp.zeros((1, 16, 32, 1)))
    with pytest.raises(InputError, match="architecture: 'linear'; did you mean 'linear-start'"):
        vdm.VDMConfig(architecture="linear")
