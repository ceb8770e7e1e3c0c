r"""Ancestral sampling: from :math:`z_1 \sim N(0, I)` down to z_0, then the decoder.

One step, from t to s < t, draws from :math:`q(z_s \mid z_t, x = \hat x)`:

.. math::
    z_s = \frac{\alpha_s}{\alpha_t} (z_t - c\, \sigma_t \hat\epsilon) + \sigma_s \sqrt{c}\; \epsilon, \qquad
    c = -\mathrm{expm1}(\gamma_s - \gamma_t).

With guidance weight w, :math:`\hat\epsilon = (1 + w)\, \hat\epsilon(z, y) - w\, \hat\epsilon(z, \text{null})`; w = 0 is
the conditional model itself (Ho & Salimans, 2022). The null is the row that label dropout trained.

There are two forms of the same chain. :func:`plain_chain` is the one to read: one step per turn of a scan.
:func:`chain` is the one to use: its step count is an argument, so any T runs without a new compilation, and it computes
what depends on time and label only for many steps at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from medvdm.errors import InputError
from medvdm.theory import gaussian
from medvdm.theory.bound import Diffusion


def guided_eps(
    model: Diffusion, z: Float[Array, "n *latent"], condition: Any, null: Any | None, guidance: Float[Array, ""] | float
) -> Float[Array, "n *latent"]:
    """The predicted noise, with guidance when the null's condition is given."""
    eps_hat = model.eps_hat(z, condition)
    if null is None:
        return eps_hat
    return (1.0 + guidance) * eps_hat - guidance * model.eps_hat(z, null)


def ancestral_step(
    z_t: Float[Array, "n *latent"],
    eps_hat: Float[Array, "n *latent"],
    gamma_s: Float[Array, ""],
    gamma_t: Float[Array, ""],
    noise: Float[Array, "n *latent"],
) -> Float[Array, "n *latent"]:
    """One draw of z_s given z_t and the predicted noise: the posterior's mean plus its deviation times ``noise``."""
    mean, variance = gaussian.posterior_from_eps(eps_hat, z_t, gamma_s, gamma_t)
    return mean + jnp.sqrt(variance) * noise


def plain_chain(
    model: Diffusion,
    z: Float[Array, "n *latent"],
    label: Float[Array, "m c"],
    null: Float[Array, "1 c"] | None = None,
    *,
    keys: Key[Array, " n"],
    steps: int,
    first: int,
    guidance: Float[Array, ""] | float = 0.0,
    num_states: int = 1,
) -> Float[Array, "k n *latent"]:
    """The chain as its formula says, with arguments and result of :func:`chain`; slow where T is large."""

    def step(z_t: Array, i: Array) -> tuple[Array, Array]:
        gamma_t, gamma_s = model.gamma(i / steps), model.gamma((i - 1) / steps)
        with_label = _condition(model, gamma_t[None], label)
        with_null = None if null is None else _condition(model, gamma_t[None], null)
        eps_hat = guided_eps(model, z_t, with_label, with_null, guidance)
        z_s = ancestral_step(z_t, eps_hat, gamma_s, gamma_t, step_noise(keys, i, z.shape[1:]))
        return z_s, z_s

    _, states = jax.lax.scan(step, z, jnp.arange(first, 0, -1))
    return states[segment_ends(first, num_states)[1:] - 1]


