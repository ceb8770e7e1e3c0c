r"""Solvers: one step from t to s, by the noise that the model predicts, with noise of its own or without.

An ancestral step draws from :math:`q(z_s \mid z_t, x = \hat x)`. The marginals of its chain are, in the limit of many
steps, those of an ordinary differential equation as well, the *probability flow* (Song et al. 2021): with
:math:`y = z / \alpha` and :math:`\tau = \sigma / \alpha = e^{\gamma / 2}`, in which :math:`z_t / \alpha_t` is the image
with noise of deviation :math:`\tau` added,

.. math:: \frac{dy}{d\tau} = \hat\epsilon .

Its solutions bend little, so few large steps will do. Euler's step is DDIM (Song, Meng & Ermon 2021), and with
:math:`\eta` it adds noise, up to the ancestral step at :math:`\eta = 1`. There are two solvers of second order: Heun's,
which evaluates the network once more at the end of the step (Karras et al. 2022), and DPM-Solver++(2M), which keeps the
last :math:`\hat x` and goes along the line through the two (Lu et al. 2022).

.. math::
    \text{DDIM:} \quad & z_s = \frac{\alpha_s}{\alpha_t} \left(z_t + \sigma_t\,
        \mathrm{expm1}\!\left[\tfrac12 (\gamma_s - \gamma_t) + \tfrac12 \log(1 - \eta^2 c)\right] \hat\epsilon \right)
        + \eta\, \sigma_s \sqrt{c}\; \epsilon, \qquad c = -\mathrm{expm1}(\gamma_s - \gamma_t) \\
    \text{Heun:} \quad & \text{DDIM with the mean of } \hat\epsilon \text{ at } z_t
        \text{ and at DDIM's } z_s \\
    \text{2M:} \quad & z_s = \frac{\sigma_s}{\sigma_t} z_t - \alpha_s\, \mathrm{expm1}(-h) \left(\hat x_t +
        \frac{h}{2 h'} (\hat x_t - \hat x')\right), \qquad h = \tfrac12 (\gamma_t - \gamma_s)

with :math:`\hat x'` of the step before, which was :math:`h'` long; the first step has none and is DDIM's.

All but the ancestral step also run upwards, from an image to its :math:`z_1`. Where the times lie is a choice of its
own, a *grid*: a table of times at evenly spaced fractions of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from medvdm.theory import gaussian


class Solver(NamedTuple):
    """What there is to know of a solver beside its step."""

    order: int  #: p where the error falls as T^-p
    evaluations: int = 1  #: of the network, per step
    noise: bool = False  #: whether each of its steps draws noise; DDIM's do with an eta above 0 only


SOLVERS = {
    "ancestral": Solver(order=1, noise=True),
    "ddim": Solver(order=1),
    "heun": Solver(order=2, evaluations=2),
    "dpmpp": Solver(order=2),
}

GRIDS = ("time", "gamma", "error")  #: uniform in t, uniform in gamma, or dense where the image changes
KNOTS = 257  #: entries of a grid


class Past(NamedTuple):
    """What DPM-Solver++(2M) remembers of the step before."""

    x_hat: Float[Array, "n *latent"]
    gamma: Float[Array, ""]  #: at which it was; infinite before the first step


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


def ddim_step(
    z_t: Float[Array, "n *latent"],
    eps_hat: Float[Array, "n *latent"],
    gamma_s: Float[Array, ""],
    gamma_t: Float[Array, ""],
    noise: Float[Array, "n *latent"] | None = None,
    eta: Float[Array, ""] | float = 0.0,
) -> Float[Array, "n *latent"]:
    """DDIM's step, up or down; eta above 0, to 1, down only. It is exact where eps_hat is constant."""
    away = gaussian.sigma(gamma_t) * jnp.expm1(0.5 * (gamma_s - gamma_t))
    if noise is None:
        return gaussian.alpha_ratio(gamma_s, gamma_t) * (z_t + away * eps_hat)
    c = -jnp.expm1(gamma_s - gamma_t)
    away = gaussian.sigma(gamma_t) * jnp.expm1(0.5 * (gamma_s - gamma_t + jnp.log1p(-(eta**2) * c)))
    step = gaussian.alpha_ratio(gamma_s, gamma_t) * (z_t + away * eps_hat)
    return step + eta * gaussian.sigma(gamma_s) * jnp.sqrt(jnp.maximum(c, 0.0)) * noise


def dpmpp_step(
    z_t: Float[Array, "n *latent"],
    x_hat: Float[Array, "n *latent"],
    gamma_s: Float[Array, ""],
    gamma_t: Float[Array, ""],
    past: Past,
) -> Float[Array, "n *latent"]:
    """DPM-Solver++(2M)'s step, up or down; DDIM's where ``past.gamma`` is infinite."""
    ratio = (gamma_t - gamma_s) / (past.gamma - gamma_t)  # h / h'
    ahead = x_hat + 0.5 * ratio * (x_hat - past.x_hat)
    shrink = gaussian.sigma(gamma_s) / gaussian.sigma(gamma_t)
    return shrink * z_t - gaussian.alpha(gamma_s) * jnp.expm1(0.5 * (gamma_s - gamma_t)) * ahead


