r"""Images changed a little, as another visit to the radiographer would: shift, size and exposure.

An augmented image is

.. math::
    x'(i, j) = x\big(c + (i - c - s_h) / a_h,\; c + (j - c - s_w) / a_w\big)^{e}

with shifts s, sizes a and exposure e drawn for each image, sampled linearly between pixels, the border repeated.
Of gray values that are whole numbers (uint8), only shifts are possible, by whole pixels, so that they stay whole.
Nothing is flipped: a mirrored chest has its heart on the right, which is an anomaly (dextrocardia), not a variant.
Everything is a pure function of a key, so a resumed run sees the same images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray


def resample(x: Float[Array, "n *rest"], size: Float[Array, ""], shift: Float[Array, ""]) -> Float[Array, "n *rest"]:
    """Rows of x moved by ``shift`` and stretched by ``size`` about the centre: linear between rows, ends repeated."""
    n = x.shape[0]
    centre = (n - 1) / 2
    at = jnp.clip((jnp.arange(n) - centre - shift) / size + centre, 0, n - 1)
    low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, max(n - 2, 0))
    weight = (at - low).reshape((n,) + (1,) * (x.ndim - 1))
    return (1 - weight) * x[low] + weight * x[jnp.minimum(low + 1, n - 1)]


def moved(x: Num[Array, "n *rest"], shift: Int[Array, ""]) -> Num[Array, "n *rest"]:
    """Rows of x moved by a whole number of rows, ends repeated."""
    n = x.shape[0]
    return x[jnp.clip(jnp.arange(n) - shift, 0, n - 1)]


def augment(
    key: PRNGKeyArray, x: Num[Array, "n h w c"], *, shift: float = 0.0, size: float = 0.0, exposure: float = 0.0
) -> Num[Array, "n h w c"]:
    """Change each image by a draw of its own; values stay in [0, 1], or whole numbers.

    Args:
        key: of the draws.
        x: images in [0, 1], or uint8, which is only shifted.
        shift: standard deviation of the shifts, as a fraction of the side.
        size: standard deviation of the log of the size; half of it again for each side on its own.
        exposure: standard deviation of the log of the exponent on gray values.
    """
    n, h, w, _ = x.shape
    key_shift, key_size, key_side, key_exposure = jax.random.split(key, 4)
    shifts = shift * jax.random.normal(key_shift, (n, 2)) * jnp.array([[h, w]], jnp.float32)
    if jnp.issubdtype(x.dtype, jnp.integer):
        if not shift:
            return x
        shifts = jnp.round(shifts).astype(jnp.int32)
        x = jax.vmap(moved)(x, shifts[:, 0])
        return jnp.swapaxes(jax.vmap(moved)(jnp.swapaxes(x, 1, 2), shifts[:, 1]), 1, 2)
    if shift or size:
        sizes = jnp.exp(size * (jax.random.normal(key_size, (n, 1)) + 0.5 * jax.random.normal(key_side, (n, 2))))
        x = jax.vmap(resample)(x, sizes[:, 0], shifts[:, 0])
        x = jnp.swapaxes(jax.vmap(resample)(jnp.swapaxes(x, 1, 2), sizes[:, 1], shifts[:, 1]), 1, 2)
    if exposure:
        exponent = jnp.exp(exposure * jax.random.normal(key_exposure, (n, 1, 1, 1)))
        x = jnp.clip(x, 0.0, 1.0) ** exponent  # black stays black
    return x
