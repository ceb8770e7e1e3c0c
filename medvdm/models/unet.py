r"""A denoiser of pixels: a small U-Net, and a last step that knows what noise does to gray values.

The network sees the image in cells of p x p pixels (space to depth), so that its convolutions are few, wide and at low
resolution, which is where a processor is fast. With :math:`v_t = \alpha_t^2 \lambda + \sigma_t^2`, it predicts

.. math::
    \hat\epsilon_c = \frac{\sigma_t z_t + \sqrt{\alpha_t^2 \lambda\, v_t}\; net_\epsilon(z_t, \gamma_t)}{v_t}, \qquad
    c = \frac{z_t - \sigma_t \hat\epsilon_c}{\alpha_t} .

Where net is zero, as before the first step, this is the best denoiser that knows of an image nothing but the mean 0 and
the variance :math:`\lambda` of its pixels. The second answer of the network, :math:`v = e^{net_v}`, is the variance
of a pixel given everything else that z tells. Noise leaves of it the posterior variance

.. math:: d^2 = \frac{\sigma_t^2 v}{\alpha_t^2 v + \sigma_t^2} .

A gray value is one of 256, though, which no convolution knows. So the answer is the mean of the discrete law with
centre c and deviation d, :math:`\hat x = E[x_k]` (:func:`medvdm.models.likelihoods.level_mean`), a soft rounding, and
:math:`\hat\epsilon = (z_t - \alpha_t \hat x) / \sigma_t`. Where d exceeds the spacing of the gray values, nothing
changes; where it is below, the rounding is worth more than all else that the network could learn there.
"""

from __future__ import annotations

import math
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from medvdm.errors import InputError
from medvdm.models.blocks import FiLM, modulate, time_embedding
from medvdm.models.likelihoods import SPACING, check_levels, level_mean, level_values
from medvdm.theory import gaussian

PIXEL_VARIANCE = 0.25  #: lambda, about that of gray values in [-1, 1]
DETAILS = ("contrast", "fourier", "none")  #: what the network may be given beside z
CONTRAST = 0.03  #: of the finest differences that are amplified, in half the range of gray values: four levels


class LevelEncoder(nnx.Module):
    """Gray values 0 to 255 to x in [-1, 1]; a diffusion on pixels has no other encoding."""

    def __init__(self, channels: int):
        self.channels = channels

    def __call__(self, x: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Images of any size. Raises InputTypeError where x is not uint8, InputError for other channels."""
        check_levels(x)
        if x.ndim != 4 or x.shape[3] != self.channels:
            raise InputError(f"images: shape {x.shape}; expected (n, h, w, {self.channels})")
        return level_values(x)


class LevelDecoder(nnx.Module):
    r""":math:`z_0 / \alpha_0` as it is: the centre of the categorical law of each pixel."""

    def __call__(self, z: Float[Array, "n h w c"], gamma_0: Float[Array, ""]) -> Float[Array, "n h w c"]:
        return z


def least_side(scales: int, patch: int) -> int:
    r"""Pixels on a side of the smallest image, one place of the coarsest scale: :math:`p\, 2^{scales - 1}`."""
    return patch * 2 ** (scales - 1)


def normed(h: Float[Array, "n a b width"]) -> Float[Array, "n a b width"]:
    """Each place's features by their root mean square: no place knows of another, so a crop gives what a whole does."""
    return h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)


