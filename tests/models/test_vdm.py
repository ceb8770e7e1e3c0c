"""The composed model: its size, its consistency, what it tells the network, and its pure-function form."""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from medvdm.errors import InputError, InputTypeError
from medvdm.models import blocks, vdm
from medvdm.theory import bound as bound_
from medvdm.theory import gaussian

Z = jax.random.normal(jax.random.key(0), (5, 4))
GAMMA = jnp.linspace(-4.5, 0.5, 5)


def test_the_papers_model_has_65_7_million_parameters():
    shapes = jax.eval_shape(lambda: vdm.new_params(vdm.VDMConfig(), 0))  # nothing is allocated
    assert vdm.count(shapes) == pytest.approx(65.7e6, abs=0.05e6)
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_x_hat_and_eps_hat_are_one_prediction(small):
    config, graph, params = small
    model = vdm.merge(graph, params)
    label = model.embed(None, n=5)
    eps_hat = model.eps_hat(Z, model.condition(GAMMA, label))
    x_hat = model.x_hat(Z, GAMMA, label)
    assert np.max(np.abs(eps_hat - Z)) > 0.1
    np.testing.assert_allclose(gaussian.diffuse(x_hat, eps_hat, GAMMA[:, None]), Z, atol=1e-5)


def test_network_is_told_gamma_and_not_t(small):
    config, _, params = small
    bent = dataclasses.replace(config, schedule="monotonic")
    model = vdm.merge(small[1], params)
    other = vdm.VDM(bent, rngs=vdm.nnx.Rngs(0))
    for name in ("score", "labels"):
        setattr(other, name, getattr(model, name))
    other.schedule.w2[...] = other.schedule.w2[...] + 2.0
    other.schedule.w3[...] = other.schedule.w3[...] + 3.0
    t = jnp.full((5,), 0.5)
    assert np.abs(other.gamma(t) - model.gamma(t))[0] > 0.05  # the interior differs
    label = model.embed(None, n=5)
    np.testing.assert_array_equal(
        model.eps_hat(Z, model.condition(GAMMA, label)), other.eps_hat(Z, other.condition(GAMMA, label))
    )
    np.testing.assert_allclose(model.score.normalised(jnp.asarray([-5.0, -2.0, 1.0])), [0.0, 0.5, 1.0], atol=1e-6)


def test_time_input_does_not_follow_learned_ends(small):
    learned = vdm.VDM(dataclasses.replace(small[0], schedule="learned-linear"), rngs=vdm.nnx.Rngs(0))
    learned.schedule.gamma_0[...] = jnp.float32(-9.0)
    np.testing.assert_allclose(learned.score.normalised(jnp.asarray([-5.0, 1.0])), [0.0, 1.0], atol=1e-6)


def test_split_and_merge_are_inverse_and_graph_of_computes_the_same_graph(small):
    config, graph, params = small
    assert vdm.graph_of(config) == graph
    again_graph, again = vdm.split(vdm.merge(graph, params))
    assert again_graph == graph
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert vdm.count(params) == sum(np.size(p) for p in jax.tree.leaves(params))


def test_the_three_terms_under_the_papers_names_are_the_bounds(small):
    config, graph, params = small
    model = vdm.merge(graph, params)
    x = jnp.asarray(np.random.default_rng(0).random((5, *config.image_shape), np.float32))
    key = jax.random.key(3)
    key_z0, key_times, key_zt = jax.random.split(key, 3)
    f = model.encode(x)
    label = model.embed(None, n=5)
    bound = bound_.terms(model, x, key=key)
    np.testing.assert_allclose(model.reconstruction_loss(x, f, key_z0), bound.reconstruction, rtol=1e-5)
    np.testing.assert_allclose(model.latent_loss(f), bound.prior, rtol=1e-5)
    u = bound_.sample_times(key_times, 5)
    np.testing.assert_allclose(model.diffusion_loss(f, label, u, key_zt), bound.diffusion, rtol=1e-5)
    np.testing.assert_array_equal(bound.gradient_difference, 0.0)
    with_term = bound_.terms(model, x, key=key, with_gradient_difference=True)
    decoded = jax.nn.sigmoid(bound_.decode_z0(model, f, key_z0))
    np.testing.assert_allclose(with_term.gradient_difference, bound_.gradient_difference(x, decoded), rtol=1e-5)
    np.testing.assert_allclose(with_term.total, bound.total, rtol=1e-6)  # no part of the bound


