r"""The variational bound, in the paper's order: reconstruction, prior, diffusion.

For an image x with encoding f, and q(z_t | x) = N(alpha_t f, sigma_t^2 I),

.. math::
    -\log p(x) \le
        \underbrace{E_{q(z_0|x)}[-\log p(x \mid z_0)]}_{\text{reconstruction}}
      + \underbrace{KL(q(z_1 \mid x) \,\|\, N(0, I))}_{\text{prior (the paper's latent loss)}}
      + \underbrace{L_{diffusion}}_{\text{below}} .

With T steps, i uniform on 1..T, t = i/T and s = (i - 1)/T,

.. math:: L_T = \frac{T}{2} E_{i, \epsilon}\left[ (e^{\gamma_t - \gamma_s} - 1) \|\epsilon - \hat\epsilon\|^2 \right]

and in continuous time (the limit, reached from above)

.. math:: L_\infty = \frac12 E_{t, \epsilon}\left[ \gamma'(t) \|\epsilon - \hat\epsilon\|^2 \right].

Everything here is in nats per image, one value per image; :func:`bits_per_dim` converts where a number is reported.
Source: Kingma et al., *Variational Diffusion Models* (2021), equations 11 to 18.

A model is anything with the methods of :class:`Diffusion`; :class:`medvdm.models.vdm.VDM` is one, the tests' exact
Gaussian denoisers are others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Num, PRNGKeyArray

from medvdm.errors import InputError
from medvdm.theory import gaussian
from medvdm.theory.schedules import with_slope


@runtime_checkable
class Diffusion(Protocol):
    """What the bound and the samplers ask of a model.

    An encoding, and with it z, has any shape after its first axis: ``(n, d)`` for a vector, ``(n, h, w, c)`` for a
    diffusion on pixels.

    The noise prediction comes in two parts. ``condition`` is all that depends on time and label only: a pytree whose
    leaves have a leading axis m, which is n, or 1 where all examples share them. ``eps_hat`` is the rest.
    """

    timesteps: int  #: T of the discrete bound; 0 means continuous time

    def gamma(self, t: Float[Array, "..."]) -> Float[Array, "..."]: ...
    def encode(self, x: Num[Array, "n *shape"]) -> Float[Array, "n *latent"]: ...
    def embed(
        self, labels: Float[Array, "n k"] | None, keep: Float[Array, " n"] | None = None, *, n: int = 1
    ) -> Float[Array, "n c"]: ...
    def condition(self, gamma: Float[Array, " m"], label: Float[Array, "m c"]) -> Any: ...
    def eps_hat(self, z: Float[Array, "n *latent"], condition: Any) -> Float[Array, "n *latent"]: ...
    def decode(self, z: Float[Array, "n *latent"]) -> Float[Array, "n *shape"]: ...
    def observation_loss(self, x: Num[Array, "n *shape"], decoded: Float[Array, "n *shape"]) -> Float[Array, " n"]: ...


class Probe(NamedTuple):
    r"""Small changes of each image's :math:`\gamma(t)` and :math:`\gamma'(t)`, to differentiate by, at 0."""

    gamma: Float[Array, " n"]
    slope: Float[Array, " n"]


class Bound(NamedTuple):
    """The terms of the bound in nats, one value per image, plus the gradient-difference term and the times.

    ``gradient_difference`` is no part of the bound: :attr:`total` leaves it out. ``times`` are the t at which the
    diffusion loss of each image was estimated.
    """

    reconstruction: Float[Array, "*n"]
    prior: Float[Array, "*n"]
    diffusion: Float[Array, "*n"]
    gradient_difference: Float[Array, "*n"]
    times: Float[Array, "*n"]

    @property
    def total(self) -> Float[Array, "*n"]:
        """The negative bound itself, reconstruction + prior + diffusion."""
        return self.reconstruction + self.prior + self.diffusion


def bits_per_dim(nats_per_image: ArrayLike, image_shape: tuple[int, ...]) -> Any:
    """Nats per image to bits per dimension (per pixel and channel): divide by ln 2 and by the number of pixels."""
    return nats_per_image / (math.log(2.0) * math.prod(image_shape))


def nats_per_image(bits_per_dim: ArrayLike, image_shape: tuple[int, ...]) -> Any:
    """Bits per dimension to nats per image: the inverse of :func:`bits_per_dim`."""
    return bits_per_dim * (math.log(2.0) * math.prod(image_shape))


def sample_times(key: PRNGKeyArray, n: int, *, stratified: bool = True) -> Float[Array, " n"]:
    r"""n times in [0, 1), each uniform on its own.

    Stratified (the paper's 'antithetic') times share one offset u: :math:`t_i = (u + i/n) \bmod 1`. One falls in every
    n-th of the interval, so the mean over the batch varies less; there are exactly n of them.
    """
    if not stratified:
        return jax.random.uniform(key, (n,))
    return jnp.mod(jax.random.uniform(key, ()) + jnp.arange(n, dtype=jnp.float32) / n, 1.0)


def spread_times(key: PRNGKeyArray, n: int, draws: int) -> Float[Array, "draws n"]:
    r"""Times for several draws per image, one in each D-th of the interval: :math:`t_{di} = (d + v_i) / D`.

    The :math:`v_i` are those of :func:`sample_times`, so all nD times together are evenly spread too. The mean over
    the draws of an image is unbiased, and varies less than with times that know nothing of each other; a single draw
    sees a D-th of the interval only.
    """
    return (jnp.arange(draws, dtype=jnp.float32)[:, None] + sample_times(key, n)[None]) / draws


def step_index(u: Float[Array, " n"], timesteps: int) -> Int[Array, " n"]:
    """Map u in [0, 1) to a step i in 1..T, so that t = i/T is never 0 and s = (i - 1)/T never negative."""
    return jnp.minimum(jnp.floor(u * timesteps).astype(jnp.int32), timesteps - 1) + 1


def per_image(values: Float[Array, "n *latent"]) -> Float[Array, " n"]:
    """Sum over all axes but the first."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def decode_z0(model: Diffusion, f: Float[Array, "n *latent"], key: PRNGKeyArray | None) -> Float[Array, "n *shape"]:
    r"""Decode a draw :math:`z_0 \sim q(z_0 | x)`, rescaled to :math:`z_0 / \alpha_0`; without a key, its mean f."""
    if key is None:
        return model.decode(f)
    return decode_at(model, f, jax.random.normal(key, f.shape))


def decode_at(
    model: Diffusion, f: Float[Array, "n *latent"], eps: Float[Array, "n *latent"]
) -> Float[Array, "n *shape"]:
    r"""Decode :math:`z_0 / \alpha_0 = f + e^{\gamma_0 / 2} \epsilon`, z_0 with noise that is given.

    The decoder sees the encoding's own scale at every gamma_0.
    """
    return model.decode(f + jnp.exp(0.5 * model.gamma(jnp.zeros(()))) * eps)


def reconstruction_loss(
    model: Diffusion, x: Num[Array, "n *shape"], f: Float[Array, "n *latent"], key: PRNGKeyArray
) -> Float[Array, " n"]:
    r""":math:`E_{q(z_0|x)}[-\log p(x|z_0)]` by one draw of z_0; nats per image."""
    return model.observation_loss(x, decode_z0(model, f, key))


def prior_loss(model: Diffusion, f: Float[Array, "n *latent"]) -> Float[Array, " n"]:
    r""":math:`KL(q(z_1|x) \| N(0, I)) = \frac12 \sum (\sigma_1^2 + \alpha_1^2 f^2 - 1 - \log \sigma_1^2)`; nats."""
    return per_image(_prior_parts(model, f))


def _prior_parts(model: Diffusion, f: Float[Array, "n *latent"]) -> Float[Array, "n *latent"]:
    """What each dimension adds to :func:`prior_loss`."""
    gamma_1 = model.gamma(jnp.ones(()))
    # sigma^2 - 1 = -sigmoid(-gamma) and -log sigma^2 = softplus(-gamma): two small numbers where gamma_1 is large,
    # whose difference keeps its digits.
    of_noise = jax.nn.softplus(-gamma_1) - jax.nn.sigmoid(-gamma_1)
    return 0.5 * ((gaussian.alpha(gamma_1) * f) ** 2 + of_noise)


def diffusion_loss(
    model: Diffusion,
    f: Float[Array, "n *latent"],
    label: Float[Array, "n c"],
    u: Float[Array, " n"],
    key: PRNGKeyArray,
    probe: Probe | None = None,
) -> Float[Array, " n"]:
    """L_T or, with ``model.timesteps == 0``, L_infinity by one time and one draw of z_t per image; nats.

    Raises InputError where ``model.eps_hat`` has another shape than z.

    Args:
        f: encodings.
        label: embedded labels, from ``model.embed``.
        u: uniform numbers in [0, 1), as from :func:`sample_times`: the time itself, or what picks the step.
        key: for the noise.
        probe: added to gamma and its slope (continuous time only).
    """
    weight, errors = _noise_errors(model, f, label, u, key, probe)
    return 0.5 * weight * per_image(errors)


def _noise_errors(
    model: Diffusion,
    f: Float[Array, "n *latent"],
    label: Float[Array, "n c"],
    u: Float[Array, " n"],
    key: PRNGKeyArray,
    probe: Probe | None,
) -> tuple[Float[Array, " n"], Float[Array, "n *latent"]]:
    """The weight of each image's time, and the squared error of the predicted noise in each dimension."""
    if model.timesteps:
        i = step_index(u, model.timesteps)
        gamma_t = model.gamma(i / model.timesteps)
        gamma_s = model.gamma((i - 1) / model.timesteps)
        weight = model.timesteps * jnp.expm1(gamma_t - gamma_s)
    else:
        gamma_t, weight = with_slope(model.gamma, u)
        if probe is not None:
            gamma_t, weight = gamma_t + probe.gamma, weight + probe.slope
    eps = jax.random.normal(key, f.shape)
    z_t = gaussian.diffuse(f, eps, gaussian.align(gamma_t, f))
    eps_hat = model.eps_hat(z_t, model.condition(gamma_t, label))
    if eps_hat.shape != z_t.shape:  # the difference below would be broadcast
        raise InputError(f"eps_hat: shape {eps_hat.shape}; expected that of z, {z_t.shape}")
    return weight, (eps - eps_hat) ** 2


def gradient_difference(x: Float[Array, "n h w c"], x_hat: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    r"""The paper's 'differential loss': squared difference of image gradients, summed over pixels (unit: gray^2).

    .. math:: \sum (\partial_h x - \partial_h \hat x)^2 + \sum (\partial_w x - \partial_w \hat x)^2

    with forward differences. Source: Mathieu et al. (2016), whose exponent is a setting; 2 here. It is no part of the
    bound; its weight in training is a setting and 0 by default.
    """
    error = x - x_hat
    return per_image(jnp.diff(error, axis=1) ** 2) + per_image(jnp.diff(error, axis=2) ** 2)


def terms(
    model: Diffusion,
    x: Num[Array, "n *shape"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    keep: Float[Array, " n"] | None = None,
    stratified: bool = True,
    times: Float[Array, " n"] | None = None,
    with_gradient_difference: bool = False,
    probe: Probe | None = None,
) -> Bound:
    """One unbiased estimate of each term for each image, in nats.

    Args:
        model: encodes, predicts noise and decodes.
        x: images, as the model takes them.
        labels: multi-hot; None for an unconditional bound.
        key: split once: z_0's noise, the times, z_t's noise.
        keep: 0 where the null replaces the label (label dropout); all kept if None.
        stratified: see :func:`sample_times`.
        times: in [0, 1), instead of drawn ones; see :func:`spread_times`.
        with_gradient_difference: also compute that term from the same reconstruction (it is 0 otherwise); the model's
            ``picture`` makes gray values of what it has decoded.
        probe: see :func:`diffusion_loss`.
    """
    key_z0, key_times, key_zt = jax.random.split(key, 3)
    n = x.shape[0]
    u = sample_times(key_times, n, stratified=stratified) if times is None else times
    f = model.encode(x)
    decoded = decode_z0(model, f, key_z0)
    difference = gradient_difference(x, model.picture(decoded)) if with_gradient_difference else jnp.zeros(n)
    return Bound(
        reconstruction=model.observation_loss(x, decoded),
        prior=prior_loss(model, f),
        diffusion=diffusion_loss(model, f, model.embed(labels, keep, n=n), u, key_zt, probe),
        gradient_difference=difference,
        times=_used_times(model, u),
    )


def _used_times(model: Diffusion, u: Float[Array, " n"]) -> Float[Array, " n"]:
    return step_index(u, model.timesteps) / model.timesteps if model.timesteps else u


def pixel_terms(
    model: Diffusion,
    x: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    times: Float[Array, " n"],
) -> Bound:
    """:func:`terms` of a diffusion on pixels, value by value: each sums to that of the image with the same key.

    What a value of the image costs depends on all others: this is where the bound spends its nats, by one time and one
    draw of noise per image, and no probability of a pixel.

    Args:
        model: one whose encoding has the shape of the image, with a likelihood that is independent over the values.
        x, labels, key, times: as of :func:`terms`.

    Returns:
        ``reconstruction``, ``prior`` and ``diffusion`` of shape (n, h, w, c), in nats; none of them is negative.
    """
    key_z0, _, key_zt = jax.random.split(key, 3)
    f = model.encode(x)
    each = (x.size, 1, 1, 1)  # every value as an image of its own
    decoded = decode_z0(model, f, key_z0)
    weight, errors = _noise_errors(model, f, model.embed(labels, n=x.shape[0]), times, key_zt, None)
    return Bound(
        reconstruction=model.observation_loss(x.reshape(each), decoded.reshape(each)).reshape(x.shape),
        prior=_prior_parts(model, f),
        diffusion=0.5 * gaussian.align(weight, f) * errors,
        gradient_difference=jnp.zeros(x.shape),
        times=_used_times(model, times),
    )
