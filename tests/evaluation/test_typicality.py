"""What images cost one by one, and their place among others: counts by hand, exact shares, and a law that is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import medvdm
from medvdm.errors import InputError
from medvdm.evaluation import typicality
from medvdm.models import cascade
from medvdm.theory.schedules import FixedLinear

BIT = np.log(2.0)


# Places


def test_counts_by_hand_with_ties() -> None:
    held_out = np.array([4.0, 1.0, 2.0, 2.0, 9.0])
    found = typicality.placed(np.array([0.0, 2.0, 3.0, 9.0, 20.0]), held_out)
    assert found.fewer.tolist() == [0, 1, 3, 4, 5]
    assert found.as_much.tolist() == [5, 4, 2, 1, 0]
    # With the image itself the medians are 2, 2, 2.5, 3 and 3.
    assert found.as_far.tolist() == [2, 5, 5, 1, 0]
    assert found.median == 2.0
    assert found.high(0.2).tolist() == [False, False, False, False, True]
    assert found.atypical(0.34).tolist() == [False, False, False, True, True]


def test_no_more_than_the_share_is_called_unusual_of_images_like_the_held_out_ones() -> None:
    """Each of n + 1 values in turn as the image, the others held out: exactly the share, for a skew law too."""
    values = np.random.default_rng(0).lognormal(size=100)
    for share in (0.01, 0.05, 0.2):
        found = [typicality.placed(values[[i]], np.delete(values, i)) for i in range(100)]
        assert sum(one.high(share)[0] for one in found) == round(100 * share)
        assert sum(one.atypical(share)[0] for one in found) == round(100 * share)


def test_a_share_that_so_few_images_cannot_bear_is_refused() -> None:
    typicality.check_share(0.05, 19)
    with pytest.raises(InputError, match=r"^share: 0\.05 with 18 held-out images; expected at least 0\.0526, 1 in 19$"):
        typicality.check_share(0.05, 18)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="^share: .*; expected a number between 0 and 1"):
            typicality.check_share(wrong, 100)
    for held_out in ([], [1.0, np.nan]):
        with pytest.raises(InputError, match="^values: 1 among .* held-out ones; expected finite"):
            typicality.placed(np.ones(1), np.array(held_out))


# A law that is known


def test_black_has_fewer_bits_than_any_other_image_and_only_the_two_sided_test_sees_it() -> None:
    """Pixels that are black with probability 1/2 and else of any gray value: black costs 1 bit a pixel, images 5."""
    law = np.full(256, np.log(0.5 / 255))
    law[0] = np.log(0.5)
    model = oracle.Levels(law, FixedLinear(-13.0, 5.0))
    rng = np.random.default_rng(0)
    held_out, like = model.sample(rng, (99, 6, 6, 1)), model.sample(rng, (50, 6, 6, 1))
    odd = {"black": np.zeros((1, 6, 6, 1), np.uint8), "noise": rng.integers(1, 256, (1, 6, 6, 1), dtype=np.uint8)}
    x = jnp.asarray(np.concatenate([held_out, like, *odd.values()]))
    draws = 32

    @jax.jit
    def bits(x: jax.Array, time: jax.Array, key: jax.Array) -> jax.Array:
        one = lambda image: cascade.map_of_terms(Plain(model), image[None], key=key, times=time[None])[0]  # noqa: E731
        return jnp.sum(jax.vmap(one)(x), axis=(1, 2, 3)) / x[0].size / BIT

    keys = jax.random.split(jax.random.key(1), draws)
    found = np.mean([bits(x, jnp.float32((d + 0.5) / draws), key) for d, key in enumerate(keys)], axis=0)
    assert found[-2] == pytest.approx(1.0, abs=0.4) and found[:99].mean() == pytest.approx(5.0, abs=0.4)
    assert found[-2] < found[:149].min(), "a black image has fewer bits than any other"
    place = typicality.placed(found[99:], found[:99])
    assert place.high(0.05).tolist()[-2:] == [False, True]
    assert place.atypical(0.05).tolist()[-2:] == [True, True]
    # Of 50 images like the others 5 % are to be called unusual; a binomial's 99.9 % quantile is 8.
    assert place.high(0.05)[:50].sum() <= 8 and place.atypical(0.05)[:50].sum() <= 8


class Plain:
    """A model of whole images, as a cascade asks for it: without a copy."""

    class config:  # noqa: N801
        reduce = 0

    def __init__(self, model: oracle.Levels):
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


# What images cost a run


@pytest.fixture(scope="module")
def pixels(trained_pixels):
    run = medvdm.load(trained_pixels)
    levels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    levels[1], levels[3] = 0, np.arange(16, dtype=np.uint8)[:, None] * 10
    return run, levels


def test_an_image_costs_the_same_whatever_is_beside_it(pixels) -> None:
    """In another order, in other batches, alone; and each of two equal images the same."""
    run, levels = pixels
    ask = {"draws": 3, "seed": 4}
    whole = typicality.costs(run.graph, run.params, levels, batch_size=5, **ask).totals
    assert whole.shape == (3, 5)
    order = np.array([4, 2, 2, 0, 1, 3])
    other = typicality.costs(run.graph, run.params, levels[order], batch_size=2, **ask).totals
    np.testing.assert_allclose(other, whole[:, order], rtol=1e-5)
    assert np.argsort(other.mean(axis=0)[[3, 4, 1, 5, 0]]).tolist() == np.argsort(whole.mean(axis=0)).tolist()
    again = typicality.costs(run.graph, run.params, levels[:1], batch_size=5, draws=3, seed=5).totals
    assert abs(again / whole[:, :1] - 1).max() > 1e-4, "another seed, other noise"


def test_maps_sum_to_the_bound_of_each_image_and_the_bound_is_that_of_the_library(pixels) -> None:
    run, levels = pixels
    found = typicality.costs(run.graph, run.params, levels, draws=16, batch_size=5, seed=0, maps=True)
    assert found.maps.shape == (5, 16, 16) and found.maps.min() >= 0
    np.testing.assert_allclose(found.maps.sum(axis=(1, 2), dtype=np.float64), found.totals.mean(axis=0), rtol=1e-5)
    other = medvdm.bound(run, levels, draws=16)
    error = np.hypot(other.stderr, medvdm.evaluation.held_out.stderr_of_draws(found.totals))
    assert (np.abs(found.totals.mean(axis=0) - other.nats) < 4.5 * error).all()
