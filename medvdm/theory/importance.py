r"""Importance-weighted bounds: several draws of a whole chain, and less slack than the mean of one each.

For a path :math:`z_0, \dots, z_1` of T steps drawn from the forward process given the image, the weight

.. math::
    w = \frac{p(x | z_0)\, p(z_1)}{q(z_1 | x)} \prod_{t} \frac{p(z_s | z_t)}{q(z_s | z_t, x)}

has :math:`E[w] = p(x)`, the probability of x under ancestral sampling with T steps. So with K independent paths
(Burda, Grosse & Salakhutdinov 2016)

.. math:: -\log p(x) \le E\left[-\log \frac1K \sum_k w_k\right],

which is the bound with T steps for K = 1, never rises with K, and tends to :math:`-\log p(x)`.

With :math:`\epsilon_t` the noise in z_t, a step of the path and its part of log w are

.. math::
    \epsilon_s = e^{(\gamma_s - \gamma_t) / 2} \epsilon_t + \sqrt{c}\, \xi, \qquad
    \log \frac{p(z_s | z_t)}{q(z_s | z_t, x)} = \xi \cdot \delta - \tfrac12 \|\delta\|^2, \qquad
    \delta = \sqrt{\mathrm{expm1}(\gamma_t - \gamma_s)}\, (\epsilon_t - \hat\epsilon),

with :math:`\xi` standard normal and :math:`c = -\mathrm{expm1}(\gamma_s - \gamma_t)`. The mean of
:math:`\|\delta\|^2 / 2`, summed over the steps, is :math:`L_T`. For an exact denoiser and many steps the weight is the
same on every path, p(x): its spread is that of what a model gets wrong.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from medvdm.errors import InputError
from medvdm.theory import gaussian
from medvdm.theory.bound import Diffusion, decode_at, per_image


def chain_log_weight(
    model: Diffusion,
    x: Num[Array, "n *shape"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    steps: Int[Array, ""] | int,
) -> Float[Array, " n"]:
    """One draw of log w for each image, in nats, by one path and one evaluation of the network a step.

    Args:
        model: encodes, predicts noise and decodes.
        x: images, as the model takes them.
        labels: multi-hot; None for no label.
        key: folded with the number of the step; 0 is for the noise in z_1.
        steps: T.
    """
    f, label = model.encode(x), model.embed(labels, n=len(x))
    steps = jnp.asarray(steps, jnp.int32)
    gamma_at = lambda i: model.gamma(i.astype(jnp.float32) / steps.astype(jnp.float32))  # noqa: E731
    gamma_1 = model.gamma(jnp.ones(()))
    eps_1 = jax.random.normal(jax.random.fold_in(key, 0), f.shape)
    z_1 = gaussian.diffuse(f, eps_1, gamma_1)
    prior = 0.5 * per_image(eps_1**2 - z_1**2 + jax.nn.log_sigmoid(gamma_1))

    def step(done: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        eps, log_w = carry
        i = steps - done
        gamma_t, gamma_s = gamma_at(i), gamma_at(i - 1)
        condition = model.condition(jnp.full(label.shape[0], gamma_t), label)
        eps_hat = model.eps_hat(gaussian.diffuse(f, eps, gamma_t), condition)
        delta = jnp.sqrt(jnp.expm1(gamma_t - gamma_s)) * (eps - eps_hat)
        xi = jax.random.normal(jax.random.fold_in(key, i), f.shape)
        # In the noise itself: from z_s it would have to be found again as a difference over a small sigma.
        eps = jnp.exp(0.5 * (gamma_s - gamma_t)) * eps + jnp.sqrt(-jnp.expm1(gamma_s - gamma_t)) * xi
        return eps, log_w + per_image(xi * delta - 0.5 * delta**2)

    eps_0, log_w = jax.lax.fori_loop(0, steps, step, (eps_1, prior))
    return log_w - model.observation_loss(x, decode_at(model, f, eps_0))


def bound_of(log_weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    r"""The importance-weighted bound :math:`-\log \frac1K \sum_k w_k` of each image, and its standard error; nats.

    The S draws make as many groups of K as they can. The error is that of the mean over the groups, NaN for one.

    Args:
        log_weights: (S, n) from independent draws.
        k: K.

    Raises:
        InputError: a K below 1, or more than the draws.
    """
    log_weights = np.asarray(log_weights, np.float64)
    draws, n = log_weights.shape
    if not 1 <= k <= draws:
        raise InputError(f"k: {k}; expected 1 to {draws}, the number of draws")
    groups = draws // k
    from_groups = math.log(k) - np.logaddexp.reduce(log_weights[: groups * k].reshape(groups, k, n), axis=1)
    stderr = np.full(n, math.nan) if groups < 2 else from_groups.std(axis=0, ddof=1) / math.sqrt(groups)
    return from_groups.mean(axis=0), stderr
