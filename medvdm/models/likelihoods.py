r"""The observation model :math:`p(x \mid z_0)`: one Bernoulli per pixel (mean field).

Our pixels are *gray*, x in [0, 1], so the 'likelihood' is the cross-entropy between two Bernoulli laws,

.. math:: -\log p(x \mid z_0) = \sum_i \mathrm{softplus}(\ell_i) - x_i \ell_i ,

with logits :math:`\ell`. Its least possible value is not zero but the entropy of the targets, see
:func:`bernoulli_floor`; and it is not a normalised density of gray values, so it is not comparable with the bits per
dimension of an 8-bit likelihood (Loaiza-Ganem & Cunningham, NeurIPS 2019).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
