r"""A large image in stages: first a small copy of it, then the detail.

Let b = g(x) be the image reduced k times, each pixel the mean of k x k, rounded to a whole gray value. It is a function
of x, so

.. math:: -\log p(x) = -\log p(b) - \log p(x \mid b) \le L(b) + L(x \mid b),

and the bounds of the two models add up to a bound of the whole. The first model is an ordinary one of small images,
which sees each of them as a whole. The second is given b, so all that it has to know lies near a pixel, and it can
learn from crops. It may spread some of its probability on images whose reduction is another: that makes its bits more
than they need to be, never fewer. Where there are more stages than two, the copy has a copy of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num, PRNGKeyArray, UInt8

from medvdm.errors import InputError
from medvdm.models.likelihoods import check_levels, level_values
from medvdm.theory import bound
from medvdm.theory.bound import Diffusion


def reduced(x: UInt8[Array, "n h w c"], k: int) -> UInt8[Array, "n a b c"]:
    """Each k x k pixels as their mean, rounded half up to a whole gray value; h and w are multiples of k."""
    check_levels(x)
    sums = jnp.sum(rearrange(x, "n (a k) (b l) c -> n a b (k l) c", k=k, l=k), axis=3, dtype=jnp.int32)
    return ((2 * sums + k * k) // (2 * k * k)).astype(jnp.uint8)


def enlarged(b: Num[Array, "n a b c"], k: int) -> Num[Array, "n h w c"]:
    """Each pixel repeated k x k times."""
    return jnp.repeat(jnp.repeat(b, k, axis=1), k, axis=2)


class Given:
    """The second model with the reduced image of its batch: a :class:`medvdm.theory.bound.Diffusion`.

    Args:
        model: a :class:`medvdm.models.vdm.VDM` with a ``base``.
        shown: the reduced images in [-1, 1], enlarged to the size of the images.
    """

    def __init__(self, model: Any, shown: Float[Array, "n h w c"]):
        self.model, self.shown = model, shown
        self.timesteps = model.timesteps
        self.gamma, self.encode, self.decode, self.picture = model.gamma, model.encode, model.decode, model.picture
        self.embed, self.condition, self.observation_loss = model.embed, model.condition, model.observation_loss

    def eps_hat(self, z: Float[Array, "n h w c"], condition: Any) -> Float[Array, "n h w c"]:
        """The predicted noise in z, given the condition and the reduced image."""
        return self.model.score(z, condition, self.shown)


def given(model: Any, b: UInt8[Array, "n a b c"]) -> Given:
    """The second model with the reduced images b."""
    return Given(model, enlarged(level_values(b), model.config.reduce))


class Stage(NamedTuple):
    """One model of a chain, and what it is to be trained on."""

    model: Diffusion
    images: Num[Array, "n h w c"]
    pixels: int  #: times channels that its nats are counted over, to add up to bits per dimension of the whole


def stages(model: Any, x: Num[Array, "n h w c"], *, crop: int = 0, key: PRNGKeyArray | None = None) -> list[Stage]:
    """The models whose bounds add up to that of images x, with the images of each, the smallest copy first.

    Args:
        model: a :class:`medvdm.models.vdm.VDM`.
        x: whole images.
        crop: side of a square that stands for the whole in the last stage; 0 is the whole.
        key: of the place of the square.
    """
    k, whole = model.config.reduce, x[0].size
    if not k:
        x = x if not crop else cut(key, [x], crop)[0]
        return [Stage(model, x, x[0].size)]
    b = reduced(x, k)
    shown = enlarged(level_values(b), k)
    if crop:
        x, shown = cut(key, [x, shown], crop, k)
    smaller = [stage._replace(pixels=whole) for stage in stages(model.base, b)]
    return [*smaller, Stage(Given(model, shown), x, x[0].size)]


def stage_terms(
    parts: list[Stage], labels: Float[Array, "n k"] | None = None, *, key: PRNGKeyArray, **settings: Any
) -> list[bound.Bound]:
    """:func:`medvdm.theory.bound.terms` of each stage. The last has the key as it is, as a model without a base has."""
    return [
        bound.terms(part.model, part.images, labels, key=own, **settings)
        for part, own in zip(parts, _stage_keys(key, len(parts)), strict=True)
    ]


def _stage_keys(key: PRNGKeyArray, count: int) -> list[PRNGKeyArray]:
    """A key for each stage; the last has the key as it is."""
    return [*(jax.random.fold_in(key, number) for number in range(count - 1, 0, -1)), key]


def terms(
    model: Any,
    x: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    times: Float[Array, " n"] | None = None,
) -> bound.Bound:
    """:func:`medvdm.theory.bound.terms` of whole images, the sum over the stages; nats per image."""
    every = stage_terms(stages(model, x), labels, key=key, times=times)
    return bound.Bound(*(sum(term) for term in zip(*every, strict=True)))._replace(times=every[-1].times)


def map_of_terms(
    model: Any,
    x: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    times: Float[Array, " n"],
) -> Float[Array, "n h w c"]:
    """Where the bound of whole images spends its nats: :func:`terms` value by value, all terms and stages together.

    What a value of a reduced copy costs is spread evenly over the k x k values that it stands for, so that the map sums
    to the total of :func:`terms` with the same key.
    """
    parts = stages(model, x)
    whole = jnp.zeros(x.shape)
    for part, own in zip(parts, _stage_keys(key, len(parts)), strict=True):
        k = x.shape[1] // part.images.shape[1]
        found = bound.pixel_terms(part.model, part.images, labels, key=own, times=times).total
        whole = whole + enlarged(found, k) / k**2
    return whole


def cut(
    key: PRNGKeyArray, images: list[Num[Array, "n h w c"]], side: int, step: int = 1
) -> list[Num[Array, "n {side} {side} c"]]:
    """The same square out of each of several images, its corner at a multiple of ``step``, every place as likely.

    Raises:
        InputError: a side of less than 1, or larger than the images.
    """
    n, h, w, _ = images[0].shape
    if not 1 <= side <= min(h, w):
        raise InputError(f"crop: {side}; expected from 1 to {min(h, w)}, the images' side")
    most = jnp.array([[(h - side) // step + 1, (w - side) // step + 1]])
    first = step * jax.random.randint(key, (n, 2), 0, most)

    def square(one: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice(one, (at[0], at[1], 0), (side, side, one.shape[2]))

    return [jax.vmap(square)(x, first) for x in images]
