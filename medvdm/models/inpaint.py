r"""Images of gray values, drawn given a part of them: missing pixels, or a large image given a small one.

One stage is :class:`medvdm.theory.conditional.Conditional`. Of a cascade, the copy is drawn first, given what y tells
of it, and then the detail, given the copy and y.

- Of a mask, a pixel of the copy is known where all k x k pixels are. Where only some are, they tell its value with an
  error, :func:`copy_of_known`, for which the copy is drawn with that noise.
- The mean of m x m pixels is an observation of the copy where one of m and k is a multiple of the other.

What is approximate of a cascade: the copy hears of y only by these rules, not by all the detail that y holds.

Everything is exact where it can be: known pixels are returned as they are, and where y is a picture of whole gray
values without noise, the mean of the pixels that are drawn, rounded, is y (:func:`with_cell_means`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Key, UInt8

from medvdm.errors import DivergedError, InputError, nearest
from medvdm.models import cascade, vdm
from medvdm.models.generate import MAX_STEPS
from medvdm.models.likelihoods import LEVELS, SPACING, level_values
from medvdm.theory import gaussian
from medvdm.theory.conditional import CellMean, Conditional, Mask, Operator
from medvdm.theory.sampling import chain
from medvdm.theory.solvers import SOLVERS

CONTRAST = 0.01  #: variance within a cell of an image that shows none, as where one pixel of each is known


class Seen(NamedTuple):
    """What is known of n images: y = A x + s n, on the model's scale of [-1, 1].

    Each leaf of ``operator``, which is A, has one row, or one per image; ``y`` has n rows; ``variance`` is s^2 of each
    number of y.
    """

    operator: Operator
    y: Float[Array, "n *seen"]
    variance: Float[Array, "n *seen"]


class Plan(NamedTuple):
    """How the chains of all stages run."""

    steps: Array | int
    solver: str
    turns: int
    labels: Float[Array, "m classes"] | None
    guidance: Array | float
    guided: bool


def draws(
    graph: nnx.GraphDef,
    params: vdm.Params,
    seen: Seen,
    *,
    samples: int,
    steps: int,
    solver: str,
    turns: int,
    labels: np.ndarray | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
) -> UInt8[np.ndarray, "n samples h w c"]:
    """Draw several images of gray values for each of n that are known in part.

    Draw j of image i depends on the seed, i and j, and on nothing else.

    Args:
        graph, params: a diffusion on pixels, from :func:`medvdm.models.vdm.split`.
        seen: what is known.
        samples: draws per image.
        steps: T, of each stage.
        solver: one of :data:`medvdm.theory.solvers.SOLVERS`.
        turns: see :class:`medvdm.theory.conditional.Conditional`.
        labels: (1, classes) multi-hot, for all; None draws from the null.
        guidance: w.
        batch_size: chains at a time.

    Raises:
        InputError: a count below 1, an unknown solver, guidance without labels, a latent model, or an operator that a
            cascade does not have.
        DivergedError: the chain left the finite numbers.
    """
    config = vdm.merge(graph, params).config
    check(config, seen.operator)
    for name, value in {"samples": samples, "steps": steps, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")
    if steps > MAX_STEPS:
        raise InputError(f"steps: {steps}; expected at most {MAX_STEPS}")
    if turns < 0:
        raise InputError(f"turns: {turns}; expected 0 or more")
    if solver not in SOLVERS:
        raise InputError(f"solver: '{solver}'; {nearest(solver, SOLVERS)}")
    if not math.isfinite(guidance):
        raise InputError(f"guidance: {guidance}; expected a finite number")
    if guidance and labels is None:
        raise InputError(f"guidance: {guidance} without labels; expected a label (and a class-conditional model)")

    n = len(seen.y)
    total, size = n * samples, min(n * samples, batch_size)
    out = np.empty((total, *config.image_shape), np.uint8)
    for begin in range(0, total, size):
        rows = np.minimum(begin + np.arange(size), total - 1)  # the last batch is filled up: one compilation
        image, number = rows // samples, rows % samples
        part = jax.tree.map(lambda leaf: leaf if len(leaf) == 1 else leaf[image], seen)  # noqa: B023
        part = part._replace(y=jnp.broadcast_to(part.y, (size, *part.y.shape[1:])))
        levels = jax.device_get(
            _drawn(
                params,
                seed,
                image.astype(np.int32),
                number.astype(np.int32),
                part,
                steps,
                None if labels is None else jnp.asarray(labels, jnp.float32),
                float(guidance),
                graph=graph,
                guided=guidance != 0,
                solver=solver,
                turns=turns,
            )
        )
        if not np.isfinite(levels).all():
            raise DivergedError(
                f"inpainting: a pixel is not finite, with {steps} steps and guidance {guidance:g}; "
                "expected finite numbers (is a weight not finite, or the guidance far too large?)"
            )
        left = min(size, total - begin)
        out[begin : begin + left] = levels[:left].astype(np.uint8)
    return out.reshape(n, samples, *config.image_shape)


def check(config: vdm.VDMConfig, operator: Operator) -> None:
    """Refuse a model or an operator for which there is no rule.

    Raises:
        InputError: a model that is no diffusion on pixels; cells that do not fit into the image, or into those of a
            cascade; any other operator than a mask and a cell mean for a cascade.
    """
    if not vdm.ARCHITECTURES[config.architecture].on_pixels:
        raise InputError(
            f"architecture: '{config.architecture}', whose diffusion runs in a latent space, where no pixel is known; "
            "expected a diffusion on pixels ('unet', presets pixel and pixel-large)"
        )
    height, width, _ = config.image_shape
    if isinstance(operator, CellMean) and (operator.k < 1 or height % operator.k or width % operator.k):
        raise InputError(
            f"operator: means of {operator.k} x {operator.k} pixels; expected a divisor of {height} and {width}"
        )
    if not config.reduce:
        return
    if isinstance(operator, CellMean) and (operator.k % config.reduce and config.reduce % operator.k):
        raise InputError(
            f"operator: means of {operator.k} x {operator.k} pixels, with a copy reduced {config.reduce} times; "
            "expected one to be a multiple of the other"
        )
    if not isinstance(operator, Mask | CellMean):
        raise InputError(
            f"operator: {type(operator).__name__}, with a copy reduced {config.reduce} times; expected Mask or CellMean"
        )


@partial(jax.jit, static_argnames=("graph", "guided", "solver", "turns"))
def _drawn(
    params: vdm.Params,
    seed: Array | int,
    image: Int[Array, " n"],
    number: Int[Array, " n"],
    seen: Seen,
    steps: Array | int,
    labels: Float[Array, "1 classes"] | None,
    guidance: Array | float,
    *,
    graph: nnx.GraphDef,
    guided: bool,
    solver: str,
    turns: int,
) -> Float[Array, "n h w c"]:
    """Gray values, whole numbers as floats, so that what is not finite shows."""
    root = jax.random.key(seed)
    keys = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(root, i), j))(image, number)
    plan = Plan(steps, solver, turns, labels, guidance, guided)
    return _stage(vdm.merge(graph, params), keys, seen, plan)


def _stage(model: vdm.VDM, keys: Key[Array, " n"], seen: Seen, plan: Plan) -> Float[Array, "n h w c"]:
    """The gray values that one model draws, after those of its copies."""
    own: Any = model
    finite = jnp.ones((len(keys), 1, 1, 1), bool)
    if model.config.reduce:
        others = jax.vmap(lambda key: jax.random.fold_in(key, MAX_STEPS + 1))(keys)  # no step has this number
        copy = _stage(model.base, others, of_copy(seen, model.config.reduce), plan)
        finite = jnp.isfinite(copy).all(axis=(1, 2, 3), keepdims=True)
        own = cascade.given(model, copy.astype(jnp.uint8))

    def noise(number: int) -> Array:  # steps are numbered from 1, so 0 is free for the start
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), model.latent_shape))(keys)

    label, null = model.embed(plan.labels, n=1), model.embed(None, n=1) if plan.guided else None
    known = Conditional(own, seen.operator, seen.y, jnp.sqrt(seen.variance), turns=plan.turns)
    z = chain(
        known,
        known.start(noise(0), noise(MAX_STEPS + 2), label),
        label,
        null,
        keys=keys,
        steps=plan.steps,
        first=plan.steps,
        guidance=plan.guidance,
        solver=plan.solver,
    )[-1]
    x = known.exact(z / gaussian.alpha(model.gamma(jnp.zeros(()))))
    return jnp.where(finite, jnp.round((LEVELS - 1) * model.picture(x)), jnp.nan)


def of_copy(seen: Seen, k: int) -> Seen:
    """What is known of the images reduced k times; see the rules at the top of :mod:`medvdm.models.inpaint`."""
    operator, y, variance = seen
    if isinstance(operator, CellMean):
        if operator.k % k == 0:
            return Seen(CellMean(operator.k // k), y, variance)
        cells = CellMean(k // operator.k)
        y, variance = whole_levels(cells(y)), cells(variance) / cells.k**2
        return Seen(Mask(jnp.ones((1, *y.shape[1:]))), y, variance)
    return copy_of_known(operator.known, y, variance, k)


def copy_of_known(
    known: Float[Array, "m h w c"], y: Float[Array, "n h w c"], variance: Float[Array, "n h w c"], k: int
) -> Seen:
    r"""What pixels tell of the mean b of each k x k of them.

    The pixels of a cell are taken for :math:`x_i = c + d_i`, with nothing known of c, and :math:`d_i` independent of
    variance w, that of the known pixels within their cells. With :math:`y_i = x_i + s_i n_i` of those in K, and weights
    :math:`a_i = 1 / (w + s_i^2)`,

    .. math::
        E[b] = E[c] = \frac{\sum_K a_i y_i}{\sum_K a_i}, \qquad
        \mathrm{Var}[b] = \frac{(1 - q)^2}{\sum_K a_i} + \frac{w}{k^2} (1 - q), \qquad q = \frac{w}{k^2} \sum_K a_i .

    Where all pixels are known without noise, that is their mean and 0, and the mean is rounded as that of a copy is.
    With m exact pixels it is their mean, and :math:`w (1/m - 1/k^2)`.
    """

    def cells(x: Array) -> Array:
        return rearrange(x, "n (a k) (b l) c -> n a b (k l) c", k=k, l=k)

    n = len(y)
    known, y, variance = (cells(jnp.broadcast_to(part, y.shape)) for part in (known, y, variance))
    m = known.sum(axis=3, keepdims=True)
    within = known * (y - (known * y).sum(axis=3, keepdims=True) / jnp.maximum(m, 1.0)) ** 2
    free = jnp.maximum(m - 1.0, 0.0).reshape(n, -1).sum(axis=1)
    noise = (known * variance).reshape(n, -1).sum(axis=1) / jnp.maximum(known.reshape(n, -1).sum(axis=1), 1.0)
    w = jnp.where(free > 0, within.reshape(n, -1).sum(axis=1) / jnp.maximum(free, 1.0), CONTRAST)
    w = gaussian.align(jnp.maximum(w - noise, SPACING**2 / 12.0), y)

    a = known / (w + variance)
    weight, any_known = a.sum(axis=3), m[:, :, :, 0] > 0
    safe = jnp.where(any_known, weight, 1.0)
    mean = (a * y).sum(axis=3) / safe
    part = w[:, :, :, 0] / k**2
    q = part * weight  # 1 where the whole cell is known
    whole = (m[:, :, :, 0] == k**2) & ((known * variance).sum(axis=3) == 0.0)
    error = (1.0 - q) ** 2 / safe + part * (1.0 - q)
    return Seen(
        Mask(any_known.astype(jnp.float32)),
        jnp.where(any_known, jnp.where(whole, whole_levels(mean), mean), 0.0),
        jnp.where(any_known & ~whole, error, 0.0),
    )


def whole_levels(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Means of gray values, on the scale of [-1, 1], rounded half up as :func:`medvdm.models.cascade.reduced` does."""
    levels = jnp.floor((values + 1.0) / SPACING + 0.5 + 1e-3)  # a mean of few whole numbers is no nearer to a half
    return level_values(levels.astype(jnp.uint8))


