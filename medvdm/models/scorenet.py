"""The ScoreNet: a residual MLP that predicts the noise in a latent, given time and label (paper, section 2.5)."""

from __future__ import annotations

import flax.nnx as nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from medvdm.models.blocks import FiLM, ResidualBlock, time_embedding


class ScoreNet(nnx.Module):
    """Predicts the noise in a latent: input plus a FiLM-conditioned residual MLP (paper, section 2.5).

    Args:
        latent: number of latent dimensions d.
        embedding_dim: width of the time embedding, of the conditioning and of the residual blocks.
        layers, inner_width: of the residual blocks.
        gamma_range: the gammas that the network's time, u, maps to 0 and 1. They are *constants*, neither learned ends
            nor t itself, so a learned schedule can change inside without a change of what the network is told, and
            the bound stays the same. With (0, 1) the network is given u as it is.
    """

    def __init__(
        self,
        latent: int,
        *,
        embedding_dim: int,
        layers: int,
        inner_width: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        gamma_range: tuple[float, float] = (0.0, 1.0),
    ):
        self.gamma_range = gamma_range
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

    def normalised(self, gamma: Float[Array, "..."]) -> Float[Array, "..."]:
        """The network's time u: gamma, by the constants of ``gamma_range``, as a number of about [0, 1]."""
        low, high = self.gamma_range
        return (gamma - low) / (high - low)

    def condition(
        self, gamma: Float[Array, " m"], label: Float[Array, "m c"]
    ) -> tuple[Float[Array, "m two_inner"], ...]:
        """Join the noise level ``gamma`` and the embedded ``label`` into the modulation of every block.

        Nothing here depends on z, so a sampler computes many steps' conditions in one go.
        """
        u = self.normalised(gamma)
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
