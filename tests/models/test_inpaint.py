"""What a part of an image tells of its copies, rounding that keeps means, and draws from cascades of random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from medvdm.errors import DivergedError, InputError
from medvdm.models import cascade, inpaint, vdm
from medvdm.models.inpaint import CONTRAST, Seen, draws, with_cell_means
from medvdm.models.likelihoods import level_values
from medvdm.theory.conditional import CellMean, Mask

MODEL = {
    **{"architecture": "unet", "image_shape": (8, 16, 1), "gamma_min": -9.0, "gamma_max": 5.0, "embedding_dim": 4},
    **{"width": 4, "scales": 1, "base_scales": 1, "blocks": 1, "details": "none", "patch": 2},
}

of_copy = jax.jit(inpaint.of_copy, static_argnums=1)
copy_of_known = jax.jit(inpaint.copy_of_known, static_argnums=3)


def gray(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def known_of(missing):
    return jnp.asarray(~missing[None, ..., None], jnp.float32)


def masked(x, missing):
    """What is seen of images of which some pixels are missing."""
    known = known_of(missing)
    y = known * level_values(jnp.asarray(x))
    return Seen(Mask(known), y, jnp.zeros_like(y))


# What is known of a copy


@pytest.mark.parametrize("k", [2, 3, 4])
def test_where_all_pixels_are_known_so_is_the_copy_to_the_level(k):
    """Every remainder of the sum by k^2, so that halves are rounded as the copy's are."""
    cells = np.full((k * k, k * k), 117)
    for remainder in range(k * k):
        cells[remainder, :remainder] += 1
    x = cells.reshape(1, -1, k, k).transpose(0, 2, 1, 3).reshape(1, k, -1, 1).astype(np.uint8)
    seen = of_copy(masked(x, np.zeros(x.shape[1:3], bool)), k)
    np.testing.assert_array_equal(seen.y, level_values(cascade.reduced(jnp.asarray(x), k)))
    assert (np.asarray(seen.variance) == 0).all() and (np.asarray(seen.operator.known) == 1).all()


def test_a_cell_without_a_known_pixel_is_not_known_and_one_with_some_is_known_with_an_error():
    x, missing = gray(1, 8, 8, 1), np.zeros((8, 8), bool)
    missing[:4, :4] = True  # a whole cell
    missing[4:, 5:] = True  # three of its four columns
    seen = of_copy(masked(x, missing), 4)
    np.testing.assert_array_equal(seen.operator.known[0, ..., 0], [[0, 1], [1, 1]])
    np.testing.assert_array_equal(np.asarray(seen.variance)[0, ..., 0] > 0, [[False, False], [False, True]])
    assert seen.y[0, 0, 0, 0] == 0
    np.testing.assert_allclose(seen.y[0, 1, 1, 0], 2.0 * x[0, 4:, 4].mean() / 255 - 1.0, rtol=1e-4)


def test_the_error_of_a_partly_known_cell_is_that_of_a_drawn_sample():
    """Of k^2 independent pixels, the mean of m of them misses the mean of all by w (1/m - 1/k^2): simulated."""
    k, m, deviation, n = 4, 5, 20.0, 4000
    cells = np.clip(np.rint(np.random.default_rng(0).normal(120.0, deviation, (n, k, k))), 0, 255)
    x = cells.transpose(1, 0, 2).reshape(1, k, n * k, 1).astype(np.uint8)
    missing = np.ones((k, k), bool)
    missing.flat[:m] = False
    seen = of_copy(masked(x, np.tile(missing, (1, n))), k)
    errors = np.asarray(seen.y)[0, 0, :, 0] - (2.0 * cells.mean(axis=(1, 2)) / 255 - 1.0)
    claimed = np.asarray(seen.variance)[0, 0, :, 0]
    np.testing.assert_allclose(
        claimed, (2 * deviation / 255) ** 2 * (1 / m - 1 / k**2), rtol=4 * np.sqrt(2 / (n * (m - 1)))
    )
    assert abs(errors.var() / claimed.mean() - 1) < 4 * np.sqrt(2 / n)
    assert abs(errors.mean()) < 4 * np.sqrt(claimed.mean() / n)


def test_noise_and_cells_of_one_known_pixel():
    """By Bayes' rule with matrices: pixels c + d_i with nothing known of c, some of them seen through noise."""
    k, known, variance = 2, np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.002, 0.03, 0.0])
    y = np.array([0.3, 0.1, -0.2, 0.0]) * known
    shape = (1, k, k, 1)
    seen = copy_of_known(*(jnp.asarray(a.reshape(shape), jnp.float32) for a in (known, y, variance)), k)
    w = ((y[:3] - y[:3].mean()) ** 2).sum() / 2 - variance.sum() / 3
    assert w > 0.05
    prior = 100.0 * np.ones((4, 4)) + w * np.eye(4)
    a, mean_of = np.eye(4)[:3], np.full(4, 0.25)
    gain = mean_of @ prior @ a.T @ np.linalg.inv(a @ prior @ a.T + np.diag(variance[:3]))
    np.testing.assert_allclose(seen.y.item(), gain @ y[:3], rtol=1e-3)
    np.testing.assert_allclose(seen.variance.item(), mean_of @ prior @ mean_of - gain @ a @ prior @ mean_of, rtol=2e-2)
    lonely = np.array([1.0, 0, 0, 0]).reshape(shape)
    alone = copy_of_known(*(jnp.asarray(a, jnp.float32) for a in (lonely, 0.5 * lonely, 0 * lonely)), k)
    np.testing.assert_allclose(alone.variance.item(), CONTRAST * (1 - 1 / 4), rtol=1e-5)
    assert alone.y.item() == 0.5


