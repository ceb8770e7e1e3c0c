"""``medvdm.bound``: one value per image, its error against repeats, agreement with ``evaluate``, and refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import Trained

import medvdm
from medvdm.errors import InputError, InputTypeError, RunError
from medvdm.runs import config as config_
from medvdm.runs.bound import ImageBound
from medvdm.runs.run import Run, load_data


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Run:
    return medvdm.load(trained.path)


@pytest.fixture(scope="module")
def given(loaded: Run) -> tuple[np.ndarray, np.ndarray]:
    """Test images and their labels."""
    data = load_data(loaded)
    rows = data.indices("test")
    return data.read(rows), data.labels[rows]


def test_the_mean_of_a_split_is_its_evaluation(loaded: Run, given: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = given
    settings = {"draws": 3, "batch_size": 5, "seed": 4}
    for hot, null in ((labels, False), (None, True)):
        found = medvdm.bound(loaded, images, hot, **settings)
        whole = medvdm.evaluate(loaded, split="test", null=null, save=False, **settings)
        assert isinstance(found, ImageBound) and found.nats.shape == found.stderr.shape == (len(images),)
        assert found.nats.mean() == pytest.approx(whole["vlb_nats_per_image"], rel=1e-6)
        assert found.bits_per_dim.mean() == pytest.approx(whole["vlb_bpd"], rel=1e-6)
        assert found.excess_bits_per_dim.mean() == pytest.approx(whole["excess_bpd"], rel=1e-5)
        np.testing.assert_allclose(found.reconstruction + found.diffusion + found.prior, found.nats, rtol=1e-9)
        pixels = math.prod(loaded.config.model.image_shape)
        np.testing.assert_allclose(found.bits_per_dim_stderr * pixels * math.log(2), found.stderr, rtol=1e-9)


def test_the_error_is_the_spread_of_repeats(loaded: Run, given: tuple[np.ndarray, np.ndarray]) -> None:
    images = given[0][:4]
    found = [medvdm.bound(loaded, images, draws=8, seed=seed) for seed in range(40)]
    stated = np.sqrt(np.mean([f.stderr**2 for f in found], axis=0))
    actual = np.std([f.nats for f in found], axis=0, ddof=1)
    # A deviation of 40 values is known to 1 / sqrt(2 * 39) = 11 %.
    assert (np.abs(actual / stated - 1) < 4.5 * 0.113).all()


def test_an_image_alone_has_the_value_that_it_has_among_others(
    loaded: Run, given: tuple[np.ndarray, np.ndarray]
) -> None:
    images = given[0]
    many = medvdm.bound(loaded, images, draws=64)
    alone = medvdm.bound(loaded, images[3:4], draws=64, seed=1)
    assert abs(alone.nats[0] - many.nats[3]) < 4.5 * math.hypot(alone.stderr[0], many.stderr[3])
    assert alone.floor[0] == pytest.approx(many.floor[3])


def test_images_and_labels_may_be_given_in_each_usual_form(loaded: Run, given: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = given
    as_bytes = np.rint(images * 255).astype(np.uint8)
    one = medvdm.bound(loaded, as_bytes, labels.argmax(axis=1), draws=2)
    other = medvdm.bound(loaded, as_bytes[..., 0] / 255.0, labels.astype(bool), draws=2)
    np.testing.assert_allclose(one.nats, other.nats, rtol=1e-5)
    null = medvdm.bound(loaded, as_bytes, draws=2)
    assert (one.diffusion != null.diffusion).all() and (one.reconstruction == null.reconstruction).all()


def test_what_cannot_be_meant_is_refused(loaded: Run, given: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    images, labels = given
    n = len(images)
    call = lambda x=images, y=None, **more: lambda: medvdm.bound(loaded, x, y, **more)  # noqa: E731
    for wrong, kind, words in [
        (call(images * 255), InputError, r"images: values from .* expected \[0, 1\]"),
        (call(images - 0.5), InputError, "images: values"),
        (call(np.where(images > 0.5, np.nan, images)), InputError, "images: values"),
        (call(np.rint(images * 255).astype(np.int64)), InputTypeError, "images: dtype int64"),
        (call(images[:, :8]), InputError, r"shape \(8, 8, 16, 1\); expected"),
        (call(images[0, ..., 0]), InputError, r"shape \(16, 16\)"),
        (call(images.transpose(0, 3, 1, 2)), InputError, "that of the run"),
        (call(images[:0]), InputError, "none of them 0"),
        (call(images, labels[:-1]), InputError, "labels: shape"),
        (call(images, labels.astype(float) - 1), InputError, "-1.0 at .*uncertain"),
        (call(images, np.full(n, 2)), InputError, "labels: 2 to 2; expected 0 to 1"),
        (call(images, np.full(n, 0.5)), InputTypeError, "labels: dtype float64"),
        (call(images, ["Pneumonia"] * n), InputTypeError, "labels: dtype <U9"),
        (call(draws=1), InputError, "draws: 1; expected at least 2"),
        (call(batch_size=0), InputError, "batch_size: 0"),
        (call(seed=-1), InputError, "seed: -1"),
    ]:
        with pytest.raises(kind, match=words) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_gray_values_of_an_eight_bit_run(trained_pixels: Path) -> None:
    """uint8 and nothing else, which no one rounds unasked; there is no floor."""
    run = medvdm.load(trained_pixels)
    levels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    found = medvdm.bound(run, levels, draws=4)
    assert found.floor is None
    error = float(np.linalg.norm(found.bits_per_dim_stderr)) / 3
    assert found.bits_per_dim.mean() > 8 - 4.5 * error, "uniform noise has 8 bits"
    np.testing.assert_array_equal(medvdm.bound(run, levels[..., 0], draws=4).nats, found.nats)
    with pytest.raises(InputError, match="excess: .* no floor; expected bits_per_dim"):
        _ = found.excess_bits_per_dim
    for wrong in (levels / 255.0, levels.astype(np.int64), levels > 100):
        with pytest.raises(InputTypeError, match=r"expected uint8.*medvdm\.images\.to_levels") as caught:
            medvdm.bound(run, wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"shape \(3, 8, 16, 1\); expected"):
        medvdm.bound(run, levels[:, :8])
    with pytest.raises(InputError, match="none of them 0"):
        medvdm.bound(run, levels[:0])


def test_what_was_never_trained_is_refused(loaded: Run, given: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = given
    for dropout, hot, words in ((0.0, None, "null .* was not trained"), (1.0, labels, "labels were not trained")):
        run = dataclasses.replace(loaded, config=config_.change(loaded.config, label_dropout=dropout))
        with pytest.raises(RunError, match=words):
            medvdm.bound(run, images, hot, draws=2)
