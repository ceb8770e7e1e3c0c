r"""Problems whose answer is known: data laws with an exact denoiser, usable wherever a :class:`bound.Diffusion` is.

The encoder is the identity and p(x | z_0) is the exact posterior, so the only gap of the bound is the prior's:

.. math:: E[\text{bound}] = H(x) + KL(q(z_1) \| N(0, I)).

The schedule is a parameter. Reference values are NumPy in float64.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from medvdm.models import likelihoods
from medvdm.theory import gaussian


class Identity:
    """What the exact problems share: identity encoder and decoder, a label that passes through."""

    timesteps: int

    def __init__(self, schedule, timesteps=0):
        self.schedule = schedule
        self.timesteps = timesteps

    def gamma(self, t):
        return self.schedule(t)

    def encode(self, x):
        return x

    def decode(self, z):
        return z

    def embed(self, labels, keep=None, *, n=1):
        """One number per example, the class mean; 0 for none."""
        if labels is None:
            return jnp.zeros((n, 1))
        return labels if keep is None else labels * keep[:, None]

    def condition(self, gamma, label):
        return gamma[:, None], label[:, :1]


class Isotropic(Identity):
    r"""x ~ N(y, s^2 I), with y the label (0 without): :math:`\hat\epsilon = \sigma (z - \alpha y) / (\alpha^2 s^2 +
    \sigma^2)`. The exact noise error is :func:`isotropic_mse` per dimension at every gamma."""

    def __init__(self, deviation, schedule, timesteps=0):
        super().__init__(schedule, timesteps)
        self.deviation = deviation

    def eps_hat(self, z, condition):
        gamma, mean = condition
        variance = gaussian.alpha(gamma) ** 2 * self.deviation**2 + gaussian.sigma2(gamma)
        return gaussian.sigma(gamma) * (z - gaussian.alpha(gamma) * mean) / variance

    def observation_loss(self, x, decoded):
        """-log N(x; shrunk z_0 / alpha_0, posterior variance), written out for the label-free problem."""
        r2 = jnp.exp(self.gamma(jnp.zeros(())))
        shrink = self.deviation**2 / (self.deviation**2 + r2)
        variance = shrink * r2
        per_dim = (x - shrink * decoded) ** 2 / variance + jnp.log(2 * math.pi * variance)
        return 0.5 * jnp.sum(per_dim, axis=-1)


class OnImages(Isotropic):
    """:class:`Isotropic` on images (n, h, w, c): encoding and z keep the image's shape."""

    def condition(self, gamma, label):
        return gamma[:, None, None, None], label[:, :1, None, None]

    def observation_loss(self, x, decoded):
        n = x.shape[0]
        return super().observation_loss(x.reshape(n, -1), decoded.reshape(n, -1))


class Mixture(Identity):
    r"""x ~ sum_k w_k N(m_k, C) with one full covariance C; the exact score through the responsibilities."""

    def __init__(self, weights, means, covariance, schedule, timesteps=0):
        super().__init__(schedule, timesteps)
        self.weights, self.means = np.asarray(weights, np.float32), np.asarray(means, np.float32)
        eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(covariance, np.float64))
        self.eigenvalues, self.basis = eigenvalues.astype(np.float32), eigenvectors.astype(np.float32)

    def _per_component(self, x, scale, added):
        """Rotated residuals (n, K, d), variances (n, 1, d), log w_k N(x; scale m_k, scale^2 C + added) (n, K)."""
        residual = (x[:, None, :] - scale[:, :, None] * self.means[None]) @ self.basis
        variance = scale[:, :, None] ** 2 * self.eigenvalues[None, None, :] + added[:, :, None]
        log_density = -0.5 * jnp.sum(residual**2 / variance + jnp.log(2 * math.pi * variance), axis=-1)
        return residual, variance, log_density + jnp.log(self.weights)[None, :]

    def log_density(self, x, added):
        """log of the density of x + N(0, added I); ``added`` is (n, 1) or (1, 1)."""
        return jax.nn.logsumexp(self._per_component(x, jnp.ones((1, 1)), added)[2], axis=-1)

    def eps_hat(self, z, condition):
        gamma, _ = condition
        residual, variance, log_weight = self._per_component(z, gaussian.alpha(gamma), gaussian.sigma2(gamma))
        share = jax.nn.softmax(log_weight, axis=-1)[:, :, None]
        return gaussian.sigma(gamma) * (jnp.sum(share * residual / variance, axis=1) @ self.basis.T)

    def observation_loss(self, x, decoded):
        """Bayes: log p(x | y) = log p(x) + log N(y; x, r^2 I) - log p(y), for y = z_0 / alpha_0."""
        r2 = jnp.exp(self.gamma(jnp.zeros((1, 1))))
        noise = -0.5 * jnp.sum((decoded - x) ** 2 / r2 + jnp.log(2 * math.pi * r2), axis=-1)
        return self.log_density(decoded, r2) - self.log_density(x, jnp.zeros((1, 1))) - noise

    def sample(self, rng, n):
        """n draws of x in float32, by a NumPy generator."""
        k = rng.choice(len(self.weights), size=n, p=self.weights / self.weights.sum())
        noise = rng.standard_normal((n, self.means.shape[1])) * np.sqrt(self.eigenvalues)
        return (self.means[k] + noise @ self.basis.T).astype(np.float32)


