r"""The exact density of z_0 under the probability flow, and with it a likelihood of x without sampling a chain.

The noise that a model predicts says what the score is, :math:`\nabla \log p_t(z) = -\hat\epsilon / \sigma_t`, and the
marginals of the process are also those of an ordinary differential equation, the probability flow (Song et al. 2021):
:math:`y = z / \alpha` follows :math:`dy / d\tau = \hat\epsilon` with :math:`\tau = \sigma / \alpha = e^{\gamma / 2}`.
As :math:`d \log \alpha / d\gamma = -\sigma^2 / 2`, that is in z

.. math:: \frac{dz}{d\gamma} = \frac{\sigma}{2} \left(\hat\epsilon(z, \gamma) - \sigma z\right).

A density that is carried along changes by the divergence, so from z_0 up to z_1

.. math::
    \log p(z_0) = \log N(z_1; 0, I) + \int_{\gamma_0}^{\gamma_1} \frac{\sigma}{2}
        \left(\mathrm{tr} \frac{\partial \hat\epsilon}{\partial z} - \sigma D\right) d\gamma .

It is integrated in :math:`\gamma`, not in t: the schedule between its ends falls out, and the least noise is no harder
than the rest. For an exact denoiser :math:`\partial \hat\epsilon / \partial z` is at most :math:`1 / \sigma` in every
direction, so that two solutions part no faster than :math:`e^{\gamma / 2}`, at whatever noise. In t the rate would have
the factor :math:`\gamma'(t)`.

Images are no z_0. The *dequantisation* that belongs to this model is its own encoder, :math:`q(z_0 | x)`:

.. math::
    -\log p(x) \le E_{q(z_0|x)}\left[-\log p(x | z_0) - \log p(z_0) + \log q(z_0 | x)\right]

by Jensen's inequality for :math:`p(x) = \int p(x | z_0) p(z_0) dz_0`, the law of a sampler that follows the flow from
:math:`z_1 \sim N(0, I)` down to z_0 and then decodes. The chain's part of the bound is gone. What is left of it is
:math:`KL(q(z_0|x) \| p(z_0|x))`. The usual alternative adds uniform noise of one gray value
(:func:`uniform_log_weight`).

The law of the flow and that of the ancestral chain are two laws. They agree for an exact denoiser only, so a likelihood
by the one may lie on either side of one by the other, and neither is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from medvdm.errors import InputError, nearest
from medvdm.theory import gaussian
from medvdm.theory.bound import Diffusion, decode_at, per_image

DIVERGENCES = ("auto", "exact", "rademacher", "gaussian")
MOST_EXACT = 128  #: numbers in z up to which 'auto' is exact
COLUMNS = 64  #: of the Jacobian, computed at once
FIRST_STEP = 0.1  #: in gamma; the next ones find their own size
LARGEST_STEP = 1.0  #: in gamma, in which a denoiser changes: of much longer steps the error would be misjudged


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How the flow is integrated.

    Raises:
        InputError: an unknown divergence, fewer than one probe or step, or a tolerance that is not above 0.
    """

    divergence: str = "auto"
    """``exact``: all D columns of the Jacobian. ``rademacher``, ``gaussian``: Hutchinson's estimate by probes with
    entries of +-1, or normal ones. ``auto``: exact for z of up to 128 numbers, Rademacher's above."""
    probes: int = 4
    """Of an estimated divergence, each kept for the whole way, so that each gives an unbiased log p(z_0)."""
    rtol: float = 1e-4
    """Relative tolerance of a step: of z, root mean square over its numbers, and of log p in nats per dimension."""
    atol: float = 1e-4
    """Absolute tolerance of the same."""
    max_steps: int = 1000
    """Steps after which the integration gives up, those that were tried and rejected included."""

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise InputError(f"divergence: '{self.divergence}'; {nearest(self.divergence, DIVERGENCES)}")
        for name, least in (("probes", 1), ("max_steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name}: {value}; expected at least {least}")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"{name}: {value}; expected a number above 0")

    def kind(self, dimensions: int) -> str:
        """The kind of divergence for z of this many numbers, ``auto`` resolved."""
        if self.divergence != "auto":
            return self.divergence
        return "exact" if dimensions <= MOST_EXACT else "rademacher"


DEFAULTS = FlowConfig()


class Flow(NamedTuple):
    """A way from z_0 to z_1.

    ``log_density`` is log p(z_0) in nats, one estimate per probe, or one row for an exact divergence; ``z_1`` is where
    the flow ends. ``evaluations`` of the network are counted for each image, those of rejected steps included; each
    brings the products with the probes, or with all columns. ``finished`` says whether the integration came to its end.
    """

    log_density: Float[Array, "k n"]
    z_1: Float[Array, "n *latent"]
    evaluations: Int[Array, ""]
    finished: Bool[Array, ""]