def test_model_is_a_diffusion(small):
    assert isinstance(vdm.merge(*small[1:]), bound_.Diffusion)
    assert small[0].dimensions == 24


TINY = {
    **{"image_shape": (5, 9, 1), "classes": 2, "latent": 3, "embedding_dim": 4, "encoder_width": 4},
    **{"decoder_width": 4, "inner_width": 4, "encoder_layers": 1, "decoder_layers": 1, "score_layers": 1},
    **{"width": 4, "blocks": 1},
}
ON_GRAY = [name for name, a in vdm.ARCHITECTURES.items() if not a.likelihood.integers]
ON_LEVELS = [name for name, a in vdm.ARCHITECTURES.items() if a.likelihood.integers]


def tiny_model(name, **changes):
    config = vdm.VDMConfig(**{**TINY, "architecture": name, **changes})
    params = tiny.weights(config, 0.3)
    if "basis" in params:
        params["basis"]["variances"] = jnp.abs(params["basis"]["variances"])
    return config, vdm.graph_of(config), params


@pytest.mark.parametrize("name", vdm.ARCHITECTURES)
def test_every_architecture_answers_the_same_calls(name):
    config, graph, params = tiny_model(name)
    x = jnp.asarray(np.random.default_rng(1).random((4, 5, 9, 1), np.float32))
    if name in ON_LEVELS:
        x = (255 * x).astype(jnp.uint8)

    @jax.jit
    def calls(params):
        model = vdm.merge(graph, params)
        f = model.encoder(x)
        gamma = jnp.full((4,), -1.0)
        eps_hat = model.score(f, model.score.condition(gamma, model.embed(None, n=4)))
        return f, eps_hat, model.decoder(f, model.gamma(jnp.zeros(()))), bound_.terms(model, x, key=jax.random.key(0))

    f, eps_hat, decoded, terms = calls(params)
    shape = (5, 9, 1) if vdm.ARCHITECTURES[name].on_pixels else (3,)
    assert f.shape == eps_hat.shape == (4, *vdm.merge(graph, params).latent_shape) == (4, *shape)
    assert decoded.shape == x.shape and np.all(np.isfinite(terms.total))
    picture = vdm.merge(graph, params).picture(decoded)
    assert picture.shape == x.shape and picture.dtype == jnp.float32
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1


@pytest.mark.parametrize("name", vdm.ARCHITECTURES)
def test_what_is_measured_is_told_by_the_kind_of_its_variables_and_joins_again(name):
    config, graph, params = tiny_model(name)
    trained, measured = vdm.partition(graph, params)
    assert bool(measured) == vdm.ARCHITECTURES[name].measures_components
    assert vdm.count(trained) + vdm.count(measured) == vdm.count(params)
    joined = vdm.join(trained, measured)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, joined, params)
    if measured:
        assert {n: leaf.shape for n, leaf in measured["basis"].items()} == {
            "mean": (45,), "components": (3, 45), "variances": (3,)
        }  # fmt: skip
        other = jax.tree.map(lambda p: p + 1, measured["basis"])
        jax.tree.map(np.testing.assert_array_equal, vdm.with_components(params, other)["basis"], other)
    with pytest.raises(InputError, match=r"components: \{'mean': \(7,\)\}; expected"):
        vdm.with_components(params, {"mean": jnp.zeros(7)})