def chain(
    model: Diffusion,
    z: Float[Array, "n *latent"],
    label: Float[Array, "m c"],
    null: Float[Array, "1 c"] | None = None,
    *,
    keys: Key[Array, " n"],
    steps: Int[Array, ""] | int,
    first: Int[Array, ""] | int,
    guidance: Float[Array, ""] | float = 0.0,
    num_states: int = 1,
) -> Float[Array, "k n *latent"]:
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
    ends = segment_ends(first, num_states)
    block = max(1, CONDITIONS // label.shape[0])

    def run_block(b: Int[Array, ""], carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        z_t, states = carry
        done = b * block + jnp.arange(block)  # how many steps lie behind each step of the block
        numbers = jnp.maximum(first - done, 1)
        plan = _Block(
            numbers=numbers,
            gamma_t=_gamma_at(model, numbers, steps),
            gamma_s=_gamma_at(model, numbers - 1, steps),
            slots=jnp.searchsorted(ends[1:], done + 1),
            with_label=_conditions(model, numbers, steps, label),
            with_null=None if null is None else _conditions(model, numbers, steps, null),
        )
        return _run_steps(model, plan, jnp.minimum(block, first - b * block), z_t, states, keys, guidance)

    states = None if num_states == 1 else jnp.zeros((num_states, *z.shape), z.dtype)
    z_0, states = jax.lax.fori_loop(0, -(-first // block), run_block, (z, states))
    return z_0[None] if states is None else states


MAX_STATES = 46_340

#: How many conditions :func:`chain` computes at once, over steps and labels. One large matrix product is far cheaper
#: than many small ones; no more than this, so that they stay in the processor's cache.
CONDITIONS = 64


class _Block(NamedTuple):
    """What the steps of one block need besides z; the first axis counts the steps."""

    numbers: Int[Array, " b"]  #: i, falling
    gamma_t: Float[Array, " b"]
    gamma_s: Float[Array, " b"]
    slots: Int[Array, " b"]  #: in which of the returned states each step's result may stand
    with_label: Any
    with_null: Any


def _run_steps(
    model: Diffusion,
    plan: _Block,
    count: Int[Array, ""],
    z: Float[Array, "n *latent"],
    states: Float[Array, "k n *latent"] | None,
    keys: Key[Array, " n"],
    guidance: Float[Array, ""] | float,
) -> tuple[Array, Array | None]:
    """The first ``count`` steps of a block. Each writes over the state of its segment; the segment's last one stays."""

    def read(j: Int[Array, ""] | int) -> Any:
        last = plan.numbers.shape[0] - 1
        return jax.tree.map(lambda leaf: leaf[jnp.minimum(j, last)], (plan.with_label, plan.with_null))

    def one(j: Int[Array, ""], carry: tuple[Array, Array | None, Any]) -> tuple[Array, Array | None, Any]:
        z_t, states, (here, here_null) = carry
        eps_hat = guided_eps(model, z_t, here, here_null, guidance)
        noise = step_noise(keys, plan.numbers[j], z.shape[1:])
        z_s = ancestral_step(z_t, eps_hat, plan.gamma_s[j], plan.gamma_t[j], noise)
        if states is not None:
            states = jax.lax.dynamic_update_index_in_dim(states, z_s, plan.slots[j], 0)
        # Reading the next condition here, into the carry, keeps XLA from fusing the lookup into the network's
        # element-wise loops, which doubled the time of a step on CPUs.
        return z_s, states, read(j + 1)

    return jax.lax.fori_loop(0, count, one, (z, states, read(0)))[:2]


def step_noise(keys: Key[Array, " n"], i: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float[Array, "n *latent"]:
    """The noise of step i, by each example's own key; steps are numbered from 1."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def _gamma_at(model: Diffusion, i: Int[Array, "*b"], steps: Int[Array, ""]) -> Float[Array, "*b"]:
    return model.gamma(i.astype(jnp.float32) / steps.astype(jnp.float32))


def _condition(model: Diffusion, gamma: Float[Array, " b"], embedded: Float[Array, "m c"]) -> Any:
    """The conditions of every gamma with every label: leaves of b m rows, the labels of one gamma together."""
    m = embedded.shape[0]
    return model.condition(jnp.repeat(gamma, m), jnp.tile(embedded, (gamma.shape[0], 1)))


def _conditions(
    model: Diffusion, numbers: Int[Array, " b"], steps: Int[Array, ""], embedded: Float[Array, "m c"]
) -> Any:
    """:func:`_condition` of a block of steps, with an axis for the steps in front of that for the labels."""
    b, m = numbers.shape[0], embedded.shape[0]
    flat = _condition(model, _gamma_at(model, numbers, steps), embedded)
    return jax.tree.map(lambda leaf: leaf.reshape(b, m, *leaf.shape[1:]), flat)


def segment_ends(first: Int[Array, ""] | int, num_states: int) -> Int[Array, " {num_states}+1"]:
    """Numbers of steps done at the start and after each of ``num_states`` about equal segments of ``first``.

    Raises:
        InputError: more than :data:`MAX_STATES`, whose square no longer is a 32-bit integer.
    """
    if num_states > MAX_STATES:
        raise InputError(f"num_states: {num_states}; expected at most {MAX_STATES}")
    parts = jnp.arange(num_states + 1)
    whole, rest = first // num_states, first % num_states
    return parts * whole + parts * rest // num_states  # no product overflows, and the last is exactly `first`
