r"""The Gaussian diffusion as pure functions of :math:`\gamma`.

Everything that the model needs to know about noise is one number, the negative log signal-to-noise ratio

.. math:: \gamma = -\log \mathrm{SNR} = \log(\sigma^2 / \alpha^2),

which *rises* with time. The process is variance preserving, so

.. math::
    \alpha^2 = \mathrm{sigmoid}(-\gamma), \qquad \sigma^2 = \mathrm{sigmoid}(\gamma), \qquad \alpha^2 + \sigma^2 = 1.

With :math:`s < t` two times, :math:`x` the clean signal and :math:`\epsilon` standard normal noise:

.. math::
    q(z_t \mid x) &= N(\alpha_t x,\ \sigma_t^2 I) \\
    q(z_t \mid z_s) &= N(\alpha_{t|s} z_s,\ \sigma_{t|s}^2 I), \quad
        \alpha_{t|s} = \alpha_t / \alpha_s, \quad \sigma_{t|s}^2 = \sigma_t^2 - \alpha_{t|s}^2 \sigma_s^2 \\
    q(z_s \mid z_t, x) &= N(\mu, \tilde\sigma^2 I), \quad
        \mu = \tfrac{\alpha_{t|s} \sigma_s^2}{\sigma_t^2} z_t + \tfrac{\alpha_s \sigma_{t|s}^2}{\sigma_t^2} x, \quad
        \tilde\sigma^2 = \tfrac{\sigma_{t|s}^2 \sigma_s^2}{\sigma_t^2}

Source: Kingma et al., *Variational Diffusion Models* (2021), section 3.1 and appendix A. All functions work
elementwise and broadcast; each stays in :math:`\gamma` (sigmoid, softplus, expm1), because forming the SNR and
subtracting loses every digit at its ends. Not to be confused with code bases where gamma is +log SNR.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Normal(NamedTuple):
    """Mean and variance of an isotropic Gaussian."""

    mean: Float[Array, "..."]
    variance: Float[Array, "..."]


def alpha(gamma: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Signal coefficient :math:`\alpha = \sqrt{\mathrm{sigmoid}(-\gamma)}`, dimensionless, in (0, 1)."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma))


def sigma(gamma: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Noise coefficient :math:`\sigma = \sqrt{\mathrm{sigmoid}(\gamma)}`, dimensionless, in (0, 1)."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(gamma))


def sigma2(gamma: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Noise variance :math:`\sigma^2 = \mathrm{sigmoid}(\gamma)`."""
    return jax.nn.sigmoid(gamma)


