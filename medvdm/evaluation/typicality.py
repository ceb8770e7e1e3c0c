r"""What an image costs a model of gray values, pixel by pixel, and where that lies among the costs of held-out images.

A threshold on bits alone fails as a test for what is unusual: a black, a blurred or an over-exposed image takes fewer
bits than any X-ray, since it is easy to describe and not since it is an X-ray (Nalisnick et al. 2019; Serra et al.
2020). Three statistics of an image x are placed among those of held-out images here:

* ``bits``: :math:`L(x)`, the bound in bits per dimension;
* ``over_gaussian``: :math:`L(x) - G(x)`, above the bits of the Gaussian of the run's training images, a background
  that knows brightness and smoothness and nothing else (Ren et al. 2019);
* ``over_`` and the name of a codec: :math:`L(x) - C(x)`, above the size of a lossless file, which measures how complex
  the image is (Serra et al. 2020).

An image with the value s is *high* where few of n held-out images have as much, and *atypical* where few are as far
from the median, on either side (Nalisnick et al. 2019). What is counted are the :math:`s_i \ge s`, and the
:math:`|s_i - m| \ge |s - m|` with m the median of the held-out values and s together. Of images like the held-out
ones, no more than a share a is called unusual by the rule :math:`1 + \text{count} \le a\,(n + 1)`, whatever their
law: such an image is as likely as each of them to be the k-th of all (conformal prediction, Vovk et al. 2005), up to
images of one patient being alike. No share below :math:`1 / (n + 1)` can be told from 0, so counts are reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from medvdm.errors import InputError
from medvdm.evaluation.held_out import by_batches
from medvdm.models import cascade, vdm

# --- What an image costs ------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """The negative bound of n images in nats.

    Attributes:
        totals: (draws, n) float64, by draw, at times that are spread evenly; their mean is the bound.
        maps: (n, h, w) float32, the mean over the draws of what each pixel costs, channels together; an image's map
            sums to its bound. None where they are not asked for.
    """

    totals: np.ndarray
    maps: np.ndarray | None


def costs(
    graph: nnx.GraphDef,
    params: vdm.Params,
    levels: np.ndarray,
    *,
    draws: int,
    batch_size: int,
    seed: int,
    maps: bool = False,
) -> Costs:
    """The bound of images under a model of gray values, without labels, and where in the image it is spent.

    All images have the same times and the same noise, those of the seed. So the value of an image depends on nothing
    but the image and the seed, up to rounding: not on the images beside it. And two images differ by less noise than
    two draws would. What a few times miss of the integral over the noise is common to all: at 16 draws less than 1 % of
    the bits, by the curves of the recorded runs, at 4 up to 30 %.

    Args:
        graph, params: a model with an 8-bit likelihood, a cascade or not.
        levels: (n, h, w, c) uint8.
        draws: of time and noise.
        batch_size: images at a time.
        seed: of the times and the noise.
        maps: whether to keep the maps.
    """
    key_time, key_noise = jax.random.split(jax.random.key(seed))
    offset = jax.random.uniform(key_time, ())
    settings = [((d + offset) / draws, jax.random.fold_in(key_noise, d)) for d in range(draws)]

    def each(
        params: vdm.Params, x: np.ndarray, on_devices: Array, labels: Array | None, key: Array
    ) -> tuple[np.ndarray, ...]:
        totals, whole = [], 0.0
        for time, noise in settings:
            found = _map(params, on_devices, time, noise, graph=graph)
            totals.append(jnp.sum(found, axis=(1, 2)))
            whole = whole + found / draws
        result = (np.stack(jax.device_get(totals)).astype(np.float64),)
        return (*result, np.moveaxis(np.asarray(whole), 0, -1)) if maps else result

    found = by_batches(lambda rows: (levels[rows], None), len(levels), each, params, batch_size=batch_size, seed=seed)
    return Costs(found[0], np.moveaxis(found[1], -1, 0) if maps else None)


@partial(jax.jit, static_argnames=("graph",))
def _map(params: vdm.Params, x: Array, time: Array, key: Array, *, graph: nnx.GraphDef) -> Array:
    """(n, h, w): nats of each pixel by one draw, the same for all images."""
    model = vdm.merge(graph, params)
    one = lambda image: cascade.map_of_terms(model, image[None], key=key, times=time[None])[0]  # noqa: E731
    return jnp.sum(jax.vmap(one)(x), axis=-1)


# --- Where that lies among others ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A statistic of n images among that of m held-out images.

    Attributes:
        values: (n,) of the images.
        fewer: (n,) how many held-out images have less.
        as_much: (n,) how many have as much or more.
        as_far: (n,) how many are as far from the median of all held-out values and this one, or farther.
        held_out: (m,) of the held-out images.
    """

    values: np.ndarray
    fewer: np.ndarray
    as_much: np.ndarray
    as_far: np.ndarray
    held_out: np.ndarray

    @property
    def median(self) -> float:
        """Of the held-out images."""
        return float(np.median(self.held_out))

    def high(self, share: float) -> np.ndarray:
        """(n,) whether no more than a share of images from the same source have as much."""
        return _rare(self.as_much, share, len(self.held_out))

    def atypical(self, share: float) -> np.ndarray:
        """(n,) whether no more than a share of images from the same source are as far from the median."""
        return _rare(self.as_far, share, len(self.held_out))


def placed(values: np.ndarray, held_out: np.ndarray) -> Placed:
    """Place values among those of held-out images.

    Raises:
        InputError: no held-out value, or a value that is not finite.
    """
    values, held_out = np.asarray(values, np.float64), np.asarray(held_out, np.float64)
    if not held_out.size or not np.isfinite(held_out).all() or not np.isfinite(values).all():
        raise InputError(f"values: {len(values)} among {len(held_out)} held-out ones; expected finite ones, at least 1")
    fewer = np.searchsorted(np.sort(held_out), values, side="left")
    medians = [np.median([*held_out, value]) for value in values]
    as_far = [np.sum(np.abs(held_out - m) >= np.abs(v - m)) for v, m in zip(values, medians, strict=True)]
    return Placed(
        values=values,
        fewer=fewer,
        as_much=len(held_out) - fewer,
        as_far=np.array(as_far, np.int64),
        held_out=held_out,
    )


def check_share(share: float, n: int) -> None:
    """Raise InputError unless n held-out images can bear a share: no image at all could be flagged otherwise."""
    if not 0 < share < 1:
        raise InputError(f"share: {share:g}; expected a number between 0 and 1")
    if not _rare(np.zeros(1), share, n)[0]:
        raise InputError(
            f"share: {share:g} with {n} held-out images; expected at least {1 / (n + 1):.3g}, 1 in {n + 1}"
        )


def _rare(count: np.ndarray, share: float, n: int) -> np.ndarray:
    return 1 + count <= share * (n + 1) * (1 + 1e-9)  # 0.05 of 20 is 1, also where that is not exact