class Levels(Identity):
    r"""Independent 8-bit pixels (n, h, w, c), all with one law over the 256 gray values, its logarithms given.

    The denoiser is exact, by a direct sum, :math:`\hat x = \sum_k x_k\, p(x_k | z)`; p(x | z_0) is the 8-bit
    likelihood, for which all gray values are as likely. What that costs, and the prior, is :func:`levels_gaps`.
    """

    def __init__(self, log_law, schedule, timesteps=0):
        super().__init__(schedule, timesteps)
        self.log_law = np.asarray(log_law, np.float32)

    def encode(self, x):
        return likelihoods.level_values(x)

    def condition(self, gamma, label):
        return gamma[:, None, None, None]

    def eps_hat(self, z, condition):
        alpha, sigma = gaussian.alpha(condition), gaussian.sigma(condition)
        axes = (1,) * z.ndim + (256,)
        values, law = (np.reshape(a, axes) for a in (LEVELS.astype(np.float32), self.log_law))
        log_posterior = law - 0.5 * ((z[..., None] - alpha[..., None] * values) / sigma[..., None]) ** 2
        x_hat = jnp.sum(jax.nn.softmax(log_posterior, axis=-1) * values, axis=-1)
        return (z - alpha * x_hat) / sigma

    def observation_loss(self, x, decoded):
        return likelihoods.EIGHT_BIT.nll(x, decoded, self.gamma(jnp.zeros(())))

    def sample(self, rng, shape):
        """uint8 gray values of a shape, by a NumPy generator."""
        law = np.exp(self.log_law.astype(np.float64))
        return rng.choice(256, size=shape, p=law / law.sum()).astype(np.uint8)


LEVELS = 2.0 * np.arange(256) / 255 - 1.0


def gaussian_levels(mean, deviation):
    """Logarithms of the law of 256 gray values whose bell has this mean and deviation, on the scale of [-1, 1]."""
    exponents = -0.5 * ((LEVELS - mean) / deviation) ** 2
    return exponents - special.logsumexp(exponents)


def levels_entropy(log_law):
    return float(-np.sum(np.exp(log_law) * log_law))


def levels_gaps(log_law, gamma_0, gamma_1):
    r"""By how much the exact denoiser's bound lies above the entropy, nats per pixel, by quadrature: two gaps.

    Of the observation model, :math:`E_{z_0} KL(p(x|z_0) \| p_{equal}(x|z_0))`, which takes all levels as equally
    likely; and of the prior, :math:`KL(q(z_1) \| N(0, 1))`.
    """
    law = np.exp(log_law)
    eps, weights = np.polynomial.hermite_e.hermegauss(60)
    y = LEVELS[:, None] + math.exp(gamma_0 / 2) * eps  # z_0 / alpha_0, for each level
    log_noise = -0.5 * (y[..., None] - LEVELS) ** 2 * math.exp(-gamma_0)
    ratio = special.logsumexp(log_noise, axis=-1) - special.logsumexp(log_noise + log_law, axis=-1)
    observation = float(law @ ((ratio + log_law[:, None]) @ weights) / weights.sum())

    z = np.linspace(-14.0, 14.0, 4001)
    alpha, variance = 1 / math.sqrt(1 + math.exp(gamma_1)), 1 / (1 + math.exp(-gamma_1))
    parts = log_law - 0.5 * (z[:, None] - alpha * LEVELS) ** 2 / variance - 0.5 * math.log(variance)
    log_ratio = special.logsumexp(parts, axis=-1) + 0.5 * z**2  # the constant of the two densities falls out
    density = np.exp(log_ratio - 0.5 * z**2) / math.sqrt(2 * math.pi)
    return observation, float(np.trapezoid(density * log_ratio, z))


# Exact values for x ~ N(0, s^2), nats per dimension


def isotropic_mse(s, gamma):
    """E (eps - eps_hat)^2 = alpha^2 s^2 / (alpha^2 s^2 + sigma^2)."""
    return s**2 / (s**2 + np.exp(np.asarray(gamma, np.float64)))


def isotropic_diffusion(s, gamma_0, gamma_1):
    """The continuous diffusion loss, the same for every schedule between these ends."""
    return 0.5 * math.log((1 + s**2 * math.exp(-gamma_0)) / (1 + s**2 * math.exp(-gamma_1)))


def isotropic_discrete(s, gammas):
    """The discrete loss of a grid gamma(0), gamma(1/T), ..., gamma(1), by its exact sum."""
    gammas = np.asarray(gammas, np.float64)
    return 0.5 * float(np.sum(np.expm1(np.diff(gammas)) * isotropic_mse(s, gammas[1:])))


def isotropic_entropy(s):
    return 0.5 * math.log(2 * math.pi * math.e * s**2)


def isotropic_prior_gap(s, gamma_1):
    """KL(q(z_1) || N(0, 1)) of the *aggregate* q(z_1), which is Gaussian here."""
    v = (s**2 + math.exp(gamma_1)) / (1 + math.exp(gamma_1))
    return 0.5 * (v - 1 - math.log(v))


def isotropic_chain_variance(s, gammas, variance=1.0):
    """Variance of z_0 after ancestral sampling with the exact denoiser over a grid of gammas, from z_1's variance."""
    gammas = np.asarray(gammas, np.float64)
    alpha2, sigma2 = 1 / (1 + np.exp(gammas)), 1 / (1 + np.exp(-gammas))
    for t in range(len(gammas) - 1, 0, -1):
        a_ts2 = alpha2[t] / alpha2[t - 1]  # by the textbook form, not the library's
        v_ts = sigma2[t] - a_ts2 * sigma2[t - 1]
        x_per_z = np.sqrt(alpha2[t]) * s**2 / (alpha2[t] * s**2 + sigma2[t])
        gain = (np.sqrt(a_ts2) * sigma2[t - 1] + np.sqrt(alpha2[t - 1]) * v_ts * x_per_z) / sigma2[t]
        variance = gain**2 * variance + v_ts * sigma2[t - 1] / sigma2[t]
    return variance