def snr(gamma: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Signal-to-noise ratio :math:`\alpha^2 / \sigma^2 = e^{-\gamma}`: falls with time. For display only."""
    return jnp.exp(-gamma)


def align(values: Float[Array, " m"], z: Float[Array, "n *latent"]) -> Float[Array, "m *ones"]:
    """One value per example, (m,), with an axis of 1 for every further axis of z, so that the two broadcast."""
    return values.reshape(values.shape + (1,) * (z.ndim - 1))


def diffuse(
    x: Float[Array, "*shape"], eps: Float[Array, "*shape"], gamma_t: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    r"""A draw from :math:`q(z_t \mid x)`: :math:`z_t = \alpha_t x + \sigma_t \epsilon`. ``gamma_t`` broadcasts to x."""
    return alpha(gamma_t) * x + sigma(gamma_t) * eps


def marginal(x: Float[Array, "..."], gamma_t: Float[Array, "..."]) -> Normal:
    r""":math:`q(z_t \mid x)` as mean and variance."""
    return Normal(alpha(gamma_t) * x, sigma2(gamma_t))


def transition(z_s: Float[Array, "..."], gamma_s: Float[Array, "..."], gamma_t: Float[Array, "..."]) -> Normal:
    r""":math:`q(z_t \mid z_s)` for :math:`s < t`, as mean and variance.

    The variance is :math:`\sigma_{t|s}^2 = -\sigma_t^2\, \mathrm{expm1}(\gamma_s - \gamma_t)`, which keeps its digits
    also where the two gammas are close and :math:`\sigma_t^2 - \alpha_{t|s}^2 \sigma_s^2` would cancel.
    """
    return Normal(z_s / alpha_ratio(gamma_s, gamma_t), -sigma2(gamma_t) * jnp.expm1(gamma_s - gamma_t))


def posterior(
    x: Float[Array, "..."],
    z_t: Float[Array, "..."],
    gamma_s: Float[Array, "..."],
    gamma_t: Float[Array, "..."],
) -> Normal:
    r""":math:`q(z_s \mid z_t, x)` for :math:`s < t`, as mean and variance, by Bayes' rule.

    With :math:`c = -\mathrm{expm1}(\gamma_s - \gamma_t) = \sigma_{t|s}^2 / \sigma_t^2 \in (0, 1)`:

    .. math:: \mu = (1 - c) \frac{\alpha_s}{\alpha_t} z_t + c\, \alpha_s x, \qquad \tilde\sigma^2 = \sigma_s^2 c.

    It is :math:`\mu = \alpha_{t|s} \sigma_s^2 / \sigma_t^2\, z_t + \alpha_s \sigma_{t|s}^2 / \sigma_t^2\, x`, since
    :math:`1 - c = e^{\gamma_s - \gamma_t} = \sigma_s^2 \alpha_t^2 / (\sigma_t^2 \alpha_s^2)`.
    """
    c = -jnp.expm1(gamma_s - gamma_t)
    # 1 - c as an exponential: where the gammas are far apart c rounds to 1, and the product with the ratio counts.
    mean = jnp.exp(gamma_s - gamma_t) * alpha_ratio(gamma_s, gamma_t) * z_t + c * alpha(gamma_s) * x
    return Normal(mean, sigma2(gamma_s) * c)


def posterior_from_eps(
    eps_hat: Float[Array, "..."],
    z_t: Float[Array, "..."],
    gamma_s: Float[Array, "..."],
    gamma_t: Float[Array, "..."],
) -> Normal:
    r""":math:`q(z_s \mid z_t, x = \hat x)` written in the predicted noise, as the sampler uses it.

    .. math:: \mu = \frac{\alpha_s}{\alpha_t} (z_t - c\, \sigma_t \hat\epsilon), \qquad \tilde\sigma^2 = \sigma_s^2 c.

    It never divides by a small :math:`\alpha_t` twice, so it is the stable form (Kingma et al. 2021, eq. 34).
    """
    c = -jnp.expm1(gamma_s - gamma_t)
    mean = alpha_ratio(gamma_s, gamma_t) * (z_t - c * sigma(gamma_t) * eps_hat)
    return Normal(mean, sigma2(gamma_s) * c)


def alpha_ratio(gamma_s: Float[Array, "..."], gamma_t: Float[Array, "..."]) -> Float[Array, "..."]:
    r""":math:`\alpha_s / \alpha_t`, at least 1, without forming either."""
    return jnp.exp(0.5 * (jax.nn.softplus(gamma_t) - jax.nn.softplus(gamma_s)))


# One network, three read-outs. Each pair below is the same statement z_t = alpha_t x + sigma_t eps, solved for
# another unknown; v = alpha_t eps - sigma_t x (Salimans & Ho, 2022) is the direction orthogonal to z_t.


def x_from_eps(
    eps_hat: Float[Array, "..."], z_t: Float[Array, "..."], gamma_t: Float[Array, "..."]
) -> Float[Array, "..."]:
    r""":math:`\hat x = (z_t - \sigma_t \hat\epsilon) / \alpha_t`."""
    return (z_t - sigma(gamma_t) * eps_hat) / alpha(gamma_t)


def eps_from_x(
    x_hat: Float[Array, "..."], z_t: Float[Array, "..."], gamma_t: Float[Array, "..."]
) -> Float[Array, "..."]:
    r""":math:`\hat\epsilon = (z_t - \alpha_t \hat x) / \sigma_t`."""
    return (z_t - alpha(gamma_t) * x_hat) / sigma(gamma_t)


def v_from_eps(
    eps_hat: Float[Array, "..."], z_t: Float[Array, "..."], gamma_t: Float[Array, "..."]
) -> Float[Array, "..."]:
    r""":math:`\hat v = \alpha_t \hat\epsilon - \sigma_t \hat x = (\hat\epsilon - \sigma_t z_t) / \alpha_t`."""
    return (eps_hat - sigma(gamma_t) * z_t) / alpha(gamma_t)


def eps_from_v(
    v_hat: Float[Array, "..."], z_t: Float[Array, "..."], gamma_t: Float[Array, "..."]
) -> Float[Array, "..."]:
    r""":math:`\hat\epsilon = \alpha_t \hat v + \sigma_t z_t`."""
    return alpha(gamma_t) * v_hat + sigma(gamma_t) * z_t


def x_from_v(v_hat: Float[Array, "..."], z_t: Float[Array, "..."], gamma_t: Float[Array, "..."]) -> Float[Array, "..."]:
    r""":math:`\hat x = \alpha_t z_t - \sigma_t \hat v`."""
    return alpha(gamma_t) * z_t - sigma(gamma_t) * v_hat
