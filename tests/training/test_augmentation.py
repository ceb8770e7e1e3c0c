"""Augmentation: nothing at zero, exact where it can be, SciPy's interpolation elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from medvdm import data
from medvdm.errors import InputError
from medvdm.models import cascade
from medvdm.training import augmentation
from medvdm.training.step import jit_step, new_state

augment = jax.jit(augmentation.augment, static_argnames=("shift", "size", "exposure"))


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).random((5, 12, 9, 2)), jnp.float32)


def test_zero_changes_nothing(images):
    np.testing.assert_array_equal(augment(jax.random.key(0), images), images)


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
    out = augment(jax.random.key(1), same, shift=0.1, size=0.1, exposure=0.3)
    assert out.shape == same.shape and float(out.min()) >= 0 and float(out.max()) <= 1
    assert len({float(image.mean()) for image in out}) == 4
    # A ramp that rises to the right and downwards still does: nothing is flipped or turned.
    ramp = jnp.asarray(np.add.outer(np.arange(12), np.arange(9)) / 20, jnp.float32)[None, :, :, None]
    ramps = augment(jax.random.key(2), jnp.repeat(ramp, 50, axis=0), shift=0.1, size=0.1, exposure=0.3)
    assert bool((jnp.diff(ramps, axis=1) >= -1e-6).all()) and bool((jnp.diff(ramps, axis=2) >= -1e-6).all())


DRAWS, SIDES = 2000, (16, 24)  # not square, so that a mixed-up side shows


def changed_ramps(**settings):
    """Many draws of one image, a ramp down the rows in channel 0 and along the columns in channel 1, a pixel a pixel:
    away from the border, one draw shows in both channels and can be read off."""
    place = np.stack(np.mgrid[: SIDES[0], : SIDES[1]], axis=-1)[None] / max(SIDES)
    images = jnp.repeat(jnp.asarray(place, jnp.float32), DRAWS, axis=0)
    return max(SIDES) * np.asarray(augment(jax.random.key(3), images, **settings), np.float64)


def assert_normal_with(draws, deviation):
    assert abs(draws.mean()) < 4 * deviation / np.sqrt(len(draws))
    assert abs(draws.std() - deviation) < 4 * deviation / np.sqrt(2 * len(draws))


def test_the_spread_of_the_shifts_is_the_setting_times_each_side_and_each_side_has_its_own_draw():
    out = changed_ramps(shift=0.03)
    down, along = ([8, 12][axis] - out[:, 8, 12, axis] for axis in (0, 1))
    assert_normal_with(down, 0.03 * SIDES[0])
    assert_normal_with(along, 0.03 * SIDES[1])
    assert abs(np.corrcoef(down, along)[0, 1]) < 4 / np.sqrt(DRAWS)


def test_the_spread_of_the_sizes_is_the_setting_and_half_of_it_again_for_each_side():
    out = changed_ramps(size=0.1)
    down = -np.log((out[:, 10, 12, 0] - out[:, 6, 12, 0]) / 4)  # stretched, a ramp is less steep
    along = -np.log((out[:, 8, 14, 1] - out[:, 8, 10, 1]) / 4)
    for sizes in (down, along):
        assert_normal_with(sizes, 0.1 * np.sqrt(1.25))
    shared = 1 / 1.25
    assert abs(np.corrcoef(down, along)[0, 1] - shared) < 4 * (1 - shared**2) / np.sqrt(DRAWS)


def test_the_spread_of_the_exposures_is_the_setting():
    gray = jnp.full((DRAWS, 2, 1, 1), 0.5)
    out = np.asarray(augment(jax.random.key(4), gray, exposure=0.2), np.float64)
    np.testing.assert_array_equal(out[:, 0], out[:, 1])
    assert_normal_with(np.log(np.log(out[:, 0, 0, 0]) / np.log(0.5)), 0.2)


def test_black_stays_black_and_white_stays_white_at_any_exposure():
    ends = jnp.repeat(jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1), 100, axis=0)
    np.testing.assert_array_equal(augment(jax.random.key(5), ends, exposure=0.5), ends)


def test_training_augments_by_its_settings_and_repeats():
    import tiny

    from medvdm.runs.fit import fill_in

    images = data.load(data.DataConfig(num_images=60, image_size=16))
    losses = []
    for changes in ({}, {"augment_shift": 0.2}, {"augment_shift": 0.2}):
        config = fill_in(tiny.config(encoder_layers=0, decoder_layers=0, **changes), images)
        state = new_state(config.model, config.training)
        x = jnp.asarray(images.read(images.indices("train")[:8]))
        labels = jnp.asarray(images.labels[:8], jnp.float32)
        losses.append(float(jit_step(config.model, config.training)(state, x, labels)[1].vlb_bpd))
    assert losses[1] == losses[2] != losses[0]


# Gray values that are whole numbers, and crops


def places(n, height, width):
    """n times one uint8 image whose pixels say where they are: the row in channel 0, the column in channel 1."""
    return jnp.asarray(np.stack(np.mgrid[:height, :width], axis=-1)[None].repeat(n, axis=0), jnp.uint8)


def test_whole_gray_values_are_shifted_by_whole_pixels_as_numpy_does_it():
    n, (h, w) = 500, SIDES
    out = np.asarray(augment(jax.random.key(6), places(n, h, w), shift=0.05))
    assert out.shape == (n, h, w, 2) and out.dtype == np.uint8
    down, along = 8 - out[:, 8, 12, 0].astype(int), 12 - out[:, 8, 12, 1].astype(int)
    for one, (i, j) in zip(out, zip(down, along, strict=True), strict=True):
        rows, columns = np.clip(np.arange(h) - i, 0, h - 1), np.clip(np.arange(w) - j, 0, w - 1)
        np.testing.assert_array_equal(one, np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1))
    for shifts, side in ((down, h), (along, w)):  # rounded, a normal law has 1/12 more variance
        deviation = np.sqrt((0.05 * side) ** 2 + 1 / 12)
        assert abs(shifts.mean()) < 4 * deviation / np.sqrt(n)
        assert abs(shifts.std() - deviation) < 4 * deviation / np.sqrt(2 * n)
    assert abs(np.corrcoef(down, along)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("shift", [3, 0, -2])
def test_whole_gray_values_go_where_others_go(images, shift):
    """By the same sign: a shift by whole rows, of either kind."""
    by_levels = augmentation.moved(images[0], jnp.asarray(shift))
    np.testing.assert_allclose(
        by_levels, augmentation.resample(images[0], jnp.ones(()), jnp.asarray(float(shift))), atol=1e-6
    )


def test_shifts_invent_no_gray_value_and_none_is_no_shift():
    levels = jnp.asarray(np.random.default_rng(0).choice([3, 77, 250], (20, 9, 7, 1)), jnp.uint8)
    out = augment(jax.random.key(0), levels, shift=0.2)
    assert set(np.unique(out)) <= {3, 77, 250} and np.any(out != levels)
    np.testing.assert_array_equal(augment(jax.random.key(0), levels), levels)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_a_crop_is_a_square_of_the_image_and_every_place_is_as_likely(dtype):
    n, (h, w), side = 3000, (7, 9), 5
    crops = np.asarray(cascade.cut(jax.random.key(0), [places(n, h, w).astype(dtype)], side)[0])
    assert crops.shape == (n, side, side, 2) and crops.dtype == dtype
    first = crops[:, 0, 0].astype(int)
    expected = np.stack(np.mgrid[:side, :side], axis=-1)[None] + first[:, None, None]
    np.testing.assert_array_equal(crops, expected)  # rows and columns that follow one another, inside the image
    counts = np.bincount(first[:, 0] * 5 + first[:, 1], minlength=15)
    assert len(counts) == 15, "three places down, five along"
    assert ((counts - 200) ** 2 / 200).sum() < 36.1  # chi-square of 14 degrees, p = 0.001


def test_a_crop_is_a_function_of_its_key_and_may_be_the_whole_image():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)), jnp.uint8)
    crops = [cascade.cut(jax.random.key(k), [images], 3)[0] for k in (1, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert np.any(crops[0] != crops[2])
    np.testing.assert_array_equal(cascade.cut(jax.random.key(0), [images], 8)[0], images)


@pytest.mark.parametrize("side", [0, 9])
def test_a_crop_that_is_no_part_of_the_images_is_refused(side):
    with pytest.raises(InputError, match=f"^crop: {side}; expected from 1 to 8, the images' side$"):
        cascade.cut(jax.random.key(0), [jnp.zeros((2, 12, 8, 1), jnp.uint8)], side)[0]
