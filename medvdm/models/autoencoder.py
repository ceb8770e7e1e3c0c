"""Encoder and decoder: residual MLPs from the image to its latent and back (paper, section 2.4)."""

from __future__ import annotations

import math

import flax.nnx as nnx
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from medvdm.models.blocks import ResidualBlock, check_images


class Encoder(nnx.Module):
    """Image to latent: dense layer, residual blocks, dense layer (paper, section 2.4).

    Args:
        image_shape: (height, width, channels); any.
        latent: number of latent dimensions d.
        width, layers, inner_width: of the residual blocks.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent: int,
        *,
        width: int,
        layers: int,
        inner_width: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        self.dtype = dtype
        self.enter = nnx.Linear(math.prod(image_shape), width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, inner_width, dtype=dtype, rngs=rngs) for _ in range(layers)])
        self.leave = nnx.Linear(width, latent, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n latent"]:
        """Encode images in [0, 1]; raises as :func:`medvdm.models.blocks.check_images`."""
        check_images(x, self.image_shape)
        h = self.enter(rearrange(2.0 * x - 1.0, "n h w c -> n (h w c)").astype(self.dtype))
        for block in self.blocks:
            h = block(h)
        return self.leave(h).astype(jnp.float32)


class Decoder(nnx.Module):
    """Latent to the logits of one Bernoulli per pixel: dense, residual blocks, dense (paper, section 2.4).

    It has no use for ``gamma_0``, the least noise, which other decoders are told.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent: int,
        *,
        width: int,
        layers: int,
        inner_width: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        self.dtype = dtype
        self.enter = nnx.Linear(latent, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, inner_width, dtype=dtype, rngs=rngs) for _ in range(layers)])
        self.leave = nnx.Linear(width, math.prod(image_shape), dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "n latent"], gamma_0: Float[Array, ""] | None = None) -> Float[Array, "n h w c"]:
        h = self.enter(z.astype(self.dtype))
        for block in self.blocks:
            h = block(h)
        height, width, channels = self.image_shape
        logits = self.leave(h).astype(jnp.float32)
        return rearrange(logits, "n (h w c) -> n h w c", h=height, w=width, c=channels)