def test_measured_variables_may_lie_anywhere_in_a_model():
    class Scaled(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.layer.scale = blocks.Measured(jnp.ones(3))

    graph, params = vdm.split(Scaled())
    trained, measured = vdm.partition(graph, params)
    assert set(trained["layer"]) == {"kernel", "bias"} and set(measured["layer"]) == {"scale"}
    jax.tree.map(np.testing.assert_array_equal, vdm.join(trained, measured), params)


@pytest.mark.parametrize("name", ON_GRAY)
@pytest.mark.parametrize(("factor", "says"), [(255.0, "values from 0 to 255"), (-1.0, "from -1 to"), (np.nan, "nan")])
def test_images_that_are_not_gray_in_the_unit_interval_are_refused(name, factor, says):
    """In the bound, the encoding and the likelihood, wherever the values are known."""
    _, graph, params = tiny_model(name)
    model = vdm.merge(graph, params)
    x = jnp.asarray(factor * np.linspace(0.0, 1.0, 90, dtype=np.float32).reshape(2, 5, 9, 1))
    for call in (
        lambda: bound_.terms(model, x, key=jax.random.key(0)),
        lambda: model.encode(x),
        lambda: model.observation_loss(x, jnp.zeros_like(x)),
        lambda: jax.jit(lambda: model.encode(x))(),  # closed over: known inside a compiled function too
    ):
        with pytest.raises(InputError, match=says):
            call()


@pytest.mark.parametrize("name", ON_LEVELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.uint16, jnp.int8, jnp.bool_])
def test_images_that_are_no_gray_values_of_8_bits_are_refused_by_an_8_bit_model(unchecked, name, dtype):
    """In the bound, the encoding and the likelihood; inside a compiled function too, as it is the type alone."""
    _, graph, params = tiny_model(name)
    model = vdm.merge(graph, params)
    x = jnp.ones((2, 5, 9, 1), dtype)
    for call in (
        lambda: bound_.terms(model, x, key=jax.random.key(0)),
        lambda: model.encode(x),
        lambda: model.observation_loss(x, jnp.zeros((2, 5, 9, 1))),
        lambda: jax.jit(model.encode)(x),
    ):
        with pytest.raises(
            InputTypeError, match=rf"^images: dtype {x.dtype}; expected uint8, .*to_levels rounds images in"
        ):
            call()


@pytest.mark.parametrize("name", ON_LEVELS)
@pytest.mark.parametrize("shape", [(2, 5, 9, 3), (2, 5, 9), (2, 45)])
def test_images_of_other_channels_are_refused_by_an_8_bit_model(unchecked, name, shape):
    _, graph, params = tiny_model(name)
    with pytest.raises(InputError, match=r"^images: shape \(2, .*; expected \(n, h, w, 1\)$"):
        vdm.merge(graph, params).encode(jnp.zeros(shape, jnp.uint8))


def test_float16_is_refused_with_the_reason(unchecked):
    with pytest.raises(InputError, match="dtype: 'float16'; most gradients are below .* expected 'float32' or") as no:
        vdm.VDMConfig(dtype="float16")
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"gamma_min": -200.0, "gamma_max": 200.0}, r"gamma_min, gamma_max: -200.0, 200.0; expected within \+-33.3"),
        ({"gamma_min": 2.0}, "gamma_min"),
        ({"latent": 0}, "latent: 0"),
        ({"timesteps": -1}, "timesteps: -1"),
        ({"embedding_dim": 7}, "even"),
        ({"image_shape": (8, 8)}, "image_shape"),
        ({"image_shape": (0, 8, 1)}, "image_shape"),
        ({"dtype": "float64"}, "dtype: 'float64'"),
        ({"schedule": "cosine"}, "schedule: 'cosine'"),
        (
            {"architecture": "unet", "image_shape": (28, 3, 1)},
            r"image_shape: \(28, 3, 1\); expected sides of at least 4",
        ),
        ({"architecture": "unet", "scales": 4, "patch": 4, "image_shape": (28, 28, 1)}, "sides of at least 32 for"),
        ({"architecture": "u-net"}, "architecture: 'u-net'; did you mean 'unet'"),
        ({"details": "contrasts"}, "details: 'contrasts'; did you mean 'contrast'"),
        ({"width": 0}, "width: 0; expected at least 1"),
        ({"scales": 0}, "scales: 0; expected at least 1"),
        ({"blocks": 0}, "blocks: 0; expected at least 1"),
        ({"patch": 0}, "patch: 0; expected at least 1"),
        ({"attention": True, "width": 5, "scales": 2}, "width: 5; expected a multiple of 4"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(unchecked, wrong, says):
    with pytest.raises(InputError, match=says) as no:
        vdm.VDMConfig(**wrong)
    assert "\n" not in str(no.value)
