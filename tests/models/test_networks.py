"""The networks: any image shape, identity at the start, FiLM with scale and shift, consistent pixel order."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvdm.errors import InputError, InputTypeError
from medvdm.models import blocks
from medvdm.models.autoencoder import Decoder, Encoder
from medvdm.models.scorenet import ScoreNet

F32 = blocks.DTYPES["float32"]


def coder(kind, shape=(3, 4, 2), latent=5, layers=1, **sizes):
    sizes = {"width": 6, "inner_width": 7} | sizes
    return kind(shape, latent, layers=layers, dtype=F32, rngs=nnx.Rngs(0), **sizes)


def score(layers=2, dtype=F32):
    return ScoreNet(4, embedding_dim=6, layers=layers, inner_width=10, dtype=dtype, rngs=nnx.Rngs(0))


def randomise(module, scale=0.5):
    rng = np.random.default_rng(0)
    graph, params = nnx.split(module, nnx.Param)
    noisy = jax.tree.map(lambda p: p + scale * rng.standard_normal(p.shape).astype(np.float32), params)
    return nnx.merge(graph, noisy)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 1), (4, 6, 3)])
def test_any_image_shape_and_channel_count_goes_in_and_comes_out(shape):
    latent = coder(Encoder, shape)(jnp.full((2, *shape), 0.5))
    assert latent.shape == (2, 5) and latent.dtype == jnp.float32
    logits = coder(Decoder, shape)(latent)
    assert logits.shape == (2, *shape) and logits.dtype == jnp.float32


def test_decoder_puts_pixels_back_in_the_encoders_order():
    shape, pixels = (3, 4, 2), 24
    encoder = coder(Encoder, shape, pixels, layers=0, width=pixels)
    decoder = coder(Decoder, shape, pixels, layers=0, width=pixels)
    for linear in (encoder.enter, encoder.leave, decoder.enter, decoder.leave):
        linear.kernel[...], linear.bias[...] = jnp.eye(pixels), jnp.zeros(pixels)
    x = jnp.arange(2 * pixels, dtype=jnp.float32).reshape(2, *shape) / 48  # every pixel its own value
    np.testing.assert_allclose(decoder(encoder(x)), 2 * x - 1, atol=1e-6)
    np.testing.assert_allclose(encoder(x)[0], 2 * np.asarray(x[0]).ravel() - 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_integer_images_are_refused(unchecked, dtype):
    with pytest.raises(InputTypeError, match="expected float"):
        coder(Encoder)(jnp.zeros((2, 3, 4, 2), dtype))


@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (2, 3, 4, 1), (3, 4, 2), (2, 24)])
def test_images_of_another_shape_are_refused_even_of_as_many_pixels(unchecked, shape):
    with pytest.raises(InputError, match="expected \\(n, "):
        coder(Encoder)(jnp.zeros(shape))


def test_residual_blocks_start_as_the_identity_and_can_leave_it():
    block = blocks.ResidualBlock(6, 8, dtype=F32, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(0), (3, 6))
    np.testing.assert_array_equal(block(h), h)
    np.testing.assert_array_equal(block(h, jnp.ones((3, 16))), h)
    assert np.max(np.abs(randomise(block)(h) - h)) > 0.1
    graph, params = nnx.split(block, nnx.Param)
    gradient = nnx.to_pure_dict(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(h) ** 2))(params))
    assert np.max(np.abs(gradient["contract"]["kernel"])) > 0  # zero weights, but not dead ones


def test_modulation_is_1_plus_scale_times_h_plus_shift():
    h, scale, shift = jnp.asarray([[1.0, -2.0]]), jnp.asarray([[0.5, 1.0]]), jnp.asarray([[10.0, 20.0]])
    np.testing.assert_allclose(blocks.modulate(h, jnp.concatenate([scale, shift], 1)), [[11.5, 16.0]])
    np.testing.assert_array_equal(blocks.modulate(h, jnp.zeros((1, 4))), h)
    three = jnp.tile(h, (3, 1))
    np.testing.assert_array_equal(blocks.modulate(three, jnp.ones((1, 4))), blocks.modulate(three, jnp.ones((3, 4))))


def test_film_starts_as_the_identity_and_the_gradient_reaches_scale_and_shift():
    film = blocks.FiLM(3, 4, dtype=F32, rngs=nnx.Rngs(0))
    condition = jnp.asarray([[1.0, -1.0, 0.5]])
    np.testing.assert_array_equal(film(condition), 0.0)
    h = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    gradient = jax.grad(lambda f: jnp.sum(blocks.modulate(h, f) ** 2))(film(condition))
    assert np.all(np.asarray(gradient)[0, :4] != 0) and np.all(np.asarray(gradient)[0, 4:] != 0)
    np.testing.assert_allclose(gradient[0, :4], h[0] * gradient[0, 4:])


def test_condition_modulates_every_block_of_the_score_network():
    net = randomise(score())
    z = jax.random.normal(jax.random.key(0), (2, 4))
    condition = net.condition(jnp.asarray([0.1, 0.8]), jnp.ones((2, 6)))
    assert [c.shape for c in condition] == [(2, 20), (2, 20)]
    base = net(z, condition)
    for block in range(2):
        for half in (slice(0, 10), slice(10, 20)):
            changed = list(condition)
            changed[block] = changed[block].at[:, half].add(0.5)
            assert np.max(np.abs(net(z, tuple(changed)) - base)) > 1e-3


def test_score_depends_on_time_and_on_label_row_by_row():
    net = randomise(score())
    z, label = jnp.ones((2, 4)), jnp.ones((2, 6))
    out = net(z, net.condition(jnp.asarray([0.1, 0.8]), label))
    assert np.max(np.abs(out[0] - out[1])) > 1e-3
    labelled = net(z, net.condition(jnp.asarray([0.1, 0.1]), label.at[1].set(-1.0)))
    assert np.max(np.abs(labelled[0] - labelled[1])) > 1e-3
    np.testing.assert_allclose(labelled[0], out[0], atol=1e-5)
    shared = net(z, net.condition(jnp.asarray([0.1]), label[:1]))  # one condition for all rows
    np.testing.assert_allclose(shared, jnp.tile(out[:1], (2, 1)), atol=1e-5)


def test_score_starts_as_its_input():
    net = score()
    z = jax.random.normal(jax.random.key(0), (3, 4))
    np.testing.assert_array_equal(net(z, net.condition(jnp.full((3,), 0.5), jnp.ones((3, 6)))), z)


def test_time_embedding_tells_times_apart_at_every_scale_a_sampler_uses():
    u = jnp.linspace(0.0, 1.0, 1001)
    embedding = np.asarray(blocks.time_embedding(u, 128))
    assert embedding.shape == (1001, 128) and np.max(np.abs(embedding)) <= 1.0 + 1e-6
    distance = np.linalg.norm(embedding[:, None, ::8] - embedding[None, :, ::8], axis=-1)
    assert distance[~np.eye(1001, dtype=bool)].min() > 0.05
    np.testing.assert_allclose(blocks.time_embedding(jnp.asarray([0.25]), 2), [[np.sin(250), np.cos(250)]], atol=1e-4)
    slow = np.asarray(blocks.time_embedding(jnp.asarray([0.7]), 8))[0]
    np.testing.assert_allclose(slow[[3, 7]], [np.sin(0.07), np.cos(0.07)], atol=1e-5)


def test_null_row_is_used_for_no_label_and_where_keep_is_zero():
    embed = blocks.LabelEmbedding(3, 5, rngs=nnx.Rngs(0))
    labels = jnp.asarray([[1.0, 0, 0], [0, 1, 1], [0, 0, 1]])
    table, null = embed.table[...], embed.null[...]
    assert np.linalg.norm(null) > 0.1  # not the zero vector
    np.testing.assert_allclose(embed(labels), [table[0], table[1] + table[2], table[2]], rtol=1e-6)
    np.testing.assert_array_equal(embed(None, n=2), [null, null])
    np.testing.assert_allclose(embed(labels, jnp.asarray([1.0, 0.0, 1.0])), [table[0], null, table[2]], rtol=1e-6)
    np.testing.assert_array_equal(embed(labels, jnp.ones(3)), embed(labels))


def test_unconditional_model_has_a_null_and_no_table():
    embed = blocks.LabelEmbedding(0, 5, rngs=nnx.Rngs(0))
    assert not hasattr(embed, "table")
    assert embed(None, n=3).shape == (3, 5)
    np.testing.assert_array_equal(embed(jnp.ones((2, 4))), embed(None, n=2))


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), (3,)])
def test_labels_of_another_number_of_classes_are_refused(unchecked, shape):
    with pytest.raises(InputError, match="multi-hot"):
        blocks.LabelEmbedding(3, 5, rngs=nnx.Rngs(0))(jnp.ones(shape))


def test_bfloat16_is_the_arithmetic_only():
    net = score(dtype=blocks.DTYPES["bfloat16"])
    assert {p.dtype for p in jax.tree.leaves(nnx.state(net, nnx.Param))} == {jnp.dtype("float32")}
    condition = net.condition(jnp.full((3,), 0.5), jnp.ones((3, 6)))
    assert condition[0].dtype == jnp.bfloat16
    assert net(jnp.ones((3, 4)), condition).dtype == jnp.float32