@pytest.mark.parametrize(("seen_by", "reduce", "expected"), [(4, 4, "mean 1"), (4, 2, "mean 2"), (2, 4, "mask")])
def test_what_cell_means_tell_of_a_copy(seen_by, reduce, expected):
    x = gray(2, 8, 8, 1)
    y = CellMean(seen_by)(level_values(jnp.asarray(x)))
    copy = of_copy(Seen(CellMean(seen_by), y, jnp.zeros_like(y)), reduce)
    if expected == "mask":  # means of means are those of the copy, rounded
        np.testing.assert_array_equal(copy.y, level_values(cascade.reduced(jnp.asarray(x), reduce)))
    else:
        assert copy.operator == CellMean(int(expected[-1]))
        np.testing.assert_array_equal(copy.y, y)


# Rounding


@pytest.mark.parametrize("k", [2, 3])
def test_with_cell_means_gives_every_mean_that_is_asked_for_with_the_least_changes(k):
    """Also black and white ones, however far they are from the pixels."""
    rng = np.random.default_rng(0)
    means = np.r_[0, 255, 1, 254, rng.integers(0, 256, 12)].astype(np.uint8).reshape(2, 2, 4, 1)
    levels = gray(2, 2 * k, 4 * k, 1)
    found = with_cell_means(levels, means, k)
    np.testing.assert_array_equal(cascade.reduced(jnp.asarray(found), k), means)
    right = with_cell_means(levels, np.asarray(cascade.reduced(jnp.asarray(levels), k)), k)
    np.testing.assert_array_equal(right, levels)
    near = np.asarray(cascade.reduced(jnp.asarray(levels), k)).astype(int)
    one = np.where(near < 255, near + 1, near).astype(np.uint8)
    assert np.abs(with_cell_means(levels, one, k).astype(int) - levels).max() <= 1


# Draws


@pytest.fixture(scope="module")
def models():
    """A single stage and a cascade of three, with random weights."""

    def made(**changes):
        config = vdm.VDMConfig(**MODEL | changes)
        return vdm.graph_of(config), tiny.weights(config, 0.1)

    return {1: made(), 3: made(reduce=2, stages=3)}


def drawn(model, seen, **changes):
    return draws(
        *model, seen, **{"samples": 2, "steps": 3, "solver": "dpmpp", "turns": 2, "seed": 1, "batch_size": 2} | changes
    )


@pytest.mark.parametrize("stages", [1, 3])
def test_known_pixels_are_kept_and_a_draw_depends_on_its_numbers_alone(models, stages):
    """The batches of two hold both draws of an image, or the first draws of both."""
    x, missing = gray(2, 8, 16, 1), np.zeros((8, 16), bool)
    missing[1:6, 3:12] = True
    seen = masked(x, missing)
    out = drawn(models[stages], seen)
    assert out.shape == (2, 2, 8, 16, 1) and out.dtype == np.uint8
    np.testing.assert_array_equal(out[:, :, ~missing], np.repeat(x[:, None], 2, axis=1)[:, :, ~missing])
    hole = out[:, :, missing].astype(int)
    assert (hole[:, 0] != hole[:, 1]).mean() > 0.5  # draws differ
    again = drawn(models[stages], seen, samples=1)
    assert (np.abs(again[:, 0].astype(int) - out[:, 0]) > 1).mean() < 0.02  # up to rounding at a boundary


def test_weights_that_are_not_finite_are_told(models):
    graph, params = models[3]
    bad = dict(params) | {"base": jax.tree.map(lambda p: p * jnp.nan, params["base"])}
    with pytest.raises(DivergedError, match="^inpainting: a pixel is not finite"):
        drawn((graph, bad), masked(gray(2, 8, 16, 1), np.eye(8, 16, dtype=bool)))


class Difference:
    """Some other operator."""

    def __call__(self, x):
        return x[:, 1:] - x[:, :-1]

    def adjoint(self, y):
        return y

    inverse = adjoint


@pytest.mark.parametrize(
    ("stages", "operator", "changes", "says"),
    [
        (1, CellMean(3), {}, "operator: means of 3 x 3 pixels; expected a divisor of 8 and 16"),
        (3, Difference(), {}, "operator: Difference, with a copy reduced 2 times; expected Mask or CellMean"),
        (1, None, {"samples": 0}, "samples: 0; expected at least 1"),
        (1, None, {"steps": 0}, "steps: 0; expected at least 1"),
        (1, None, {"turns": -1}, "turns: -1; expected 0 or more"),
        (1, None, {"solver": "euler"}, "solver: 'euler'"),
        (1, None, {"guidance": 1.0}, "guidance: 1.0 without labels"),
        (1, None, {"guidance": float("nan")}, "guidance: nan; expected a finite number"),
    ],
)
def test_what_there_is_no_rule_for_is_refused(models, unchecked, stages, operator, changes, says):
    seen = masked(gray(1, 8, 16, 1), np.eye(8, 16, dtype=bool))
    with pytest.raises(InputError, match=f"^{says}") as no:
        drawn(models[stages], seen if operator is None else seen._replace(operator=operator), **changes)
    assert "\n" not in str(no.value)
