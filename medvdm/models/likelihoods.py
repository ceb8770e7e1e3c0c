r"""The observation model :math:`p(x \mid z_0)`, independent over the pixels given z_0. There are two.

**Bernoulli**, the paper's. Its pixels are *gray*, x in [0, 1], so the 'likelihood' is the cross-entropy between two
Bernoulli laws,

.. math:: -\log p(x \mid z_0) = \sum_i \mathrm{softplus}(\ell_i) - x_i \ell_i ,

with logits :math:`\ell`. Its least possible value is not zero but the entropy of the targets, see
:func:`bernoulli_floor`; and it is not a normalised density of gray values, so it is not comparable with the bits per
dimension of an 8-bit likelihood (Loaiza-Ganem & Cunningham, NeurIPS 2019).

**Eight bits**, for a diffusion on pixels: a categorical law over the 256 gray values :math:`x_k = 2k/255 - 1`,

.. math:: p(x = x_k \mid z_0) = \frac{\exp(-(z_0/\alpha_0 - x_k)^2 / 2 r^2)}
    {\sum_j \exp(-(z_0/\alpha_0 - x_j)^2 / 2 r^2)}, \qquad r = \sigma_0 / \alpha_0 = e^{\gamma_0 / 2} .

It is what Bayes' rule gives for :math:`q(z_0 \mid x)` when all gray values are as likely (Kingma et al. 2021, equation
8), and its probabilities sum to one. So the bound is one on the bits that a lossless codec needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from medvdm.errors import InputError, InputTypeError


def check_gray(x: Array) -> None:
    """Refuse what is no array of gray values in [0, 1].

    Inside ``jit``, ``grad`` and ``vmap`` values are not known yet, and only the type is checked: whoever compiles a
    loss checks the images where they come in (:func:`medvdm.images.as_unit_float`).

    Raises:
        InputTypeError: x is not floating point. A cast of [0, 1] images to integers trains on black images.
        InputError: a value is below 0, above 1 or not a number.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputTypeError(f"images: dtype {x.dtype}; expected float in [0, 1]")
    if isinstance(x, jax.core.Tracer) or not x.size:
        return
    values = np.asarray(x)  # not jnp: a constant image inside a compiled function is checked too
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
        raise InputError(f"images: values from {low:g} to {high:g}; expected [0, 1]")


def bernoulli_nll(x: Float[Array, "n *shape"], logits: Float[Array, "n *shape"]) -> Float[Array, " n"]:
    r"""Cross-entropy of gray targets, nats per image: :math:`\sum_i \mathrm{softplus}(\ell_i) - x_i \ell_i`.

    Raises:
        InputTypeError, InputError: x is no array of gray values, see :func:`check_gray`.
    """
    check_gray(x)
    return jnp.sum(jax.nn.softplus(logits) - x * logits, axis=tuple(range(1, x.ndim)))


def bernoulli_floor(x: Float[Array, "n *shape"]) -> Float[Array, " n"]:
    r"""The least cross-entropy that any prediction can reach, in nats per image: the binary entropy of the targets,

    .. math:: \sum_i -x_i \log x_i - (1 - x_i) \log(1 - x_i).

    Raises:
        InputTypeError, InputError: x is no array of gray values, see :func:`check_gray`.
    """
    check_gray(x)
    return jnp.sum(jax.scipy.special.entr(x) + jax.scipy.special.entr(1.0 - x), axis=tuple(range(1, x.ndim)))


