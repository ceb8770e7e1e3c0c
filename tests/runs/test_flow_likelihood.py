"""``medvdm.flow_likelihood`` and ``medvdm.importance_bound``: one value per image, their errors, and refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import Trained

import medvdm
from medvdm.errors import InputError, InputTypeError
from medvdm.runs import config as config_
from medvdm.runs.run import Run, load_data


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Run:
    return medvdm.load(trained.path)


@pytest.fixture(scope="module")
def images(loaded: Run) -> np.ndarray:
    data = load_data(loaded)
    return data.read(data.indices("test")[:4])


def test_probes_and_columns_agree_within_the_stated_error(loaded: Run, images: np.ndarray) -> None:
    """The same seed draws the same z_0, so what differs is the probes' doing."""
    exact = medvdm.flow_likelihood(loaded, images, draws=3)
    probed = medvdm.flow_likelihood(loaded, images, draws=3, divergence="gaussian", probes=64)
    assert exact.nats.shape == exact.stderr.shape == (4,)
    assert (exact.probe_stderr == 0).all() and (probed.probe_stderr > 0).all()
    assert (np.abs(probed.nats - exact.nats) < 5 * probed.probe_stderr + 1e-3).all()
    assert (exact.stderr > 0).all() and (exact.evaluations >= 8).all()
    bits = math.log(2) * math.prod(loaded.config.model.image_shape)
    np.testing.assert_allclose(exact.bits_per_dim * bits, exact.nats)
    np.testing.assert_allclose(exact.bits_per_dim_stderr * bits, exact.stderr)


def test_more_draws_at_a_time_never_raise_the_bound(loaded: Run, images: np.ndarray) -> None:
    found = medvdm.importance_bound(loaded, images, draws=8, steps=20)
    assert found.log_weights.shape == (1, 8, 4) and found.steps == 20
    assert (found.nats(1) > found.nats(2)).all() and (found.nats(2) > found.nats(8)).all()
    assert (found.stderr(2) > 0).all() and np.isnan(found.stderr(8)).all()
    np.testing.assert_allclose(found.nats(1), -found.log_weights[0].mean(axis=0))
    bits = math.log(2) * math.prod(loaded.config.model.image_shape)
    np.testing.assert_allclose(found.bits_per_dim(2) * bits, found.nats(2))
    np.testing.assert_allclose(found.bits_per_dim_stderr(2) * bits, found.stderr(2))


def test_gray_values_are_dequantised_in_either_way(trained_pixels: Path) -> None:
    run = medvdm.load(trained_pixels)
    levels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    settings = {"draws": 2, "probes": 1, "rtol": 1e-2, "atol": 1e-2}
    for dequantisation in ("encoder", "uniform"):
        found = medvdm.flow_likelihood(run, levels, dequantisation=dequantisation, **settings)
        assert np.isnan(found.probe_stderr).all() and (found.stderr > 0).all()
        error = float(np.linalg.norm(found.bits_per_dim_stderr)) / 2
        assert found.bits_per_dim.mean() > 8 - 5 * error - 0.02, "uniform noise has 8 bits"
    with pytest.raises(InputTypeError, match="expected uint8"):
        medvdm.flow_likelihood(run, levels / 255.0)


def test_what_cannot_be_meant_is_refused(loaded: Run, images: np.ndarray) -> None:
    discrete = dataclasses.replace(loaded, config=config_.change(loaded.config, timesteps=50))
    flow, weigh = medvdm.flow_likelihood, medvdm.importance_bound
    for call, words in [
        (lambda: flow(discrete, images), r"timesteps: 50; expected a model in continuous time \(0\)"),
        (lambda: flow(loaded, images, dequantisation="uniform"), "'uniform' with .* latent; expected 'encoder'"),
        (lambda: flow(loaded, images, dequantisation="unifrom"), "did you mean 'uniform'"),
        (lambda: flow(loaded, images, probes=0), "probes: 0"),
        (lambda: flow(loaded, images, rtol=-1.0), "rtol: -1.0"),
        (lambda: flow(loaded, images, draws=1), "draws: 1; expected at least 2"),
        (lambda: flow(loaded, images[:, :8]), "that of the run"),
        (lambda: weigh(loaded, images, steps=0), "steps: 0; expected at least 1"),
        (lambda: weigh(discrete, images, steps=51), "steps: 51; expected 50"),
        (lambda: weigh(loaded, images, draws=1), "draws: 1; expected at least 2"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