def first_past(solver: str, z: Float[Array, "n *latent"]) -> Past | None:
    """What a solver remembers before its first step; None of the solvers that remember nothing."""
    return Past(jnp.zeros_like(z), jnp.full((), jnp.inf)) if solver == "dpmpp" else None


def advance(
    solver: str,
    z_t: Float[Array, "n *latent"],
    gamma_s: Float[Array, ""],
    gamma_t: Float[Array, ""],
    *,
    here: Callable[[Array], Array],
    there: Callable[[Array], Array],
    noise: Callable[[], Array],
    eta: Float[Array, ""] | float,
    past: Past | None,
) -> tuple[Float[Array, "n *latent"], Past | None]:
    """One step of any solver, and what it remembers.

    Args:
        solver: one of :data:`SOLVERS`.
        z_t: the latent at t.
        gamma_s, gamma_t: where the step leads, and where it begins.
        here, there: the predicted noise in a latent at t, and at s.
        noise: draws the noise of the step.
        eta: of DDIM.
        past: of the step before, from this function or :func:`first_past`.
    """
    eps_hat = here(z_t)
    if solver == "ancestral":
        return ancestral_step(z_t, eps_hat, gamma_s, gamma_t, noise()), past
    if solver == "ddim":
        return ddim_step(z_t, eps_hat, gamma_s, gamma_t, noise(), eta), past
    if solver == "heun":
        guess = ddim_step(z_t, eps_hat, gamma_s, gamma_t)
        return ddim_step(z_t, 0.5 * (eps_hat + there(guess)), gamma_s, gamma_t), past
    x_hat = gaussian.x_from_eps(eps_hat, z_t, gamma_t)
    return dpmpp_step(z_t, x_hat, gamma_s, gamma_t, past), Past(x_hat, gamma_t)


# --- Grids --------------------------------------------------------------------------------------------------------


def time_at(fraction: Float[Array, "*b"], grid: Float[Array, " knots"] | None) -> Float[Array, "*b"]:
    """The time at a fraction of the way, 0 for the last step's end and 1 for the first one's start."""
    return fraction if grid is None else jnp.interp(fraction, jnp.linspace(0.0, 1.0, grid.shape[0]), grid)


def gamma_grid(gamma: Callable[[Array], Array]) -> Float[Array, " knots"]:
    """The grid that is uniform in gamma, of any rising schedule."""
    fine = jnp.linspace(0.0, 1.0, 16 * (KNOTS - 1) + 1)
    values = gamma(fine)
    return jnp.interp(jnp.linspace(values[0], values[-1], KNOTS), values, fine)


def error_grid(gamma: Callable[[Array], Array], z: Float[Array, "k n *latent"]) -> Float[Array, " knots"]:
    r"""The grid on which the steps of DDIM err alike, as measured on a few chains.

    A step of DDIM that is h long in :math:`\lambda = -\gamma / 2` errs by
    :math:`\tfrac12 h^2 \left| d\hat x / d\lambda \right|`, in units of the image. Of all ways to place a given number
    of steps, the sum of that is least where their density in :math:`\lambda` goes with the root of
    :math:`|d \hat x / d\lambda|`, here the root mean square over the chains.

    Args:
        gamma: the schedule.
        z: the states of DDIM's chain on :func:`gamma_grid`, from z_1 to z_0, the start included.
    """
    times = time_at(jnp.linspace(1.0, 0.0, z.shape[0]), gamma_grid(gamma))
    at = gamma(times)
    y, tau = z / gaussian.align(gaussian.alpha(at), z), gaussian.align(jnp.exp(0.5 * at), z)
    eps_hat = (y[1:] - y[:-1]) / (tau[1:] - tau[:-1])  # DDIM's step, solved for it
    x_hat = y[:-1] - tau[:-1] * eps_hat
    change = jnp.sqrt(jnp.mean((x_hat[1:] - x_hat[:-1]) ** 2, axis=tuple(range(1, z.ndim))))
    density = jnp.sqrt(change)
    # The changes lie at the states 1, 2, ...; the ends have their neighbours' density, and none has less than a tenth
    # of the mean, so that no stretch that a few chains left unchanged is one step.
    density = jnp.concatenate([density[:1], density, density[-1:]])
    density = jnp.maximum(density, 0.1 * jnp.mean(density))
    steps = 0.5 * (density[1:] + density[:-1]) * (at[:-1] - at[1:])
    done = jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)]) / jnp.sum(steps)
    return jnp.clip(jnp.interp(1.0 - jnp.linspace(0.0, 1.0, KNOTS), done, times), 0.0, 1.0)
