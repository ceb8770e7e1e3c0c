r"""Chains of steps: from :math:`z_1 \sim N(0, I)` down to z_0, then the decoder.

Ancestral sampling is the one that follows from the model. Its step, from t to s < t, draws from
:math:`q(z_s \mid z_t, x = \hat x)`:

.. math::
    z_s = \frac{\alpha_s}{\alpha_t} (z_t - c\, \sigma_t \hat\epsilon) + \sigma_s \sqrt{c}\; \epsilon, \qquad
    c = -\mathrm{expm1}(\gamma_s - \gamma_t).

With guidance weight w, :math:`\hat\epsilon = (1 + w)\, \hat\epsilon(z, y) - w\, \hat\epsilon(z, \text{null})`; w = 0 is
the conditional model itself (Ho & Salimans, 2022). The null is the row that label dropout trained.

Other steps, and other times than evenly spaced ones, are in :mod:`medvdm.theory.solvers`.

There are two forms of the same chain. :func:`plain_chain` is the one to read: one step per turn of a scan.
:func:`chain` is the one to use: its step count is an argument, so any T runs without a new compilation, it computes
what depends on time and label only for many steps at once, and it has all solvers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from medvdm.errors import InputError
from medvdm.theory import solvers
from medvdm.theory.bound import Diffusion
from medvdm.theory.solvers import ancestral_step


def guided_eps(
    model: Diffusion, z: Float[Array, "n *latent"], condition: Any, null: Any | None, guidance: Float[Array, ""] | float
) -> Float[Array, "n *latent"]:
    """The predicted noise, with guidance when the null's condition is given."""
    eps_hat = model.eps_hat(z, condition)
    if null is None:
        return eps_hat
    return (1.0 + guidance) * eps_hat - guidance * model.eps_hat(z, null)


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
    """The ancestral chain as its formula says, with arguments and result of :func:`chain`; slow where T is large."""

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
    solver: str = "ancestral",
    eta: Float[Array, ""] | float = 0.0,
    grid: Float[Array, " knots"] | None = None,
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
        solver: one of :data:`medvdm.theory.solvers.SOLVERS`.
        eta: of DDIM, from 0, without noise, to 1, the ancestral chain.
        grid: times at evenly spaced fractions of the way, in place of these fractions themselves; step i begins at the
            fraction i / steps. A falling table makes the chain run upwards, from an image to its z_1.

    Returns:
        The latents at ``num_states`` times, the last of which is z_0.
    """
    steps, first = jnp.asarray(steps, jnp.int32), jnp.asarray(first, jnp.int32)
    ends = segment_ends(first, num_states)
    block = max(1, CONDITIONS // label.shape[0])

    def run_block(b: Int[Array, ""], carry: _Carry) -> _Carry:
        done = b * block + jnp.arange(block + 1)  # how many steps lie behind each state of the block
        numbers = jnp.maximum(first - done, 0)
        fraction = numbers.astype(jnp.float32) / steps.astype(jnp.float32)
        gamma = model.gamma(solvers.time_at(fraction, grid))
        plan = _Block(
            numbers=numbers,
            gamma=gamma,
            slots=jnp.searchsorted(ends[1:], done + 1),
            with_label=_conditions(model, gamma, label),
            with_null=None if null is None else _conditions(model, gamma, null),
        )
        return _run_steps(model, plan, jnp.minimum(block, first - b * block), carry, keys, guidance, solver, eta)

    states = None if num_states == 1 else jnp.zeros((num_states, *z.shape), z.dtype)
    start = _Carry(z, states, solvers.first_past(solver, z))
    z_0, states, _ = jax.lax.fori_loop(0, -(-first // block), run_block, start)
    return z_0[None] if states is None else states


MAX_STATES = 46_340

#: How many conditions :func:`chain` computes at once, over steps and labels. One large matrix product is far cheaper
#: than many small ones; no more than this, so that they stay in the processor's cache.
CONDITIONS = 64


class _Carry(NamedTuple):
    """What one step leaves to the next."""

    z: Float[Array, "n *latent"]
    states: Float[Array, "k n *latent"] | None
    past: solvers.Past | None


class _Block(NamedTuple):
    """What the steps of one block need besides z; the first axis counts the states, one more than steps."""

    numbers: Int[Array, " b"]  #: i, falling
    gamma: Float[Array, " b"]
    slots: Int[Array, " b"]  #: in which of the returned states each step's result may stand
    with_label: Any
    with_null: Any


def _run_steps(
    model: Diffusion,
    plan: _Block,
    count: Int[Array, ""],
    carry: _Carry,
    keys: Key[Array, " n"],
    guidance: Float[Array, ""] | float,
    solver: str,
    eta: Float[Array, ""] | float,
) -> _Carry:
    """The first ``count`` steps of a block. Each writes over the state of its segment; the segment's last one stays."""

    def read(j: Int[Array, ""] | int) -> Any:
        return jax.tree.map(lambda leaf: leaf[j], (plan.with_label, plan.with_null))

    def one(j: Int[Array, ""], turn: tuple[_Carry, Any]) -> tuple[_Carry, Any]:
        (z_t, states, past), here = turn
        there = read(j + 1)
        z_s, past = solvers.advance(
            solver,
            z_t,
            plan.gamma[j + 1],
            plan.gamma[j],
            here=lambda z: guided_eps(model, z, *here, guidance),
            there=lambda z: guided_eps(model, z, *there, guidance),
            noise=lambda: step_noise(keys, plan.numbers[j], z_t.shape[1:]),
            eta=eta,
            past=past,
        )
        if states is not None:
            states = jax.lax.dynamic_update_index_in_dim(states, z_s, plan.slots[j], 0)
        # Handing on the next condition in the carry keeps XLA from fusing the lookup into the network's element-wise
        # loops, which doubled the time of a step on CPUs.
        return _Carry(z_s, states, past), there

    return jax.lax.fori_loop(0, count, one, (carry, read(0)))[0]


def step_noise(keys: Key[Array, " n"], i: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float[Array, "n *latent"]:
    """The noise of step i, by each example's own key; steps are numbered from 1."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def _condition(model: Diffusion, gamma: Float[Array, " b"], embedded: Float[Array, "m c"]) -> Any:
    """The conditions of every gamma with every label: leaves of b m rows, the labels of one gamma together."""
    m = embedded.shape[0]
    return model.condition(jnp.repeat(gamma, m), jnp.tile(embedded, (gamma.shape[0], 1)))


def _conditions(model: Diffusion, gamma: Float[Array, " b"], embedded: Float[Array, "m c"]) -> Any:
    """:func:`_condition` of a block of steps, with an axis for the steps in front of that for the labels."""
    flat = _condition(model, gamma, embedded)
    return jax.tree.map(lambda leaf: leaf.reshape(len(gamma), embedded.shape[0], *leaf.shape[1:]), flat)


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