class Weight(NamedTuple):
    """One draw of a log weight, whose mean over draws is a lower bound of log p(x).

    Attributes:
        log_weight: in nats, the mean over the probes.
        probe_variance: the variance of that mean, by the spread of the probes; 0 for an exact divergence, NaN for one
            probe.
        evaluations, finished: of the :class:`Flow`.
    """

    log_weight: Float[Array, " n"]
    probe_variance: Float[Array, " n"]
    evaluations: Int[Array, ""]
    finished: Bool[Array, ""]


def slope(
    eps_hat: Float[Array, "n *latent"], z: Float[Array, "n *latent"], gamma: Float[Array, ""]
) -> Float[Array, "n *latent"]:
    r"""The right-hand side of the flow, :math:`dz / d\gamma = \frac{\sigma}{2} (\hat\epsilon - \sigma z)`."""
    sigma = gaussian.sigma(gamma)
    return 0.5 * sigma * (eps_hat - sigma * z)


def log_density(
    model: Diffusion,
    z: Float[Array, "n *latent"],
    label: Float[Array, "m c"],
    *,
    key: PRNGKeyArray,
    config: FlowConfig = DEFAULTS,
    start: Float[Array, ""] | float | None = None,
) -> Flow:
    r""":math:`\log p(z_0)` under the flow, by an adaptive Runge-Kutta method of order 5 (Tsitouras 2011).

    The n images share their steps, which are small enough for each of them. To give each its own, ``vmap`` over
    batches of one.

    Args:
        model: predicts the noise.
        z: the latents at the start.
        label: embedded labels, one row per image or one for all.
        key: of the probes.
        config: divergence and tolerances.
        start: the gamma at the start; that of t = 0 if None. The density is that of z at this gamma.
    """
    low = model.gamma(jnp.zeros(())) if start is None else jnp.asarray(start, jnp.float32)
    high = model.gamma(jnp.ones(()))
    dimensions = z[0].size
    divergence = _divergence(config, z, key)

    def right_hand_side(gamma: Array, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
        z, _ = state
        condition = model.condition(jnp.full(label.shape[0], gamma), label)
        eps_hat, trace = divergence(lambda z: model.eps_hat(z, condition), z)
        sigma = gaussian.sigma(gamma)
        # Per dimension: a number of the size of 1 in float32, and a tolerance that means the same for every image size.
        return slope(eps_hat, z, gamma), 0.5 * sigma * (trace / dimensions - sigma)

    rows = 1 if config.kind(dimensions) == "exact" else config.probes
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(right_hand_side),
        diffrax.Tsit5(),
        t0=low,
        t1=high,
        dt0=FIRST_STEP,
        y0=(z, jnp.zeros((rows, z.shape[0]), z.dtype)),
        stepsize_controller=diffrax.PIDController(
            rtol=config.rtol, atol=config.atol, norm=_largest_error, dtmax=LARGEST_STEP
        ),
        max_steps=config.max_steps,
        throw=False,
    )
    z_1, integral = (leaf[-1] for leaf in solution.ys)
    at_end = -0.5 * per_image(z_1**2 + math.log(2.0 * math.pi))
    return Flow(
        log_density=at_end[None] + dimensions * integral,
        z_1=z_1,
        evaluations=6 * solution.stats["num_steps"] + 1,  # seven stages, the last of which is the next step's first
        finished=solution.result == diffrax.RESULTS.successful,
    )


