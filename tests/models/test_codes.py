"""Codes: up the flow and down again, for every kind of model, and what lies between two of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from medvdm.errors import InputError, InputTypeError
from medvdm.models import codes, likelihoods, vdm
from medvdm.models.generate import generate

PIXELS = {"architecture": "unet", "gamma_min": -9.0, "gamma_max": 5.0, "embedding_dim": 4, "width": 4, "blocks": 1}
KINDS = {
    "pixels": {**PIXELS, "image_shape": (6, 8, 1), "scales": 1, "classes": 2},
    "cascade": {**PIXELS, "image_shape": (8, 16, 1), "scales": 1, "base_scales": 1, "reduce": 2, "stages": 3},
}


def network(kind):
    """Random weights, small enough for a flow that does not fold."""
    config = vdm.VDMConfig(**KINDS[kind])
    return config, vdm.graph_of(config), tiny.weights(config, 0.15)


def gray(n, shape):
    """Smooth random images."""
    return np.random.default_rng(1).integers(100, 156, (n, *shape)).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_up_and_down_returns_the_image_and_better_with_more_steps(kind):
    config, graph, params = network(kind)
    x = gray(3, config.image_shape)
    alpha = float(jax.nn.sigmoid(9.0) ** 0.5)
    errors = []
    for steps in (8, 64):
        code = codes.encode(graph, params, x, steps=steps)
        back = generate(graph, params, num=3, steps=steps, solver="heun", grid="gamma", z=code)
        errors.append(np.abs(back.latents[-1] / alpha - likelihoods.level_values(jnp.asarray(x))).max())
    if kind == "cascade":
        assert [one.shape for one in code] == [(3, 2, 4, 1), (3, 4, 8, 1), (3, 8, 16, 1)]
    off = np.abs(255 * back.images - x)
    assert off.max() < 1.01 and np.mean(off > 0.5) < 0.02  # a value between two levels may fall to the other one
    assert errors[1] < errors[0] / 8, errors
    other = codes.encode(graph, params, x[::-1].copy(), steps=64)
    for one, turned in zip(code, other, strict=True):
        np.testing.assert_allclose(one[::-1], turned, atol=2e-3)


def test_a_code_of_a_latent_model_is_that_of_its_latent(small):
    config, graph, params = small
    x = np.random.default_rng(0).uniform(size=(4, *config.image_shape)).astype(np.float32)
    (code,) = codes.encode(graph, params, x, steps=300)
    model = vdm.merge(graph, params)
    f = np.asarray(model.encode(jnp.asarray(x)))
    back = generate(graph, params, num=4, steps=300, solver="heun", grid="gamma", z=code)
    alpha = float(jax.nn.sigmoid(-model.gamma(jnp.zeros(()))) ** 0.5)
    np.testing.assert_allclose(back.latents[-1] / alpha, f, atol=0.02 * np.abs(f).max())
    np.testing.assert_allclose(back.images, jax.nn.sigmoid(model.decode(jnp.asarray(f))), atol=0.02)


def test_labels_change_a_code():
    config, graph, params = network("pixels")
    x = gray(2, config.image_shape)
    of = lambda labels: codes.encode(graph, params, x, steps=8, labels=labels)[0]  # noqa: E731
    one, other = of(np.eye(2, dtype=np.float32)), of(np.eye(2, dtype=np.float32)[::-1].copy())
    assert np.abs(one - other).max() > 1e-4 and np.abs(one - of(None)).max() > 1e-4


def test_between_two_codes_lies_a_great_circle():
    rng = np.random.default_rng(0)
    one, other = ([rng.standard_normal((2, *shape)).astype(np.float32) for shape in ((4, 4), (32, 32))] for _ in "ab")
    for z, w, middle in zip(one, other, codes.between(one, other, 0.5), strict=True):
        for i in range(2):
            a, b, c = z[i].ravel(), w[i].ravel(), middle[i].ravel()
            angle = lambda u, v: np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))  # noqa: E731
            unit = a / np.linalg.norm(a) + b / np.linalg.norm(b)
            if len(a) > 100:  # of nearly one length
                assert angle(c, unit) < 0.05 and np.linalg.norm(c) == pytest.approx(np.linalg.norm(a), rel=0.06)
    for share, end in ((0.0, one), (1.0, other)):
        for found, z in zip(codes.between(one, other, share), end, strict=True):
            np.testing.assert_allclose(found, z, atol=1e-6)
    for found, z in zip(codes.between(one, one, 0.3), one, strict=True):
        np.testing.assert_allclose(found, z, atol=1e-6)
    with pytest.raises(InputError, match=r"^codes: shapes \(2, 4, 4\) and \(1, 4, 4\)"):
        codes.between(one, [one[0][:1], one[1]], 0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"solver": "ancestral"}, "^solver: 'ancestral'"),
        ({"steps": 0}, "^steps: 0; expected at least 1"),
        ({"labels": np.zeros((2, 3), np.float32)}, r"^labels: shape \(2, 3\); expected \(2, 2\)"),
    ],
)
def test_what_cannot_be_encoded_is_refused(settings, says):
    config, graph, params = network("pixels")
    with pytest.raises(InputError, match=says):
        codes.encode(graph, params, gray(2, config.image_shape), **{"steps": 2} | settings)


def test_images_of_another_type_are_refused(unchecked):
    config, graph, params = network("pixels")
    with pytest.raises(InputTypeError, match="expected uint8"):
        codes.encode(graph, params, np.zeros((1, *config.image_shape), np.float32), steps=2)