def blur(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """The mean of 3 x 3 pixels, the border repeated."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (x[:, :-2] + x[:, 1:-1] + x[:, 2:]) / 3.0
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 3.0


def contrast_features(z: Float[Array, "n h w c"], gamma: Float[Array, " m"]) -> Float[Array, "n h w c2"]:
    r"""Differences from the mean of the surroundings, at two scales, in units of what noise and fine detail make them.

    .. math:: \frac{z - Bz}{k}, \quad \frac{Bz - B^2 z}{k}, \qquad k = \sqrt{\sigma_t^2 + 0.03^2}

    with the 3 x 3 mean B. A neighbour's difference of two gray levels is 1 % of the range: without this, the network
    has to learn first that so small a thing matters.
    """
    once = blur(z)
    scale = jax.lax.rsqrt(gaussian.sigma2(gamma) + CONTRAST**2)[:, None, None, None]
    return jnp.concatenate([(z - once) * scale, (once - blur(once)) * scale], axis=-1)


def fourier_features(z: Float[Array, "n h w c"]) -> Float[Array, "n h w c4"]:
    r""":math:`\sin 2^n \pi z` and :math:`\cos 2^n \pi z` for n = 7, 8 (VDM, appendix C): periods of 2 levels and 1."""
    angles = [2.0**n * math.pi * z for n in (7, 8)]
    return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=-1)


class Block(nnx.Module):
    """``skip(h) + conv(swish(film(norm(conv(swish(norm(h)))))))`` with 3 x 3 kernels; it starts as ``skip(h)``."""

    def __init__(self, before: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.first = nnx.Conv(before, width, (3, 3), dtype=dtype, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.skip = None if before == width else nnx.Linear(before, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "n a b before"], film: Float[Array, "m two_width"]) -> Float[Array, "n a b w"]:
        inner = modulate(normed(self.first(nnx.swish(normed(h)))), film[:, None, None, :])
        return (h if self.skip is None else self.skip(h)) + self.second(nnx.swish(inner))


class Attention(nnx.Module):
    """``h + out(attention(norm(h)))`` over all places, four heads, queries and keys normed; it starts as h."""

    HEADS = 4

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.enter = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.leave = nnx.Linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "n a b width"]) -> Float[Array, "n a b width"]:
        parts = rearrange(self.enter(normed(h)), "n a b (of heads d) -> of n (a b) heads d", of=3, heads=self.HEADS)
        query, key, value = parts
        mixed = jax.nn.dot_product_attention(normed(query), normed(key), value, scale=0.5 * math.sqrt(query.shape[-1]))
        return h + self.leave(rearrange(mixed, "n (a b) heads d -> n a b (heads d)", a=h.shape[1]))


class UNet(nnx.Module):
    """Predicts the noise in an image; see the formulas above.

    Args:
        channels: of the images.
        width: features of a cell at the finest scale; each coarser scale has twice as many.
        scales: of the U-Net; each halves the sides of the one before.
        blocks: residual blocks at each scale, on the way down, and again on the way up.
        patch: p, the side in pixels of a cell.
        details: what the network is given beside z: see :func:`contrast_features` and :func:`fourier_features`.
        attention: whether each block of the coarsest scale is followed by attention over all places.
        rounding: whether the answer knows that gray values are whole numbers.
        reduce: k where the network is also given the image reduced k times, see :mod:`medvdm.models.cascade`; or 0.
        embedding_dim: width of the time and label embeddings.
        gamma_range: the gammas that the network's time maps to 0 and 1, constants as in the ScoreNet.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        scales: int,
        blocks: int,
        patch: int,
        details: str,
        attention: bool,
        rounding: bool,
        reduce: int = 0,
        embedding_dim: int,
        gamma_range: tuple[float, float],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.patch, self.scales, self.details, self.rounding, self.reduce = patch, scales, details, rounding, reduce
        self.embedding_dim, self.gamma_range, self.dtype = embedding_dim, gamma_range, dtype
        shared = {"dtype": dtype, "rngs": rngs}
        widths = [width * 2**i for i in range(scales)]
        given = channels * ({"none": 1, "contrast": 3, "fourier": 5}[details] + (1 if reduce else 0))
        answers = channels * (2 if rounding else 1)

        self.mix1 = nnx.Linear(2 * embedding_dim, 4 * embedding_dim, **shared)
        self.mix2 = nnx.Linear(4 * embedding_dim, 2 * embedding_dim, **shared)
        self.enter = nnx.Conv(given * patch**2, width, (3, 3), **shared)
        self.down = nnx.List([nnx.List([Block(w, w, **shared) for _ in range(blocks)]) for w in widths])
        self.shrink = nnx.List([nnx.Conv(w, 2 * w, (2, 2), (2, 2), **shared) for w in widths[:-1]])
        self.attention = nnx.List([Attention(widths[-1], **shared) for _ in range(blocks if attention else 0)])
        self.grow = nnx.List([nnx.Linear(2 * w, 4 * w, **shared) for w in widths[:-1]])
        self.up = nnx.List(
            [nnx.List([Block(2 * w if i == 0 else w, w, **shared) for i in range(blocks)]) for w in widths[:-1]]
        )
        self.films = nnx.List(
            [FiLM(2 * embedding_dim, w, **shared) for w in widths + widths[-2::-1] for _ in range(blocks)]
        )
        zeros = nnx.initializers.zeros_init()
        self.leave = nnx.Conv(width, answers * patch**2, (3, 3), kernel_init=zeros, **shared)

    def condition(self, gamma: Float[Array, " m"], label: Float[Array, "m c"]) -> Any:
        """The modulation of every block, in the order of the blocks, and gamma itself."""
        low, high = self.gamma_range
        time = time_embedding((gamma - low) / (high - low), self.embedding_dim)
        joined = jnp.concatenate([time, label], axis=-1).astype(self.dtype)
        mixed = nnx.swish(self.mix2(nnx.swish(self.mix1(joined))))
        return tuple(film(mixed) for film in self.films), gamma

    def answers(
        self, z: Float[Array, "n h w c"], condition: Any, shown: Float[Array, "n h w c"] | None = None
    ) -> Float[Array, "n h w answers"]:
        """The network itself: what it says of each pixel, channel by channel, before it is read as noise."""
        films, gamma = condition
        height, width = z.shape[1:3]
        given = [z] if shown is None else [z, shown]
        if self.details == "contrast":
            given.append(contrast_features(z, gamma))
        if self.details == "fourier":
            given.append(fourier_features(z))
        least = least_side(self.scales, self.patch)  # sides are filled up to multiples of this
        filled = ((0, 0), (0, -height % least), (0, -width % least), (0, 0))
        x = jnp.pad(jnp.concatenate(given, axis=-1), filled, mode="edge").astype(self.dtype)

        film, kept = iter(films), []
        h = self.enter(rearrange(x, "n (a p) (b q) c -> n a b (p q c)", p=self.patch, q=self.patch))
        for scale, blocks in enumerate(self.down):
            for i, block in enumerate(blocks):
                h = block(h, next(film))
                if scale == self.scales - 1 and self.attention:
                    h = self.attention[i](h)
            if scale < self.scales - 1:
                kept.append(h)
                h = self.shrink[scale](h)
        for grow, blocks in zip(reversed(self.grow), reversed(self.up), strict=True):
            finer = rearrange(grow(h), "n a b (p q c) -> n (a p) (b q) c", p=2, q=2)
            h = jnp.concatenate([kept.pop(), finer], axis=-1)
            for block in blocks:
                h = block(h, next(film))
        cells = self.leave(nnx.swish(normed(h))).astype(jnp.float32)
        said = rearrange(cells, "n a b (p q c) -> n (a p) (b q) c", p=self.patch, q=self.patch)
        return said[:, :height, :width]

    def __call__(
        self, z: Float[Array, "n h w c"], condition: Any, shown: Float[Array, "n h w c"] | None = None
    ) -> Float[Array, "n h w c"]:
        r"""Return :math:`\hat\epsilon`. ``condition`` comes from :meth:`condition`; its m is n, or 1 for all.

        ``shown`` is the reduced image, enlarged again by repeating its pixels, where the network is given one.
        """
        return self.noise(self.answers(z, condition, shown), z, condition[1], shown)

    def noise(
        self,
        said: Float[Array, "n h w answers"],
        z: Float[Array, "n h w c"],
        gamma: Float[Array, " m"],
        shown: Float[Array, "n h w c"] | None = None,
    ) -> Float[Array, "n h w c"]:
        r"""What the network says, read as :math:`\hat\epsilon`: no weights from here on."""
        alpha, sigma = (jnp.sqrt(gaussian.sigma2(sign * gamma))[:, None, None, None] for sign in (-1.0, 1.0))
        eps_hat, centre, left = self._read(said, z, gamma)
        if left is None:
            return eps_hat
        known, left = (centre, left) if shown is None else with_mean(centre, left, shown, self.reduce)
        return eps_hat + alpha * (centre - level_mean(known, jnp.sqrt(left))) / sigma

    def centre(
        self, z: Float[Array, "n h w c"], condition: Any, shown: Float[Array, "n h w c"] | None = None
    ) -> Float[Array, "n h w c"]:
        r"""The clean image before it is rounded: :math:`\hat x` of gray values that need not be one of 256.

        It is the centre c of the law over gray values, which knows of the reduced image, and where the network knows of
        no rounding it is :math:`\hat x` itself. Arguments as of a call.
        """
        _, centre, left = self._read(self.answers(z, condition, shown), z, condition[1])
        return centre if shown is None or left is None else with_mean(centre, left, shown, self.reduce)[0]

    def _read(
        self, said: Float[Array, "n h w answers"], z: Float[Array, "n h w c"], gamma: Float[Array, " m"]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"], Float[Array, "n h w c"] | None]:
        r"""The noise and the clean image before any rounding, and :math:`d^2`, the variance of the latter's pixels."""
        gamma = gamma[:, None, None, None]
        alpha2, sigma2 = gaussian.sigma2(-gamma), gaussian.sigma2(gamma)  # alpha^2 = sigmoid(-gamma)
        alpha, sigma = jnp.sqrt(alpha2), jnp.sqrt(sigma2)
        total = alpha2 * PIXEL_VARIANCE + sigma2
        eps_hat = (sigma * z + jnp.sqrt(alpha2 * PIXEL_VARIANCE * total) * said[..., : z.shape[-1]]) / total
        centre = (z - sigma * eps_hat) / alpha
        if not self.rounding:
            return eps_hat, centre, None
        variance = jnp.exp(jnp.clip(2.0 * said[..., z.shape[-1] :] - 5.0, -14.0, 3.0))
        return eps_hat, centre, sigma2 * variance / (alpha2 * variance + sigma2)


def with_mean(
    centre: Float[Array, "n h w c"], variance: Float[Array, "n h w c"], shown: Float[Array, "n h w c"], side: int
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
    r"""What Bayes' rule makes of independent normal pixels when the mean m of each cell of k x k is known as well.

    .. math::
        c_i \mapsto c_i + g_i (m - \bar c), \qquad d_i^2 \mapsto d_i^2 (1 - g_i / k^2), \qquad
        g_i = \frac{d_i^2 / k^2}{\bar{d^2} / k^2 + r}

    with means over the cell. m is a whole gray value, the mean rounded: r is the variance of the rounding, 1/12 of the
    square of the spacing.
    """

    def cells(x: Float[Array, "n h w c"]) -> Float[Array, "n a k b k c"]:
        return rearrange(x, "n (a k) (b l) c -> n a k b l c", k=side, l=side)

    def mean(x: Float[Array, "n a k b k c"]) -> Float[Array, "n a 1 b 1 c"]:
        return jnp.mean(x, axis=(2, 4), keepdims=True)

    c, d2 = cells(centre), cells(variance) / side**2
    gain = d2 / (mean(d2) + SPACING**2 / 12.0)
    c = c + gain * (cells(shown) - mean(c))
    d2 = side**2 * d2 * (1.0 - gain / side**2)
    return tuple(rearrange(x, "n a k b l c -> n (a k) (b l) c") for x in (c, d2))  # type: ignore[return-value]
