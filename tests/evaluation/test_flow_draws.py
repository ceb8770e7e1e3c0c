"""Draws of a cascade's likelihood and weights: sums over its stages, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from medvdm.errors import DivergedError
from medvdm.evaluation import flow as flow_
from medvdm.models import cascade, vdm
from medvdm.theory import flow, importance
from medvdm.theory.flow import FlowConfig

KEY = jax.random.key(0)
X = np.random.default_rng(1).integers(0, 256, (3, 4, 8, 1), np.uint8)
LABELS = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
CONFIG = FlowConfig(divergence="rademacher", probes=3, rtol=1e-2, atol=1e-2, max_steps=100)


@pytest.fixture(scope="module")
def networks():
    """Graph and parameters of a conditional cascade of two stages with random weights everywhere."""
    config = vdm.VDMConfig(
        **{"architecture": "unet", "image_shape": (4, 8, 1), "gamma_min": -9.0, "gamma_max": 5.0, "embedding_dim": 4},
        **{"width": 4, "scales": 1, "base_scales": 1, "blocks": 1, "patch": 1, "details": "none", "reduce": 2},
        classes=2,
    )
    return vdm.graph_of(config), tiny.weights(config, 0.15)


def draws_of(networks, labels=LABELS, params=None, draws=1):
    graph, own = networks
    return flow_.flow_draws(graph, params or own, X, labels, draws=draws, key=KEY, config=CONFIG)


def test_each_image_has_the_sum_of_its_stages_and_steps_of_its_own(networks):
    graph, params = networks
    found = draws_of(networks, draws=2)
    assert all(leaf.shape == (2, 3) and np.isfinite(leaf).all() for leaf in found)
    assert (found.nats[0] != found.nats[1]).all() and (found.probe_variance > 0).all()
    keys = jax.random.split(jax.random.fold_in(KEY, 0), 3)

    @jax.jit
    def alone(params, x, label, key):
        parts = cascade.stages(vdm.merge(graph, params), x)
        return [
            flow.log_weight(part.model, part.images, label, key=jax.random.fold_in(key, i), config=CONFIG)
            for i, part in enumerate(parts)
        ]

    stages = alone(params, X[1:2], LABELS[1:2], keys[1])
    nats = -sum(float(stage.log_weight[0]) for stage in stages)
    assert found.nats[0, 1] == pytest.approx(nats, abs=2e-2 * 40), "twice the tolerance per dimension, of which 8 + 32"
    evaluations = sum(int(stage.evaluations) for stage in stages)
    assert abs(found.evaluations[0, 1] - evaluations) <= 12, "a step that is on the verge may be taken twice"
    variance = sum(float(stage.probe_variance[0]) for stage in stages)
    assert found.probe_variance[0, 1] == pytest.approx(variance, rel=0.1)


def test_labels_count_and_numbers_that_are_none_are_refused(networks):
    assert (draws_of(networks).nats[0, :2] != draws_of(networks, LABELS[:, ::-1]).nats[0, :2]).all()
    broken = jax.tree.map(lambda p: p * jnp.nan, networks[1])
    with pytest.raises(DivergedError, match="within 100 steps; expected a model whose predicted noise") as caught:
        draws_of(networks, params=broken)
    assert "\n" not in str(caught.value)


def test_paths_of_every_stage_are_weighed(networks):
    graph, params = networks
    found = flow_.chain_log_weights(graph, params, X, LABELS, draws=2, steps=7, key=KEY)
    assert found.shape == (2, 2, 3) and (found[:, 0] != found[:, 1]).all()
    key = jax.random.fold_in(jax.random.fold_in(KEY, 1), 0)

    @jax.jit
    def first(params, x, labels):
        part = cascade.stages(vdm.merge(graph, params), x)[0]
        return importance.chain_log_weight(part.model, part.images, labels, key=key, steps=7)

    np.testing.assert_allclose(found[0, 1], first(params, X, LABELS), rtol=1e-4)
    broken = jax.tree.map(lambda p: p * jnp.nan, params)
    with pytest.raises(DivergedError, match="importance: a weight is not finite"):
        flow_.chain_log_weights(graph, broken, X, LABELS, draws=1, steps=7, key=KEY)