def log_weight(
    model: Diffusion,
    x: Num[Array, "n *shape"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    config: FlowConfig = DEFAULTS,
) -> Weight:
    r"""One draw of :math:`\log p(x | z_0) + \log p(z_0) - \log q(z_0 | x)`, :math:`z_0 \sim q(z_0 | x)`, in nats.

    Its mean is at most :math:`\log p(x)`; how far below is :math:`KL(q(z_0 | x) \| p(z_0 | x))`. With an estimated
    divergence that holds for the mean over probes too. The mean of its *exponential* is p(x) with an exact divergence
    only: the exponential of an estimate is too large on average.

    Args:
        model: encodes, predicts noise and decodes.
        x: images, as the model takes them.
        labels: multi-hot; None for no label.
        key: split once: z_0's noise, the probes.
        config: see :class:`FlowConfig`.
    """
    key_z0, key_probes = jax.random.split(key)
    f = model.encode(x)
    gamma_0 = model.gamma(jnp.zeros(()))
    eps = jax.random.normal(key_z0, f.shape)
    z_0 = gaussian.diffuse(f, eps, gamma_0)
    flow = log_density(model, z_0, model.embed(labels, n=len(x)), key=key_probes, config=config)
    log_q = -0.5 * per_image(eps**2 + math.log(2.0 * math.pi) + jax.nn.log_sigmoid(gamma_0))
    log_p = -model.observation_loss(x, decode_at(model, f, eps))
    return _weight(flow, log_p - log_q, config)


def uniform_log_weight(
    model: Diffusion,
    x: Num[Array, "n *shape"],
    labels: Float[Array, "n k"] | None = None,
    *,
    key: PRNGKeyArray,
    spacing: float,
    config: FlowConfig = DEFAULTS,
) -> Weight:
    r"""The same with uniform dequantisation: :math:`u` uniform on the cell of a gray value, of width ``spacing``.

    .. math::
        \log P(x) \ge E_u\left[\log p(f + u)\right] + D \log \text{spacing}, \qquad
        p(y) = \alpha^D\, p_\gamma(\alpha y),

    with P(x) the mass of the cell under the density p. What the model knows is the law of an image with *normal*
    noise, :math:`p_\gamma`. The flow starts where that noise has the variance of the uniform one,
    :math:`e^{\gamma} = \text{spacing}^2 / 12`, or at :math:`\gamma_0` where the model knows no less. Much below, the
    law has a peak on each gray value, and numbers between two of them have next to no density.

    Args:
        model: encodes gray values to numbers that lie ``spacing`` apart, of the shape of the image.
        x, labels, config: see :func:`log_weight`.
        key: split once: u, the probes.
        spacing: of neighbouring gray values in the encoding.
    """
    key_u, key_probes = jax.random.split(key)
    f = model.encode(x)
    start = jnp.maximum(model.gamma(jnp.zeros(())), 2.0 * math.log(spacing / math.sqrt(12.0)))
    y = f + spacing * jax.random.uniform(key_u, f.shape, minval=-0.5, maxval=0.5)
    label = model.embed(labels, n=len(x))
    flow = log_density(model, gaussian.alpha(start) * y, label, key=key_probes, config=config, start=start)
    volume = f[0].size * (math.log(spacing) + 0.5 * jax.nn.log_sigmoid(-start))
    return _weight(flow, jnp.full(len(x), volume), config)


def _weight(flow: Flow, rest: Float[Array, " n"], config: FlowConfig) -> Weight:
    """A log weight from the flow's part, one row a probe, and the rest of it."""
    if config.kind(flow.z_1[0].size) == "exact":
        variance = jnp.zeros_like(rest)
    else:
        variance = jnp.var(flow.log_density, axis=0, ddof=1) / len(flow.log_density)
    return Weight(flow.log_density.mean(axis=0) + rest, variance, flow.evaluations, flow.finished)


Divergence = Callable[[Callable[[Array], Array], Array], tuple[Array, Array]]


def _divergence(config: FlowConfig, z: Float[Array, "n *latent"], key: PRNGKeyArray) -> Divergence:
    """A function of eps_hat and z: eps_hat(z), and its divergence per image, one row a probe (or one if exact)."""
    kind, n, dimensions = config.kind(z[0].size), len(z), z[0].size
    if kind == "exact":

        def exact(eps_hat: Callable[[Array], Array], z: Array) -> tuple[Array, Array]:
            value, push = jax.linearize(eps_hat, z)

            def entry(j: Array) -> Array:
                column = jax.nn.one_hot(j, dimensions, dtype=z.dtype).reshape((1, *z.shape[1:]))
                return per_image(column * push(jnp.broadcast_to(column, z.shape)))

            diagonal = jax.lax.map(entry, jnp.arange(dimensions), batch_size=min(COLUMNS, dimensions))
            return value, jnp.sum(diagonal, axis=0)[None]

        return exact

    shape = (config.probes, n, *z.shape[1:])
    draw: Any = jax.random.rademacher if kind == "rademacher" else jax.random.normal
    probes = draw(key, shape, z.dtype)

    def estimate(eps_hat: Callable[[Array], Array], z: Array) -> tuple[Array, Array]:
        value, push = jax.linearize(eps_hat, z)
        products = probes * jax.vmap(push)(probes)
        return value, jnp.sum(products, axis=tuple(range(2, products.ndim)))

    return estimate


def _largest_error(scaled: tuple[Float[Array, "n *latent"], Float[Array, "k n"]]) -> Float[Array, ""]:
    """Of the error in units of the tolerance: the worst image's, root mean square over z, and each log density's."""
    of_z, of_integral = scaled
    rms = jnp.sqrt(jnp.mean(jnp.square(of_z), axis=tuple(range(1, of_z.ndim))))
    return jnp.maximum(jnp.max(rms), jnp.max(jnp.abs(of_integral)))
