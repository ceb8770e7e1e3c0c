"""The networks of the Medical VDM: encoder, decoder and ScoreNet, all residual MLPs (paper, sections 2.4 and 2.5).

They know nothing about diffusion: arrays go in, arrays come out. Parameters are float32; ``dtype`` is the type
of the arithmetic (bfloat16 is for accelerators), and every output is float32 again.
"""

from __future__ import annotations

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medvdm.errors import InputError
from medvdm.models.likelihoods import check_gray

#: Types of arithmetic. Not float16: its least number is 6e-8, most gradients of a loss per dimension are smaller, and
#: nothing here scales the loss.
DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16")}


class Measured(nnx.Variable):
    """A part of a model that is measured from the training images before the first step, and never trained.

    Training splits a model by the kind of its variables: ``nnx.Param`` is trained, this is not.
    """


def time_embedding(u: Float[Array, " n"], width: int) -> Float[Array, "n width"]:
    """Sines and cosines of ``1000 u`` at geometric frequencies from 1 to 1/10,000 (Vaswani et al. 2017).

    Args:
        u: a time-like number, about in [0, 1], one per example.
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


def modulate(
    h: Float[Array, "n *places width"], film: Float[Array, "m *ones two_width"]
) -> Float[Array, "n *places width"]:
    """``(1 + scale) h + shift``, with scale and shift side by side in ``film``.

    m is n, or 1 for all rows of h; the axes of places, if h has any, are 1 in ``film``.
    """
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
    """Refuse what is no batch of the model's images; raises as :func:`medvdm.models.likelihoods.check_gray`, and

    Raises:
        InputError: x has another shape than the model's images.
    """
    check_gray(x)
    if x.ndim != 4 or x.shape[1:] != image_shape:
        raise InputError(f"images: shape {x.shape}; expected (n, *{image_shape})")


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
