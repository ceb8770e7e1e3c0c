"""Augmentation: nothing at zero, exact where it can be, SciPy's interpolation elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from medvdm import augmentation, data, training


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).random((5, 12, 9, 2)), jnp.float32)


def test_zero_changes_nothing(images):
    np.testing.assert_array_equal(augmentation.augment(jax.random.key(0), images), images)


def test_a_shift_by_whole_rows_repeats_the_border(images):
    moved = augmentation.resample(images[0], jnp.ones(()), jnp.asarray(3.0))
    np.testing.assert_allclose(moved[3:], images[0][:-3], atol=1e-6)
    np.testing.assert_allclose(moved[:3], np.broadcast_to(images[0][:1], (3, 9, 2)), atol=1e-6)


@pytest.mark.parametrize(("size", "shift"), [(1.2, 0.7), (0.8, -2.3), (1.0, 0.5)])
def test_resampling_agrees_with_scipy(images, size, shift):
    x = np.asarray(images[0, :, :, 0])
    centre = (len(x) - 1) / 2
    theirs = ndimage.affine_transform(
        x, [1 / size, 1.0], [centre - (centre + shift) / size, 0.0], order=1, mode="nearest"
    )
    ours = augmentation.resample(jnp.asarray(x), jnp.asarray(size), jnp.asarray(shift))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_images_stay_in_range_upright_and_each_gets_its_own_draw(images):
    same = jnp.repeat(images[:1], 4, axis=0)
    out = augmentation.augment(jax.random.key(1), same, shift=0.1, size=0.1, exposure=0.3)
    assert out.shape == same.shape and float(out.min()) >= 0 and float(out.max()) <= 1
    assert len({float(image.mean()) for image in out}) == 4
    # A ramp that rises to the right and downwards still does: nothing is flipped or turned.
    ramp = jnp.asarray(np.add.outer(np.arange(12), np.arange(9)) / 20, jnp.float32)[None, :, :, None]
    ramps = augmentation.augment(jax.random.key(2), jnp.repeat(ramp, 50, axis=0), shift=0.1, size=0.1, exposure=0.3)
    assert bool((jnp.diff(ramps, axis=1) >= -1e-6).all()) and bool((jnp.diff(ramps, axis=2) >= -1e-6).all())


def test_the_spread_of_the_draws_is_the_setting():
    # A linear ramp shifted by s falls by its slope times s, away from the border: the draws can be read off.
    side, n = 64, 4000
    ramp = jnp.asarray(np.repeat(np.arange(side) / side, side).reshape(1, side, side, 1), jnp.float32)
    out = augmentation.augment(jax.random.key(3), jnp.repeat(ramp, n, axis=0), shift=0.03)
    shifts = -(np.asarray(out[:, 32, 32, 0]) - 0.5)  # as a fraction of the side
    assert abs(shifts.mean()) < 4 * 0.03 / np.sqrt(n)
    assert abs(shifts.std() - 0.03) < 4 * 0.03 / np.sqrt(2 * n)


def test_training_augments_by_its_settings_and_repeats():
    import tiny

    from medvdm import fitting

    images = data.load(data.DataConfig(num_images=60, image_size=16))
    losses = []
    for changes in ({}, {"augment_shift": 0.2}, {"augment_shift": 0.2}):
        config = fitting.fill_in(tiny.config(**changes), images)
        state = training.init_state(config.model, config.training)
        x = jnp.asarray(images.read(images.indices("train")[:8]))
        labels = jnp.asarray(images.labels[:8], jnp.float32)
        losses.append(float(training.jit_step(config.model, config.training)(state, x, labels)[1].vlb_bpd))
    assert losses[1] == losses[2] != losses[0]