def with_cell_means(
    levels: UInt8[np.ndarray, "n h w c"], means: UInt8[np.ndarray, "n a b c"], k: int
) -> UInt8[np.ndarray, "n h w c"]:
    """The gray values with the least changes that make each cell's mean, rounded half up, the one that is asked for.

    Rounding each pixel on its own moves few means, by little. One level is added to, or taken from, as many pixels of
    a cell as it takes, those in its middle grays first, so that none leaves 0 to 255.
    """
    cells = rearrange(levels, "n (a k) (b l) c -> n a b c (k l)", k=k, l=k).astype(np.int64)
    low = means.astype(np.int64) * k * k - (k * k) // 2  # of the sums whose rounded mean is right
    high = low + k * k - 1
    lacking = np.maximum(low - cells.sum(axis=-1), 0) - np.maximum(cells.sum(axis=-1) - high, 0)
    while lacking.any():
        step = np.sign(lacking)[..., None]
        free = np.where(step > 0, cells < LEVELS - 1, cells > 0) & (step != 0)
        # The pixels that may change, the least extreme first; of them as many as are lacking.
        order = np.argsort(np.where(free, np.abs(cells - LEVELS // 2), LEVELS), axis=-1, kind="stable")
        rank = np.argsort(order, axis=-1, kind="stable")
        cells += np.where(free & (rank < np.abs(lacking)[..., None]), step, 0)
        sums = cells.sum(axis=-1)
        lacking = np.maximum(low - sums, 0) - np.maximum(sums - high, 0)
    return rearrange(cells.astype(np.uint8), "n a b c (k l) -> n (a k) (b l) c", k=k, l=k)
