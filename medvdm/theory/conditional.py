r"""Draws of an image x that is known in part: through :math:`y = A x + s\, n` with a linear operator A.

The chain stays as it is. What changes is the answer of the network: in place of :math:`\hat x = E[x \mid z_t]` it is
told :math:`E[x \mid z_t, y]`. If x given z_t is Gaussian with covariance C, Bayes' rule says what that is,

.. math::
    E[x \mid z_t, y] = \hat x + C A^T (A C A^T + s^2 I)^{-1} (y - A \hat x), \qquad
    C = \mathrm{Cov}[x \mid z_t] = \frac{\sigma_t^2}{\alpha_t} \frac{\partial \hat x}{\partial z_t} .

The second formula holds for every law of x (Tweedie's formula, differentiated once more), so the network itself tells
C. It is never formed: C v is the derivative of :math:`\hat x` in the direction :math:`v \sigma_t^2 / \alpha_t`, and
the equations are solved by conjugate residuals, with one such derivative a turn (:func:`solved`). On Gaussian data
nothing is approximate but the steps of the chain. On others, x given z_t is taken to be Gaussian, which it becomes as
the noise falls. Where s = 0, the answer is moved onto :math:`A x = y` at last, by
:math:`x + A^+ (y - A x)`, however far the solution has come.

With no turn at all that last move is all that is done: *replacement* (Song et al., 2021), in the form of Wang et al.
(2023). What is known is right then, but what is unknown hears of it only through the noise, and the law is far from
the conditional one, also with many steps. Going back up after every step and repeating it (Lugmayr et al., 2022) mends
that slowly: ten times the work comes as near as two turns here.

Sources: Song, Vahdat, Mardani & Kautz, *Pseudoinverse-guided diffusion models* (2023), for which C is a multiple of
the identity inside the inverse; Boys et al., *Tweedie moment projected diffusions* (2023), and Rozet et al., *Learning
diffusion priors from observations by expectation maximization* (2024), for the whole C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from medvdm.theory import gaussian
from medvdm.theory.bound import Diffusion

TURNS = 5  #: of the solution of the equations, at most
TOLERANCE = 0.03  #: of the length of y - A x, at which it ends


@runtime_checkable
class Operator(Protocol):
    """A linear map A of images, as a pytree (``jax.tree_util.register_dataclass``), with what is asked of it."""

    def __call__(self, x: Float[Array, "n *latent"]) -> Float[Array, "n *seen"]:
        """A x."""
        ...

    def adjoint(self, y: Float[Array, "n *seen"]) -> Float[Array, "n *latent"]:
        """The transposed map, A^T y."""
        ...

    def inverse(self, y: Float[Array, "n *seen"]) -> Float[Array, "n *latent"]:
        """The pseudo-inverse, A^+ y: of all x with A x = y, the shortest."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """The pixels that are known; y has the shape of x, and where nothing is known 0 stands.

    ``known`` is 1 or 0; it has as many axes as x, and 1 row or one per image.
    """

    known: Float[Array, "m *latent"]

    def __call__(self, x: Float[Array, "n *latent"]) -> Float[Array, "n *latent"]:
        """x where it is known, 0 elsewhere; which is also what the other two are."""
        return self.known * x

    adjoint = inverse = __call__


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CellMean:
    """The mean of each k x k pixels, as a small picture of a large image shows it; sides are multiples of k."""

    k: int = field(metadata={"static": True})

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n a b c"]:
        """The means."""
        return jnp.mean(rearrange(x, "n (a k) (b l) c -> n a b (k l) c", k=self.k, l=self.k), axis=3)

    def adjoint(self, y: Float[Array, "n a b c"]) -> Float[Array, "n h w c"]:
        """Each number shared out among its k x k pixels."""
        return self.inverse(y) / self.k**2

    def inverse(self, y: Float[Array, "n a b c"]) -> Float[Array, "n h w c"]:
        """Each number repeated k x k times."""
        return jnp.repeat(jnp.repeat(y, self.k, axis=1), self.k, axis=2)


class Conditional:
    """A model of x as one of x given y: a :class:`medvdm.theory.bound.Diffusion`, for any solver and grid.

    Args:
        model: its encoding is the image itself, as that of a diffusion on pixels is.
        operator: A.
        y: what was seen, on the model's scale.
        noise: s, of each number of y; 0 where y is exact.
        turns: of the solution, at most; 0 is replacement.
    """

    def __init__(
        self,
        model: Diffusion,
        operator: Operator,
        y: Float[Array, "n *seen"],
        noise: Float[Array, "..."] | float = 0.0,
        *,
        turns: int = TURNS,
    ):
        self.model, self.operator, self.y, self.turns = model, operator, y, turns
        self.variance = jnp.broadcast_to(jnp.square(jnp.asarray(noise, y.dtype)), y.shape)
        self.timesteps = model.timesteps
        self.gamma, self.encode, self.decode = model.gamma, model.encode, model.decode
        self.embed, self.observation_loss = model.embed, model.observation_loss

    def condition(self, gamma: Float[Array, " m"], label: Float[Array, "m c"]) -> Any:
        """The model's own, and gamma itself."""
        return gamma, self.model.condition(gamma, label)

    def eps_hat(self, z: Float[Array, "n *latent"], condition: Any) -> Float[Array, "n *latent"]:
        r"""The noise in z that goes with :math:`E[x \mid z_t, y]`."""
        gamma, own = condition
        gamma = gaussian.align(gamma, z)
        return gaussian.eps_from_x(self.mean(z, gamma, own), z, gamma)

    def start(
        self, z: Float[Array, "n *latent"], eps: Float[Array, "n *latent"], label: Float[Array, "m c"]
    ) -> Float[Array, "n *latent"]:
        r"""z_1 of an image known in part, from noise z: :math:`\alpha_1 E[x \mid z_1 = z, y] + \sigma_1 \epsilon`.

        Noise alone is z_1 of images of which nothing is known. Solvers without noise of their own would keep the
        difference to the end.
        """
        gamma = self.gamma(jnp.ones((len(label),)))
        x = self.mean(z, gaussian.align(gamma, z), self.model.condition(gamma, label))
        return gaussian.diffuse(x, eps, gaussian.align(gamma, z))

    def mean(self, z: Float[Array, "n *latent"], gamma: Float[Array, "..."], own: Any) -> Float[Array, "n *latent"]:
        r""":math:`E[x \mid z_t, y]`; gamma broadcasts to z, and ``own`` is the model's condition."""

        def x_hat(z: Array) -> Array:
            return gaussian.x_from_eps(self.model.eps_hat(z, own), z, gamma)

        if not self.turns:
            return self.exact(x_hat(z))
        x, derivative = jax.linearize(x_hat, z)
        scale = gaussian.sigma2(gamma) / gaussian.alpha(gamma)
        wanted = self.y - self.operator(x)
        change = solved(
            lambda u: derivative(scale * self.operator.adjoint(u)), self.operator, self.variance, wanted, self.turns
        )
        return self.exact(x + change)

    def exact(self, x: Float[Array, "n *latent"]) -> Float[Array, "n *latent"]:
        """x moved onto A x = y, by the shortest way, as far as y is exact."""
        return x + self.operator.inverse(jnp.where(self.variance == 0.0, self.y - self.operator(x), 0.0))


