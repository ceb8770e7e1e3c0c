r"""Noisy images made clear: a diffusion on pixels is a denoiser for every noise level between its ends.

An image y with gray values on [0, 1] and normal noise of deviation S in each pixel is, on the model's scale of [-1, 1],

.. math:: 2y - 1 = x + e^{\gamma / 2} \epsilon = z_t / \alpha_t, \qquad e^{\gamma / 2} = 2 S,

so z_t is there, and nothing has to be simulated. One evaluation of the network gives the posterior mean
:math:`\hat x = E[x \mid y]`, the answer with the least squared error. It is smooth where the noise has hidden what was
there. The chain from t down to 0 gives draws from the posterior, which are as sharp as images are, and differ where y
does not tell.

Of a cascade, the detail is given the reduced copy b, which is not known here. The mean of k x k pixels of y is a copy
with noise of S / k, so the model of the copies denoises it first, by the same rule, and the answer is rounded as a copy
is. The mean is then a *plug-in*, :math:`E[x \mid y, b = \hat b]`, which was nearer to the truth on X-rays than the mean
over four draws of b. A draw of x is given a draw of b of its own.

Networks of any size see an image whole, or in overlapping tiles (:class:`Tiled`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Bool, Float, Int, Key

from medvdm.models import vdm
from medvdm.models.cascade import enlarged
from medvdm.models.generate import MAX_STEPS
from medvdm.models.likelihoods import level_values
from medvdm.models.unet import least_side
from medvdm.theory import gaussian, schedules
from medvdm.theory.bound import Diffusion
from medvdm.theory.sampling import chain

TILE = 512  #: side in pixels of a tile
WHOLE = 1 << 20  #: pixels of the largest image that is seen whole
RAMP = 32  #: pixels over which the weight of a tile falls, at least


def gamma_of(noise: Float[Array, "..."] | np.ndarray | float) -> Float[Array, "..."]:
    r""":math:`\gamma = 2 \log 2S`, for noise of deviation S in gray values on [0, 1]."""
    return 2.0 * jnp.log(2.0 * jnp.asarray(noise, jnp.float32))


def noise_range(model: Diffusion) -> tuple[float, float]:
    r"""The least and the greatest deviation that a model knows: :math:`\tfrac12 e^{\gamma / 2}` at its ends."""
    least, most = (0.5 * math.exp(0.5 * float(model.gamma(jnp.full((), t)))) for t in (0.0, 1.0))
    return least, most


def posterior_mean(model: Diffusion, y: Float[Array, "n h w c"], gamma: Float[Array, " m"]) -> Float[Array, "n h w c"]:
    r""":math:`E[x \mid y]` of images on [0, 1], by one evaluation of the network, without a label.

    Args:
        model: predicts the noise; of a cascade, a stage with what it is given.
        y: noisy images; noise may have led out of [0, 1].
        gamma: of the noise, one per image or one for all, see :func:`gamma_of`.
    """
    z = _latent(y, gamma)
    eps_hat = model.eps_hat(z, model.condition(gamma, model.embed(None, n=gamma.shape[0])))
    return 0.5 * (gaussian.x_from_eps(eps_hat, z, gaussian.align(gamma, z)) + 1.0)


def posterior_draws(
    model: Diffusion,
    y: Float[Array, "n h w c"],
    gamma: Float[Array, ""],
    *,
    keys: Key[Array, " n"],
    steps: int | Array,
) -> Float[Array, "n h w c"]:
    r"""Draws of :math:`z_0 / \alpha_0` given y, on the model's scale, by an ancestral chain from y's own time to 0.

    Args:
        model, y: as of :func:`posterior_mean`.
        gamma: of the noise, one for all images.
        keys: one per image.
        steps: of the chain, evenly spaced in time.
    """
    way = jnp.stack([jnp.zeros(()), schedules.time_of(model.gamma, gamma)])
    z, null = _latent(y, gamma[None]), model.embed(None, n=1)
    z_0 = chain(model, z, null, keys=keys, steps=steps, first=steps, grid=way)[-1]
    return z_0 / gaussian.alpha(model.gamma(jnp.zeros(())))


def _latent(y: Float[Array, "n h w c"], gamma: Float[Array, " m"]) -> Float[Array, "n h w c"]:
    return gaussian.align(gaussian.alpha(gamma), y) * (2.0 * y - 1.0)


# --- Tiles --------------------------------------------------------------------------------------------------------


class Tiled:
    """A model of pixels whose network sees large images in overlapping tiles: a ``Diffusion``.

    Every evaluation of the network is put together from those of the tiles. So all tiles share one z, also inside a
    chain, and what is drawn in one is what its neighbours see. The outermost pixels of a tile, which the network could
    not see the surroundings of (:func:`reach`), have no weight, so a tile's answer is that of the whole image; with
    attention, which sees everything, it is close to it, and the weights of the tiles fall smoothly.

    Args:
        model: a :class:`medvdm.models.vdm.VDM` on pixels.
        shown: what a cascade's detail is given, as in :class:`medvdm.models.cascade.Given`.
        tile: side in pixels of a tile.
        whole: pixels of the largest image that is not tiled.
        rounding: whether the answer is to know that gray values are whole numbers, see :func:`mean`.
    """

    def __init__(
        self,
        model: vdm.VDM,
        shown: Float[Array, "n h w c"] | None = None,
        *,
        tile: int = TILE,
        whole: int = WHOLE,
        rounding: bool = True,
    ):
        self.model, self.shown, self.tile, self.whole, self.rounding = model, shown, tile, whole, rounding
        self.timesteps, self.gamma, self.embed = model.timesteps, model.gamma, model.embed
        self.encode, self.decode, self.picture = model.encode, model.decode, model.picture
        self.condition, self.observation_loss = model.condition, model.observation_loss

    def eps_hat(self, z: Float[Array, "n h w c"], condition: Any) -> Float[Array, "n h w c"]:
        """The predicted noise in z."""
        score = self.model.score

        def seen(part: Array, shown: Array | None) -> Array:
            if self.rounding:
                return score(part, condition, shown)
            gamma = gaussian.align(condition[1], part)
            return gaussian.eps_from_x(score.centre(part, condition, shown), part, gamma)

        if z.shape[1] * z.shape[2] <= self.whole:
            return seen(z, self.shown)
        unit, margin = cell(self.model.config), reach(self.model.config)
        return tiled(seen, z, self.shown, side=self.tile, margin=margin, unit=unit)


def cell(config: vdm.VDMConfig) -> int:
    """The side of the squares that a stage's network works in; tiles begin and end at multiples of it."""
    return math.lcm(least_side(config.scales, config.patch), max(config.reduce, 1))


