"""The networks of the Medical VDM: encoder, decoder and ScoreNet, all residual MLPs (paper, sections 2.4 and 2.5).

They know nothing about diffusion: arrays go in, arrays come out. Parameters are float32; ``dtype`` is the type
of the arithmetic (bfloat16 is for accelerators), and every output is float32 again.
"""

from __future__ import annotations

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from medvdm.errors import InputError, InputTypeError

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}


def time_embedding(u: Float[Array, " n"], width: int) -> Float[Array, "n width"]:
    """Sines and cosines of ``1000 u`` at geometric frequencies from 1 to 1/10,000 (Vaswani et al. 2017).

    Args:
        u: a time-like number, about in [0, 1], one an example.
        width: number of features, even.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    angles = 1000.0 * u[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class FiLM(nnx.Module):
    r"""Feature-wise linear modulation: :math:`h \mapsto (1 + a(c)) h + b(c)` (Perez et al. 2018).

    Both the scale a and the shift b come from the condition c through one linear layer. It starts at zero: the
    identity. Calling it gives (a, b) side by side; :func:`modulate` applies them.
    """

    def __init__(self, condition_width: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.linear = nnx.Linear(condition_width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, condition: Float[Array, "m c"]) -> Float[Array, "m two_width"]:
        return self.linear(condition)


def modulate(h: Float[Array, "n width"], film: Float[Array, "m two_width"]) -> Float[Array, "n width"]:
    """``(1 + scale) h + shift``, with scale and shift side by side in ``film``; m is n, or 1 for all rows of h."""
    scale, shift = jnp.split(film, 2, axis=-1)
    return (1 + scale) * h + shift


class ResidualBlock(nnx.Module):
    """``h + W2 swish(film(W1 swish(norm(h))))``: pre-norm, two dense layers, zero-initialised at the end.

    The last layer starts at zero, so a stack of blocks of any depth starts as the identity.
    """

    def __init__(self, width: int, inner_width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(width, inner_width, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.contract = nnx.Linear(inner_width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, h: Float[Array, "n width"], film: Float[Array, "m two_inner"] | None = None
    ) -> Float[Array, "n width"]:
        inner = self.expand(nnx.swish(self.norm(h)))
        if film is not None:
            inner = modulate(inner, film)
        return h + self.contract(nnx.swish(inner))


def check_images(x: Array, image_shape: tuple[int, int, int]) -> None:
    """Refuse what is no batch of the model's images.

    Raises:
        InputTypeError: x is not floating point. (Integer images are a scale of 0..255 or a cast gone wrong.)
        InputError: x has another shape than the model's images.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputTypeError(f"images: dtype {x.dtype}; expected float in [0, 1]")
    if x.ndim != 4 or x.shape[1:] != image_shape:
        raise InputError(f"images: shape {x.shape}; expected (n, *{image_shape})")


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
        """Encode images in [0, 1]; raises as :func:`check_images`."""
        check_images(x, self.image_shape)
        h = self.enter(rearrange(2.0 * x - 1.0, "n h w c -> n (h w c)").astype(self.dtype))
        for block in self.blocks:
            h = block(h)
        return self.leave(h).astype(jnp.float32)


class Decoder(nnx.Module):
    """Latent to the logits of one Bernoulli a pixel: dense, residual blocks, dense (paper, section 2.4)."""

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

    def __call__(self, z: Float[Array, "n latent"]) -> Float[Array, "n h w c"]:
        h = self.enter(z.astype(self.dtype))
        for block in self.blocks:
            h = block(h)
        height, width, channels = self.image_shape
        logits = self.leave(h).astype(jnp.float32)
        return rearrange(logits, "n (h w c) -> n h w c", h=height, w=width, c=channels)


class ScoreNet(nnx.Module):
    """Predicts the noise in a latent: input plus a FiLM-conditioned residual MLP (paper, section 2.5).

    Args:
        latent: number of latent dimensions d.
        embedding_dim: width of the time embedding, of the conditioning and of the residual blocks.
        layers, inner_width: of the residual blocks.
    """

    def __init__(
        self, latent: int, *, embedding_dim: int, layers: int, inner_width: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.mix1 = nnx.Linear(2 * embedding_dim, 4 * embedding_dim, dtype=dtype, rngs=rngs)
        self.mix2 = nnx.Linear(4 * embedding_dim, 4 * embedding_dim, dtype=dtype, rngs=rngs)
        self.mix3 = nnx.Linear(4 * embedding_dim, embedding_dim, dtype=dtype, rngs=rngs)
        self.enter = nnx.Linear(latent, embedding_dim, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [ResidualBlock(embedding_dim, inner_width, dtype=dtype, rngs=rngs) for _ in range(layers)]
        )
        self.films = nnx.List([FiLM(embedding_dim, inner_width, dtype=dtype, rngs=rngs) for _ in range(layers)])
        zeros = nnx.initializers.zeros_init()
        self.leave = nnx.Linear(embedding_dim, latent, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def condition(self, u: Float[Array, " m"], label: Float[Array, "m c"]) -> tuple[Float[Array, "m two_inner"], ...]:
        """Join the time ``u`` and the embedded ``label`` into the modulation of every block.

        Nothing here depends on z, so a sampler computes many steps' conditions in one go.
        """
        joined = jnp.concatenate([time_embedding(u, self.embedding_dim), label], axis=-1).astype(self.dtype)
        condition = self.mix3(nnx.swish(self.mix2(nnx.swish(self.mix1(joined)))))
        return tuple(film(condition) for film in self.films)

    def __call__(
        self, z: Float[Array, "n latent"], condition: tuple[Float[Array, "m two_inner"], ...]
    ) -> Float[Array, "n latent"]:
        r"""Return :math:`\hat\epsilon`. ``condition`` comes from :meth:`condition`; its m is n, or 1 for all."""
        h = self.enter(z.astype(self.dtype))
        for block, film in zip(self.blocks, condition, strict=True):
            h = block(h, film)
        return z + self.leave(h).astype(jnp.float32)


class LabelEmbedding(nnx.Module):
    """Multi-hot labels to a vector, with a *trained* null row for 'no label given'.

    An unconditional model (``classes = 0``) has the null row only. With classes, training replaces the label of a
    fraction of the examples by the null (label dropout), so that guidance at sampling meets a row it was taught.
    """

    def __init__(self, classes: int, width: int, *, rngs: nnx.Rngs):
        self.classes = classes
        normal = jax.nn.initializers.normal(1.0)
        self.null = nnx.Param(normal(rngs.params(), (width,), jnp.float32))
        if classes:
            self.table = nnx.Param(normal(rngs.params(), (classes, width), jnp.float32))

    def __call__(
        self, labels: Float[Array, "n k"] | None, keep: Float[Array, " n"] | None = None, *, n: int = 1
    ) -> Float[Array, "n c"]:
        """Embed labels; ``None`` gives ``n`` null rows. Where ``keep`` is 0, the null replaces the label.

        Raises:
            InputError: labels of another number of classes than the model has.
        """
        null = self.null[...][None, :]
        if labels is None or not self.classes:
            return jnp.repeat(null, n if labels is None else labels.shape[0], axis=0)
        if labels.ndim != 2 or labels.shape[1] != self.classes:
            raise InputError(f"labels: shape {labels.shape}; expected (n, {self.classes}), multi-hot")
        embedded = labels.astype(jnp.float32) @ self.table[...]
        if keep is None:
            return embedded
        return jnp.where(keep[:, None] > 0, embedded, null)