def bernoulli_mean(logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The picture: the mean of each pixel's Bernoulli law, in [0, 1]. A draw from it would be black or white."""
    return jax.nn.sigmoid(logits)


# --- Eight bits ---------------------------------------------------------------------------------------------------

LEVELS = 256  #: gray values
SPACING = 2.0 / (LEVELS - 1)  #: between two neighbours on the scale of [-1, 1]


def check_levels(x: Array | np.ndarray) -> None:
    """Refuse what are no gray values of 8 bits; nothing is ever cast to them on the way.

    Raises:
        InputTypeError: x is not uint8.
    """
    if x.dtype != jnp.uint8:
        raise InputTypeError(
            f"images: dtype {x.dtype}; expected uint8, gray values from 0 to 255, for an 8-bit likelihood "
            "(medvdm.images.to_levels rounds images in [0, 1])"
        )


def level_values(levels: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Gray values k on the scale of the diffusion: :math:`x_k = 2k/255 - 1`, in [-1, 1]."""
    check_levels(levels)
    return SPACING * levels.astype(jnp.float32) - 1.0


def level_log_probs(centre: Float[Array, "*shape"], deviation: Float[Array, "*#shape"]) -> Float[Array, "*shape 256"]:
    r"""The logarithms of all 256 probabilities of each pixel.

    .. math:: \log p_k = -\frac{(c - x_k)^2}{2 d^2} - \log \sum_j \exp\left(-\frac{(c - x_j)^2}{2 d^2}\right)

    Args:
        centre: c, on the scale of [-1, 1]; it may lie outside.
        deviation: d, on that scale.
    """
    return jax.nn.log_softmax(_exponents(centre, deviation), axis=-1)


def level_nll(
    levels: UInt8[Array, "n *shape"], centre: Float[Array, "n *shape"], deviation: Float[Array, "..."]
) -> Float[Array, " n"]:
    """-log p of gray values in nats per image, with the law of :func:`level_log_probs`; no 256-fold memory.

    Raises:
        InputTypeError: levels that are not uint8.
    """
    check_levels(levels)
    exponents = jax.checkpoint(_exponents)  # XLA computes them inside the sum, forwards and backwards
    log_sum = jax.checkpoint(lambda c, d: jnp.log(jnp.sum(jnp.exp(exponents(c, d)), axis=-1)))(centre, deviation)
    own = _exponent(levels.astype(jnp.float32), centre, deviation)
    return jnp.sum(log_sum - own, axis=tuple(range(1, levels.ndim)))


def level_mean(centre: Float[Array, "*shape"], deviation: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The mean of :func:`level_log_probs`'s law, on the scale of [-1, 1]: a rounding that is as soft as d is large.

    .. math:: E[x] = \sum_k x_k\, p_k

    Where d is the spacing of the gray values or more, it is c: Poisson's sum says that the difference, relative to the
    spacing, is below :math:`4 \pi d^2 e^{-2 \pi^2 d^2}`, 3e-8 at d = 1, for a law whose bell lies within the gray
    values. Of one that black or white cuts off, c is returned as well, though its mean lies inside by up to 0.8 d.
    Where d is smaller, five neighbours on each side do, cut off or not; a centre more than three levels outside counts
    as three levels outside.
    """
    c, d2 = (centre + 1.0) / SPACING, (deviation / SPACING) ** 2
    near = _nearest(c)
    offsets = _along_last_axis(jnp.arange(-5.0, 6.0), c)
    k = near[..., None] + offsets
    beyond = (k < 0) | (k > LEVELS - 1)
    exponents = -((k - jnp.clip(c, -3.0, LEVELS + 2.0)[..., None]) ** 2) / (2.0 * jnp.minimum(d2, 1.0)[..., None])
    weights = jax.nn.softmax(jnp.where(beyond, -jnp.inf, exponents), axis=-1)
    return jnp.where(d2 < 1.0, SPACING * (near + jnp.sum(weights * offsets, axis=-1)) - 1.0, centre)


def level_picture(centre: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The most likely gray value, as a number in [0, 1]."""
    return _nearest((centre + 1.0) / SPACING) / (LEVELS - 1)


def _nearest(c: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(jnp.round(jax.lax.stop_gradient(c)), 0.0, LEVELS - 1)


def _exponents(centre: Float[Array, "*shape"], deviation: Float[Array, "..."]) -> Float[Array, "*shape 256"]:
    levels = _along_last_axis(jnp.arange(float(LEVELS)), centre)
    return _exponent(levels, centre[..., None], jnp.broadcast_to(deviation, centre.shape)[..., None])


def _along_last_axis(values: Float[Array, " k"], like: Float[Array, "*shape"]) -> Float[Array, "*ones k"]:
    """Values with axes of 1 before theirs, one for each axis of ``like``."""
    return values.reshape((1,) * like.ndim + values.shape)


def _exponent(k: Array, centre: Array, deviation: Array) -> Array:
    """Above that of the nearest gray value n: -[(c - k)^2 - (c - n)^2] / 2 d^2 as a product, which keeps its digits."""
    c = (centre + 1.0) / SPACING
    near = _nearest(c)
    return 0.5 * (k - near) * (2.0 * c - k - near) / (deviation / SPACING) ** 2


# --- What a model asks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """An observation model as the rest of the library sees it."""

    integers: bool
    """Whether images are uint8 gray values, or float in [0, 1]."""
    nll: Callable[[Num[Array, "n *shape"], Float[Array, "n *shape"], Float[Array, ""]], Float[Array, " n"]]
    """-log p(x | z_0) in nats per image, from x, what the decoder gives and gamma_0."""
    picture: Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
    """What to show of what the decoder gives, in [0, 1]."""


BERNOULLI = Likelihood(False, lambda x, decoded, gamma_0: bernoulli_nll(x, decoded), bernoulli_mean)
EIGHT_BIT = Likelihood(True, lambda x, decoded, gamma_0: level_nll(x, decoded, jnp.exp(0.5 * gamma_0)), level_picture)