def reach(config: vdm.VDMConfig) -> int:
    """How many pixels away the network of a stage can see, without its attention; a little more, never less."""
    convolutions = [2 * config.blocks * (1 if s == config.scales - 1 else 2) for s in range(config.scales)]
    convolutions[0] += 2  # the first and the last
    cells = sum(n * least_side(s + 1, config.patch) for s, n in enumerate(convolutions))
    return cells + least_side(config.scales + 1, config.patch) + 2 + config.reduce


def tiled(
    seen: Callable[[Array, Array | None], Array],
    z: Float[Array, "n h w c"],
    shown: Float[Array, "n h w c"] | None,
    *,
    side: int,
    margin: int,
    unit: int,
) -> Float[Array, "n h w c"]:
    """What a function makes of an image, from what it makes of overlapping tiles, one after the other.

    Args:
        seen: of a part of z and the same part of ``shown``.
        z, shown: sides are multiples of ``unit``.
        side: of a tile; made larger where the margins need it, and smaller where an image is.
        margin: pixels inside the border of a tile that have no weight, unless they lie at the border of the image.
        unit: tiles begin and end at multiples of it.
    """
    starts, lengths, weights = [], [], []
    for whole in z.shape[1:3]:
        start, length, weight = _cuts(whole, max(side, 2 * margin + 2 * RAMP + unit), margin, unit)
        starts.append(start)
        lengths.append(length)
        weights.append(weight)
    corners = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 2)
    numbers = np.stack(np.meshgrid(*map(lambda s: np.arange(len(s)), starts), indexing="ij"), axis=-1).reshape(-1, 2)
    size = (z.shape[0], *lengths, z.shape[3])

    def add(total: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        (row, column), (i, j) = at
        parts = [None if a is None else jax.lax.dynamic_slice(a, (0, row, column, 0), size) for a in (z, shown)]
        weight = jnp.asarray(weights[0])[i][:, None] * jnp.asarray(weights[1])[j][None, :]
        before = jax.lax.dynamic_slice(total, (0, row, column, 0), size)
        after = before + weight[None, :, :, None] * seen(*parts)
        return jax.lax.dynamic_update_slice(total, after, (0, row, column, 0)), None

    return jax.lax.scan(add, jnp.zeros_like(z), (jnp.asarray(corners), jnp.asarray(numbers)))[0]


def _cuts(whole: int, side: int, margin: int, unit: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Where tiles begin along one axis, their length, and the weight of each pixel of each (tiles, length); sum 1."""
    length = min(-(-side // unit) * unit, whole)
    stride = max((length - 2 * margin - RAMP) // unit * unit, unit)
    starts = np.unique(np.append(np.arange(0, whole - length, stride), whole - length))
    inside = np.arange(length)
    total = np.zeros(whole)
    weights = np.zeros((len(starts), length))
    for weight, start in zip(weights, starts, strict=True):
        rise = np.full(length, np.inf) if start == 0 else inside + 1.0 - margin
        fall = np.full(length, np.inf) if start + length == whole else length - inside - 1.0 * margin
        weight[:] = np.sin(0.5 * np.pi * np.clip(np.minimum(rise, fall) / RAMP, 0.0, 1.0)) ** 2
        total[start : start + length] += weight
    for weight, start in zip(weights, starts, strict=True):
        weight /= total[start : start + length]
    return starts.astype(np.int32), length, weights.astype(np.float32)


# --- Whole models -------------------------------------------------------------------------------------------------


def unit_of(config: vdm.VDMConfig) -> int:
    """Sides that are multiples of this suit the networks of all stages."""
    return cell(config) if not config.reduce else math.lcm(cell(config), config.reduce * unit_of(config.base()))


@partial(jax.jit, static_argnames=("graph", "rounding", "tile", "whole"))
def mean(
    params: vdm.Params,
    y: Float[Array, "n h w c"],
    noise: Float[Array, " n"],
    *,
    graph: nnx.GraphDef,
    rounding: bool = True,
    tile: int = TILE,
    whole: int = WHOLE,
) -> Float[Array, "n h w c"]:
    """The posterior mean of noisy images, in [0, 1].

    Args:
        graph, params: the model, from :func:`medvdm.models.vdm.split`.
        y: noisy images with gray values on [0, 1], of any size; noise may have led out of [0, 1].
        noise: its deviation in each image, within :func:`noise_range`.
        rounding: whether the truth is known to have one of 256 gray values, as images of 8 bits have.
        tile, whole: see :class:`Tiled`.
    """
    model = vdm.merge(graph, params)
    answer = _mean(model, _filled(y, unit_of(model.config)), noise, rounding=rounding, tile=tile, whole=whole)
    return jnp.clip(answer[:, : y.shape[1], : y.shape[2]], 0.0, 1.0)


@partial(jax.jit, static_argnames=("graph", "tile", "whole"))
def draws(
    params: vdm.Params,
    y: Float[Array, "h w c"],
    noise: Float[Array, ""],
    seed: Array | int,
    samples: Int[Array, " n"],
    steps: Array | int,
    *,
    graph: nnx.GraphDef,
    tile: int = TILE,
    whole: int = WHOLE,
) -> Float[Array, "n h w c"]:
    """Draws from the posterior of a noisy image, in [0, 1]: each pixel one of 256 gray values.

    Args:
        graph, params, tile, whole: as of :func:`mean`.
        y, noise: one image, and the deviation of its noise.
        seed: of the draws.
        samples: numbers of the draws; draw i of a seed is the same in any company.
        steps: of the chain.
    """
    model = vdm.merge(graph, params)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(samples)
    filled = jnp.repeat(_filled(y[None], unit_of(model.config)), samples.shape[0], axis=0)
    return _draws(model, filled, noise, keys, steps, tile=tile, whole=whole)[:, : y.shape[0], : y.shape[1]]


def _filled(y: Float[Array, "n h w c"], unit: int) -> Float[Array, "n a b c"]:
    """Sides filled up to multiples of ``unit``, by reflection."""
    height, width = y.shape[1:3]
    return jnp.pad(y, ((0, 0), (0, -height % unit), (0, -width % unit), (0, 0)), mode="symmetric")


def _mean(
    model: vdm.VDM, y: Float[Array, "n h w c"], noise: Float[Array, " n"], *, rounding: bool = True, **tiles: int
) -> Float[Array, "n h w c"]:
    gamma, shown = _gamma_within(model, noise), None
    if k := model.config.reduce:
        copy = _reduced(y, k)
        shown = _shown(jnp.where(_seen_by(model.base, noise / k), _mean(model.base, copy, noise / k, **tiles), copy), k)
    return posterior_mean(Tiled(model, shown, rounding=rounding, **tiles), y, gamma)


def _draws(
    model: vdm.VDM,
    y: Float[Array, "n h w c"],
    noise: Float[Array, ""],
    keys: Key[Array, " n"],
    steps: Array | int,
    **tiles: int,
) -> Float[Array, "n h w c"]:
    shown = None
    if k := model.config.reduce:
        own = jax.vmap(lambda key: jax.random.fold_in(key, MAX_STEPS + 1))(keys)  # no step has this number
        copy = _reduced(y, k)
        drawn = _draws(model.base, copy, noise / k, own, steps, **tiles)
        shown = _shown(jnp.where(_seen_by(model.base, (noise / k)[None]), drawn, copy), k)
    stage = Tiled(model, shown, **tiles)
    return model.picture(posterior_draws(stage, y, _gamma_within(model, noise), keys=keys, steps=steps))


def _reduced(y: Float[Array, "n h w c"], k: int) -> Float[Array, "n a b c"]:
    return reduce(y, "n (a k) (b l) c -> n a b c", "mean", k=k, l=k)


def _shown(b: Float[Array, "n a b c"], k: int) -> Float[Array, "n h w c"]:
    """A copy in [0, 1] as a cascade's detail is given it: whole gray values, on [-1, 1], enlarged."""
    return enlarged(level_values(jnp.round(255.0 * jnp.clip(b, 0.0, 1.0)).astype(jnp.uint8)), k)


def _gamma_within(model: vdm.VDM, noise: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Of copies, whose noise may be below what their model knows; what it answers there is not used."""
    return jnp.maximum(gamma_of(noise), model.gamma(jnp.zeros(())))


def _seen_by(model: vdm.VDM, noise: Float[Array, " n"]) -> Bool[Array, "n 1 1 1"]:
    return (gamma_of(noise) >= model.gamma(jnp.zeros((1,))))[:, None, None, None]
