r"""Networks that start as the linear-Gaussian VDM and learn what it cannot express.

The linear-Gaussian VDM (:mod:`medvdm.theory.linear_gaussian`) is exact where images are Gaussian: its encoding is the
score on k principal components, :math:`f = U (x - \mu)`, its score network the exact denoiser, its decoder the
posterior mean. Each part here is that closed form plus a network whose last layer starts at zero:

.. math::
    \hat\epsilon &= \frac{\sigma_t z_t}{v_t}
        + \sqrt{\frac{\alpha_t^2 \lambda}{v_t}} \odot net_\epsilon\!\left(\frac{z_t}{\sqrt{v_t}}, t\right),
        \qquad v_t = \alpha_t^2 \lambda + \sigma_t^2 \\
    \bar x &= \mu + U^T \frac{\lambda}{\lambda + r^2} \frac{z_0}{\alpha_0}, \qquad r^2 = e^{\gamma_0} \\
    \ell &= \log \frac{s(\bar x)}{s(1 - \bar x)} + net_x(\bar x), \qquad s(p) = \tfrac12 (p + \sqrt{p^2 + \delta^2})

The network on the noise sees a latent of unit variance at every t, and its answer is scaled by the deviation of the
exact denoiser's error. The network on the image is convolutional, on cells of 8 x 8 pixels. :math:`s` is a smooth clip,
because a posterior mean of gray values can leave [0, 1]. The components are measured, not trained: see
:func:`medvdm.evaluation.components.principal_components`, which may look at augmented copies of the training images.
"""

from __future__ import annotations

from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from medvdm.models.blocks import Measured, check_images
from medvdm.models.scorenet import ScoreNet
from medvdm.theory import gaussian

DELTA = 0.015  #: of the smooth clip; 0.002 to 0.015 were tried on validation images, see chapter 16
CELL = 8  #: side in pixels of the cells that the decoder's convolutions see as one place


class Basis(nnx.Module):
    """Mean (P,), components (k, P) and variances (k,) of the training images; not trained. Zero until they are set."""

    def __init__(self, pixels: int, latent: int):
        self.mean = Measured(jnp.zeros((pixels,)))
        self.components = Measured(jnp.zeros((latent, pixels)))
        self.variances = Measured(jnp.ones((latent,)))


class LinearEncoder(nnx.Module):
    """Image to its scores on the components, :math:`f = U (x - \\mu)`."""

    def __init__(self, image_shape: tuple[int, int, int], basis: Basis):
        self.image_shape = tuple(image_shape)
        self.basis = basis

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n latent"]:
        """Encode images in [0, 1]; raises as :func:`medvdm.models.blocks.check_images`."""
        check_images(x, self.image_shape)
        flat = rearrange(x, "n h w c -> n (h w c)") - self.basis.mean[...][None, :]
        return flat @ self.basis.components[...].T


class ConvBlock(nnx.Module):
    """``h + conv(swish(conv(swish(h))))`` with 3 x 3 kernels; the second starts at zero."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.first = nnx.Conv(width, width, (3, 3), dtype=dtype, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "n a b width"]) -> Float[Array, "n a b width"]:
        return h + self.second(nnx.swish(self.first(nnx.swish(h))))


class LinearDecoder(nnx.Module):
    """Latent to logits: the posterior mean image, smoothly clipped, and a convolutional correction.

    A side that is no multiple of :data:`CELL` is filled up for the convolutions with copies of its last row or column,
    and what they say there is cut off.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        basis: Basis,
        *,
        width: int,
        layers: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        self.dtype = dtype
        self.basis = basis
        inside = CELL**2 * image_shape[2]
        self.enter = nnx.Conv(inside + 2, width, (3, 3), dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([ConvBlock(width, dtype=dtype, rngs=rngs) for _ in range(layers)])
        zeros = nnx.initializers.zeros_init()
        self.leave = nnx.Conv(width, inside, (3, 3), kernel_init=zeros, dtype=dtype, rngs=rngs)

    def mean_logits(self, z: Float[Array, "n latent"], gamma_0: Float[Array, ""]) -> Float[Array, "n h w c"]:
        """The logits of the linear-Gaussian VDM's posterior mean, smoothly clipped."""
        height, width, channels = self.image_shape
        variances = self.basis.variances[...]
        shrink = variances / (variances + jnp.exp(gamma_0))
        mean = self.basis.mean[...][None, :] + (z * shrink[None, :]) @ self.basis.components[...]
        logits = jnp.log(_clip(mean)) - jnp.log(_clip(1.0 - mean))
        return rearrange(logits, "n (h w c) -> n h w c", h=height, w=width, c=channels)

    def __call__(self, z: Float[Array, "n latent"], gamma_0: Float[Array, ""]) -> Float[Array, "n h w c"]:
        logits = self.mean_logits(z, gamma_0)
        _, height, width, _ = logits.shape
        filled = jnp.pad(logits, ((0, 0), (0, -height % CELL), (0, -width % CELL), (0, 0)), mode="edge")
        sides = {"p": CELL, "q": CELL}
        cells = rearrange(0.3 * filled, "n (a p) (b q) c -> n a b (p q c)", **sides)
        n, a, b, _ = cells.shape
        place = jnp.stack(jnp.meshgrid(jnp.linspace(-1, 1, a), jnp.linspace(-1, 1, b), indexing="ij"), axis=-1)
        place = jnp.broadcast_to(place[None], (n, a, b, 2))
        h = self.enter(jnp.concatenate([cells, place], axis=-1).astype(self.dtype))
        for block in self.blocks:
            h = block(h)
        change = self.leave(nnx.swish(h)).astype(jnp.float32)
        return logits + rearrange(change, "n a b (p q c) -> n (a p) (b q) c", **sides)[:, :height, :width]


def _clip(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Smoothly positive: p for p well above :data:`DELTA`, half of that at 0."""
    root = jnp.sqrt(p * p + DELTA**2)
    # The same twice; below 0 the first would lose its digits.
    return 0.5 * jnp.where(p > 0, p + root, DELTA**2 / (root + jnp.abs(p)))


class LinearScore(nnx.Module):
    r"""The exact denoiser of a Gaussian latent, and the paper's ScoreNet as a correction.

    .. math::
        \hat\epsilon = \frac{\sigma_t z_t}{v_t}
            + \sqrt{\frac{\alpha_t^2 \lambda}{v_t}} \odot net\!\left(\frac{z_t}{\sqrt{v_t}}, t\right),
            \qquad v_t = \alpha_t^2 \lambda + \sigma_t^2
    """

    def __init__(self, basis: Basis, net: ScoreNet):
        self.basis = basis
        self.net = net

    def condition(self, gamma: Float[Array, " m"], label: Float[Array, "m c"]) -> Any:
        """What depends on time and label only: the modulation of the network, alpha^2, sigma^2."""
        alpha2, sigma2 = gaussian.sigma2(-gamma), gaussian.sigma2(gamma)  # alpha^2 = sigmoid(-gamma)
        return self.net.condition(gamma, label), alpha2[:, None], sigma2[:, None]

    def __call__(self, z: Float[Array, "n latent"], condition: Any) -> Float[Array, "n latent"]:
        modulation, alpha2, sigma2 = condition
        signal = alpha2 * self.basis.variances[...][None, :]
        whitened = z * jax.lax.rsqrt(signal + sigma2)
        change = self.net(whitened, modulation) - whitened  # ScoreNet adds its input; here it must start at zero
        return (jnp.sqrt(sigma2) * whitened + jnp.sqrt(signal) * change) * jax.lax.rsqrt(signal + sigma2)
