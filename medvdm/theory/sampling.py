r"""Ancestral sampling: from :math:`z_1 \sim N(0, I)` down to z_0, then the decoder.

One step, from t to s < t, draws from :math:`q(z_s \mid z_t, x = \hat x)`:

.. math::
    z_s = \frac{\alpha_s}{\alpha_t} (z_t - c\, \sigma_t \hat\epsilon) + \sigma_s \sqrt{c}\; \epsilon, \qquad
    c = -\mathrm{expm1}(\gamma_s - \gamma_t).

With guidance weight w, :math:`\hat\epsilon = (1 + w)\, \hat\epsilon(z, y) - w\, \hat\epsilon(z, \text{null})`; w = 0 is
the conditional model itself (Ho & Salimans, 2022). The null is the row that label dropout trained.

The whole chain is one compiled loop with a step count that is an argument, so any T runs without a new compilation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from medvdm.theory import gaussian
from medvdm.theory.bound import Diffusion


def guided_eps(
    model: Diffusion, z: Float[Array, "n d"], condition: Any, null: Any | None, guidance: Float[Array, ""] | float
) -> Float[Array, "n d"]:
    """The predicted noise, with guidance when the null's condition is given."""
    eps_hat = model.eps_hat(z, condition)
    if null is None:
        return eps_hat
    return (1.0 + guidance) * eps_hat - guidance * model.eps_hat(z, null)


def ancestral_step(
    z_t: Float[Array, "n d"],
    eps_hat: Float[Array, "n d"],
    gamma_s: Float[Array, ""],
    gamma_t: Float[Array, ""],
    noise: Float[Array, "n d"],
) -> Float[Array, "n d"]:
    """One draw of z_s given z_t and the predicted noise, see the module's head."""
    mean, variance = gaussian.posterior_from_eps(eps_hat, z_t, gamma_s, gamma_t)
    return mean + jnp.sqrt(variance) * noise


def chain(
    model: Diffusion,
    z: Float[Array, "n d"],
    label: Float[Array, "m c"],
    null: Float[Array, "1 c"] | None = None,
    *,
    keys: Key[Array, " n"],
    steps: Int[Array, ""] | int,
    first: Int[Array, ""] | int,
    guidance: Float[Array, ""] | float = 0.0,
    num_states: int = 1,
) -> Float[Array, "k n d"]:
    """Run steps ``first``, ``first - 1``, ..., 1 of ``steps``: from z at t = first/steps down to z_0.

    Args:
        model: predicts the noise.
        z: the latent at t = first / steps.
        label: embedded labels, one row per example or one for all.
        null: the embedded null, when guidance is wanted.
        keys: n keys, one per example; an example's noise does not depend on the batch it is in.
        steps: T.
        first: the step to start from; T for t = 1.
        guidance: w.
        num_states: how many evenly spaced latents to return; 1 is z_0 alone.

    Returns:
        The latents at ``num_states`` times, the last of which is z_0.
    """
    steps, first = jnp.asarray(steps, jnp.int32), jnp.asarray(first, jnp.int32)

    def gamma_at(i: Int[Array, "*b"]) -> Float[Array, "*b"]:
        return model.gamma(i.astype(jnp.float32) / steps.astype(jnp.float32))

    # Conditions depend on time and label only. Those of a block of steps are one large matrix product, which is far
    # cheaper than many small ones; the block is sized so that they stay in the processor's cache.
    block = max(1, 64 // label.shape[0])

    def conditions(i: Int[Array, " b"], embedded: Float[Array, "m c"]) -> Any:
        m = embedded.shape[0]
        flat = model.condition(jnp.repeat(gamma_at(i), m), jnp.tile(embedded, (block, 1)))
        return jax.tree.map(lambda leaf: leaf.reshape(block, m, *leaf.shape[1:]), flat)

    def steps_of_block(done: Int[Array, ""], stop: Int[Array, ""], z: Float[Array, "n d"]) -> Float[Array, "n d"]:
        numbers = jnp.maximum(first - done - jnp.arange(block), 1)
        with_label = conditions(numbers, label)
        with_null = None if null is None else conditions(numbers, null)

        def read(j: Int[Array, ""] | int) -> Any:
            return jax.tree.map(lambda leaf: leaf[jnp.minimum(j, block - 1)], (with_label, with_null))

        def one(j: Int[Array, ""], carry: tuple[Array, Any]) -> tuple[Array, Any]:
            z_t, (here, here_null) = carry
            i = numbers[j]
            noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), z.shape[1:]))(keys)
            eps_hat = guided_eps(model, z_t, here, here_null, guidance)
            z_s = ancestral_step(z_t, eps_hat, gamma_at(i - 1), gamma_at(i), noise)
            # Reading the next condition here, into the carry, keeps XLA from fusing the lookup into the network's
            # element-wise loops, which doubled the time of a step on CPUs.
            return z_s, read(j + 1)

        return jax.lax.fori_loop(0, jnp.minimum(block, stop - done), one, (z, read(0)))[0]

    def segment(z: Float[Array, "n d"], ends: Int[Array, " 2"]) -> tuple[Array, Array]:
        start, stop = ends[0], ends[1]
        blocks = -((start - stop) // block)
        z = jax.lax.fori_loop(0, blocks, lambda b, z: steps_of_block(start + b * block, stop, z), z)
        return z, z

    ends = _segment_ends(first, num_states)
    return jax.lax.scan(segment, z, jnp.stack([ends[:-1], ends[1:]], axis=1))[1]


def _segment_ends(first: Int[Array, ""] | int, num_states: int) -> Int[Array, " {num_states}+1"]:
    """Numbers of steps done at the start and after each of ``num_states`` about equal segments of ``first``."""
    parts = jnp.arange(num_states + 1)
    whole, rest = first // num_states, first % num_states
    return parts * whole + parts * rest // num_states  # no product can overflow, and the last is exactly `first`
