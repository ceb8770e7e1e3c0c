r"""Noise schedules: :math:`\gamma(t)` for :math:`t \in [0, 1]`, strictly increasing, with exact end points.

A schedule is a callable ``schedule(t) -> gamma`` that works on any shape. Its slope comes from
:func:`with_slope`, one forward-mode pass, so no schedule needs its derivative written out.

Only the end points :math:`\gamma_0, \gamma_1` enter the value of the continuous-time bound; the shape between
them changes the variance of its Monte-Carlo estimate (Kingma et al. 2021, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medvdm.errors import InputError, nearest

MAX_GAMMA = 48.0 * math.log(2.0)
r"""The largest :math:`|\gamma|`, 33.3. There signal and noise differ by :math:`e^{\gamma / 2} = 2^{24}`, the precision
of float32: beyond it the weaker of the two is lost in the rounding of the other, and z holds only one of them."""


def check_range(gamma_min: float, gamma_max: float) -> None:
    """Raise InputError unless ``gamma_min < gamma_max``, both within +- :data:`MAX_GAMMA`."""
    if not (math.isfinite(gamma_min) and math.isfinite(gamma_max)):
        raise InputError(f"gamma_min, gamma_max: {gamma_min}, {gamma_max}; expected finite numbers")
    if max(abs(gamma_min), abs(gamma_max)) > MAX_GAMMA:
        raise InputError(
            f"gamma_min, gamma_max: {gamma_min}, {gamma_max}; expected within +-{MAX_GAMMA:.1f}, "
            "beyond which float32 loses the weaker of signal and noise"
        )
    if not gamma_min < gamma_max:
        raise InputError(
            f"gamma_min: {gamma_min} is not below gamma_max: {gamma_max}; gamma = -log SNR rises with time"
        )


class _Fixed(nnx.Module):
    """A schedule without parameters, between two constants."""

    learned = False  #: whether training changes it

    def __init__(self, gamma_min: float, gamma_max: float):
        check_range(gamma_min, gamma_max)
        self.gamma_min = float(gamma_min)
        self.gamma_max = float(gamma_max)


class FixedLinear(_Fixed):
    r""":math:`\gamma(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min}) t` with constants for ends.

    Raises:
        InputError: ends that :func:`check_range` refuses.
    """

    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        # (1 - t) a + t b, unlike a + (b - a) t, gives exactly b at t = 1 in floating point.
        return (1.0 - t) * self.gamma_min + t * self.gamma_max


class FixedCosine(_Fixed):
    r"""The cosine schedule cut to a range: :math:`\gamma(t) = 2 \log \tan a(t)`, with a(t) linear in time.

    .. math:: a(t) = (1 - t)\, a_0 + t\, a_1, \qquad a_i = \arctan e^{\gamma_i / 2}

    For an infinite range :math:`\alpha_t = \cos(\pi t / 2)`.
    Source: Nichol & Dhariwal, *Improved Denoising Diffusion Probabilistic Models* (2021).

    Raises:
        InputError: ends that :func:`check_range` refuses.
    """

    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        def log_sine(sign: float) -> Float[Array, "..."]:
            first, last = (math.atan(math.exp(sign * 0.5 * end)) for end in (self.gamma_min, self.gamma_max))
            return jnp.log(jnp.sin((1.0 - t) * first + t * last))

        # log tan a = log sin a - log sin(pi/2 - a): the second angle is interpolated too, never subtracted.
        inside = 2.0 * (log_sine(1.0) - log_sine(-1.0))
        exact = jnp.where(t <= 0.0, self.gamma_min, jnp.where(t >= 1.0, self.gamma_max, inside))
        return inside + jax.lax.stop_gradient(exact - inside)


class LearnedLinear(nnx.Module):
    r"""A straight line whose end points are parameters, trained by the bound.

    The upper end is held as the log of a positive width, :math:`\gamma_1 = \gamma_0 + e^{w}`, so no gradient step
    can reverse the order.

    Raises:
        InputError: starting ends that :func:`check_range` refuses.
    """

    learned = True  #: whether training changes it

    def __init__(self, gamma_min: float, gamma_max: float):
        check_range(gamma_min, gamma_max)
        self.gamma_0 = nnx.Param(jnp.asarray(gamma_min, jnp.float32))
        self.log_width = nnx.Param(jnp.log(jnp.asarray(gamma_max - gamma_min, jnp.float32)))

    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.gamma_0[...] + jnp.exp(self.log_width[...]) * t


class MonotonicNetwork(nnx.Module):
    r"""A learned monotonic curve between end points that are exact at all times (VDM appendix H).

    .. math::
        g(t) &= l_1(t) + l_3(\mathrm{sigmoid}(l_2(l_1(t)))) \\
        \gamma(t) &= \gamma_0 + (\gamma_1 - \gamma_0) \frac{g(t) - g(0)}{g(1) - g(0)}

    where every linear layer has positive weights (a softplus of free parameters). Without the second line the curve
    drifts off its ends as it trains. The shape starts close to a straight line.

    Args:
        gamma_min, gamma_max: the end points; parameters of their own when ``learn_ends``.
        hidden: width of the hidden layer (1,024 in the paper).
        learn_ends: whether the bound trains the end points too.
        rngs: source of the initial weights.

    Raises:
        InputError: ends that :func:`check_range` refuses.
    """

    learned = True  #: whether training changes it

    def __init__(
        self, gamma_min: float, gamma_max: float, *, hidden: int = 1024, learn_ends: bool = False, rngs: nnx.Rngs
    ):
        ends = LearnedLinear if learn_ends else FixedLinear
        self.ends = ends(gamma_min, gamma_max)  # maps the normalised shape in [0, 1] onto gamma
        normal = jax.nn.initializers.normal
        # softplus(-3) = 0.05: l_3 averages `hidden` sigmoids with small weights, so l_1 dominates at the start.
        self.w1 = nnx.Param(jnp.asarray(0.54, jnp.float32))  # softplus(0.54) = 1
        self.b1 = nnx.Param(jnp.zeros((), jnp.float32))
        self.w2 = nnx.Param(1.0 + normal(1.0)(rngs.params(), (hidden,), jnp.float32))
        self.b2 = nnx.Param(normal(2.0)(rngs.params(), (hidden,), jnp.float32))
        self.w3 = nnx.Param(-3.0 + normal(0.1)(rngs.params(), (hidden,), jnp.float32))
        self.hidden = hidden

    def shape(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """The unnormalised curve g(t); its constant offset is left out, as the normalisation removes it."""
        h = jax.nn.softplus(self.w1[...]) * t + self.b1[...]
        w2 = jax.nn.softplus(self.w2[...]).reshape((1,) * h.ndim + (-1,))
        b2 = self.b2[...].reshape((1,) * h.ndim + (-1,))
        features = jax.nn.sigmoid(w2 * h[..., None] + b2)
        return h + features @ jax.nn.softplus(self.w3[...]) / self.hidden

    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        g0, g1 = self.shape(jnp.zeros(())), self.shape(jnp.ones(()))
        inside = (self.shape(t) - g0) / (g1 - g0)
        # At the ends the division gives 0 and 1 up to the last digit; make the value exact and keep the slope.
        exact = jnp.where(t <= 0.0, 0.0, jnp.where(t >= 1.0, 1.0, inside))
        return self.ends(inside + jax.lax.stop_gradient(exact - inside))


Schedule = FixedLinear | FixedCosine | LearnedLinear | MonotonicNetwork
KINDS = {
    "fixed-linear": FixedLinear,
    "fixed-cosine": FixedCosine,
    "learned-linear": LearnedLinear,
    "monotonic": MonotonicNetwork,
}


def make(name: str, gamma_min: float, gamma_max: float, *, learn_ends: bool = False, rngs: nnx.Rngs) -> Schedule:
    """Build a schedule by name (one of :data:`KINDS`); raises InputError for others.

    ``learn_ends`` is for ``monotonic``: the linear schedules have it in their names.
    """
    if name not in KINDS:
        raise InputError(f"schedule: '{name}'; {nearest(name, KINDS)}")
    if KINDS[name] is MonotonicNetwork:
        return MonotonicNetwork(gamma_min, gamma_max, learn_ends=learn_ends, rngs=rngs)
    return KINDS[name](gamma_min, gamma_max)


def with_slope(
    schedule: Callable[[Float[Array, "..."]], Float[Array, "..."]], t: Float[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    r""":math:`(\gamma(t), \gamma'(t))`, the slope by one Jacobian-vector product. Units: nats, nats per unit time."""
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def time_of(
    schedule: Callable[[Float[Array, "..."]], Float[Array, "..."]], gamma: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    r"""The inverse of a schedule: t where :math:`\gamma(t)` is as given, by halving [0, 1]. Beyond an end, that end.

    It asks of the schedule nothing but that it rises, and is as exact as float32 is at t: 6e-8 times the slope, in
    gamma.
    """

    def halved(_: Array | int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        below = schedule(middle) < gamma
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 30, halved, (jnp.zeros_like(gamma), jnp.ones_like(gamma)))
    first, last = schedule(jnp.zeros_like(gamma)), schedule(jnp.ones_like(gamma))
    return jnp.where(gamma <= first, 0.0, jnp.where(gamma >= last, 1.0, 0.5 * (low + high)))