def solved(
    spread: Callable[[Float[Array, "n *seen"]], Float[Array, "n *latent"]],
    operator: Operator,
    variance: Float[Array, "n *seen"],
    wanted: Float[Array, "n *seen"],
    turns: int,
) -> Float[Array, "n *latent"]:
    r""":math:`C A^T u` with :math:`(A C A^T + s^2) u = e`, by conjugate residuals, for each image on its own.

    The residual of an image falls with every turn, also where C, as a network tells it, is not quite symmetric. It ends
    for an image at :data:`TOLERANCE` of what it was, and for all after ``turns``.

    Args:
        spread: :math:`C A^T u` of u.
        operator: A.
        variance: s^2.
        wanted: e.
        turns: at most.
    """

    def dot(a: Array, b: Array) -> Array:
        return gaussian.align(jnp.sum((a * b).reshape(len(a), -1), axis=1), a)

    def over(a: Array, b: Array) -> Array:
        return jnp.where(b > 0.0, a / jnp.where(b > 0.0, b, 1.0), 0.0)

    def applied(u: Array) -> tuple[Array, Array]:
        change = spread(u)
        return change, operator(change) + variance * u

    enough = TOLERANCE**2 * dot(wanted, wanted)

    def unfinished(turn: tuple[Array, ...]) -> Array:
        i, _, left, *_ = turn
        return (i < turns) & jnp.any(dot(left, left) > enough)

    def one(turn: tuple[Array, ...]) -> tuple[Array, ...]:
        i, change, left, before, seen = turn
        # The direction is what is left, made conjugate to the one before it.
        step, through = applied(left)
        back = over(dot(through, seen), dot(seen, seen))
        step, through = step - image(back, step) * before, through - back * seen
        size = jnp.where(dot(left, left) > enough, over(dot(left, through), dot(through, through)), 0.0)
        return i + 1, change + image(size, step) * step, left - size * through, step, through

    def image(numbers: Array, like: Array) -> Array:
        return gaussian.align(numbers.reshape(-1), like)

    nothing = jnp.zeros_like(operator.adjoint(wanted))
    start = (jnp.zeros((), jnp.int32), nothing, wanted, nothing, jnp.zeros_like(wanted))
    return jax.lax.while_loop(unfinished, one, start)[1]
