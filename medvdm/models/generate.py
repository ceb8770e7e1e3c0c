"""Draw images from a model: batches of chains, then the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from medvdm.errors import DivergedError, InputError, nearest
from medvdm.models import cascade, vdm
from medvdm.theory import gaussian
from medvdm.theory.sampling import chain, segment_ends
from medvdm.theory.solvers import GRIDS, SOLVERS, error_grid, gamma_grid, time_at

MAX_STEPS = 1_000_000
PILOTS, PILOT_STEPS = 4, 64  #: chains, and their steps, that a grid is measured on


class Generated(NamedTuple):
    """What :func:`generate` returns; k is ``num_states``.

    Attributes:
        images: (n, h, w, c) in [0, 1], the model's pictures of z_0: Bernoulli means, or the likeliest gray values.
        latents: ``(k, n, *latent_shape)`` latents at the times below, the last of them z_0.
        states: (k, n, h, w, c) each latent shown by the decoder as if it were z_0, for figures.
        times: (k,) the time t of each latent, falling to 0.
    """

    images: np.ndarray
    latents: np.ndarray
    states: np.ndarray
    times: np.ndarray


def generate(
    graph: nnx.GraphDef,
    params: vdm.Params,
    *,
    num: int,
    steps: int,
    labels: np.ndarray | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    solver: str = "ancestral",
    eta: float = 0.0,
    grid: str = "time",
    z: np.ndarray | Sequence[np.ndarray] | None = None,
    first: int | None = None,
    num_states: int = 1,
    batch_size: int = 64,
) -> Generated:
    """Draw ``num`` images with ``steps`` steps.

    Sample i of a seed is the same (up to rounding) whatever ``num`` and ``batch_size`` are. The memory is that of what
    is returned and of one batch; :func:`batches` hands the batches out one by one.

    Args:
        graph, params: the model, from :func:`medvdm.models.vdm.split`.
        labels: (num, k) multi-hot; None draws from the null.
        guidance: w; 0 is the model itself.
        solver: one of :data:`medvdm.theory.solvers.SOLVERS`.
        eta: of DDIM, 0 to 1: how much noise its steps add.
        grid: one of :data:`medvdm.theory.solvers.GRIDS`: where the times of the steps lie.
        z: ``(num, *latent_shape)`` latents to start from instead of N(0, I), at t = ``first / steps``; of a model with
            ``reduce`` one such array per stage, the smallest copy's first, as from :mod:`medvdm.models.codes`.
        first: the step to start from; ``steps`` if None, and with ``reduce``.
        num_states: how many evenly spaced states to return.
        batch_size: samples drawn at once.

    Raises:
        InputError: a count below 1, guidance without labels, an unknown solver or grid, or shapes that do not fit.
        DivergedError: the chain left the finite numbers, as with weights that are not finite.
    """
    drawn = batches(
        graph,
        params,
        num=num,
        steps=steps,
        labels=labels,
        guidance=guidance,
        seed=seed,
        solver=solver,
        eta=eta,
        grid=grid,
        z=z,
        first=first,
        num_states=num_states,
        batch_size=batch_size,
    )
    return collected(drawn, num)


def collected(drawn: Iterable[Generated], num: int) -> Generated:
    """Batches that follow one another as one, in arrays that are made once."""
    whole, done = None, 0
    for part in drawn:
        if whole is None:
            latents, states = (np.empty((len(a), num, *a.shape[2:]), a.dtype) for a in (part.latents, part.states))
            whole = Generated(states[-1], latents, states, part.times)
        rows = slice(done, done + part.images.shape[0])
        whole.latents[:, rows], whole.states[:, rows] = part.latents, part.states
        done = rows.stop
    if whole is None or done != num:
        raise ValueError(f"batches: {done} samples; expected {num}")
    return whole


def batches(
    graph: nnx.GraphDef,
    params: vdm.Params,
    *,
    num: int,
    steps: int,
    labels: np.ndarray | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    solver: str = "ancestral",
    eta: float = 0.0,
    grid: str = "time",
    z: np.ndarray | Sequence[np.ndarray] | None = None,
    first: int | None = None,
    num_states: int = 1,
    batch_size: int = 64,
    numbers: Iterable[int] | None = None,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
) -> Iterator[Generated]:
    """The batches of :func:`generate`, each drawn when it is asked for.

    Args:
        numbers: which batches to draw, of 0 to ceil(num / batch_size) - 1; all, in order, if None.
        place: puts an array with one row per sample of a batch where it is to be computed: split over devices, say.
        the others: as :func:`generate`.

    Raises:
        InputError: at the call, as :func:`generate`.
        DivergedError: when a batch is drawn, as :func:`generate`.
    """
    model = vdm.merge(graph, params)
    first = steps if first is None else first
    for name, value in {"num": num, "steps": steps, "num_states": num_states, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")
    if steps > MAX_STEPS:
        raise InputError(f"steps: {steps}; expected at most {MAX_STEPS}")
    if not num_states <= first <= steps:
        raise InputError(f"first: {first}; expected from num_states ({num_states}) to steps ({steps})")
    if not math.isfinite(guidance):
        raise InputError(f"guidance: {guidance}; expected a finite number")
    if guidance and labels is None:
        raise InputError(f"guidance: {guidance} without labels; expected a label (and a class-conditional model)")
    if solver not in SOLVERS:
        raise InputError(f"solver: '{solver}'; {nearest(solver, SOLVERS)}")
    if not 0.0 <= eta <= (1.0 if solver == "ddim" else 0.0):
        raise InputError(f"eta: {eta} with solver '{solver}'; expected 0, or up to 1 with 'ddim'")
    if grid not in GRIDS:
        raise InputError(f"grid: '{grid}'; {nearest(grid, GRIDS)}")
    if labels is not None and labels.shape != (num, model.config.classes):
        raise InputError(f"labels: shape {labels.shape}; expected {(num, model.config.classes)}, multi-hot")
    if model.config.reduce and first != steps:
        raise InputError(
            f"first: given, with reduce {model.config.reduce}; expected none, since the copies of a sample are drawn "
            "from their first step on"
        )
    starts = _starts(model, num, z)

    size = min(num, batch_size)
    one_row = labels is not None and (labels == labels[0]).all()  # which then serves all

    def draw(number: int) -> Generated:
        samples = number * size + np.arange(size, dtype=np.int32)
        rows = np.minimum(samples, num - 1)  # the last batch is filled up: one compilation
        if labels is None:
            given = None
        else:
            given = jnp.asarray(labels[:1], jnp.float32) if one_row else place(np.asarray(labels[rows], np.float32))
        latents, states, times = jax.device_get(
            _generate(
                params,
                seed,
                place(samples),
                None if starts is None else tuple(place(np.asarray(part[rows], np.float32)) for part in starts),
                given,
                steps,
                first,
                float(guidance),
                float(eta),
                None if labels is None else jnp.asarray(labels[:1], jnp.float32),
                graph=graph,
                guided=guidance != 0,
                solver=solver,
                grid=grid,
                num_states=num_states,
            )
        )
        left = num - number * size
        latents, states = latents[:, :left], states[:, :left]
        if not (np.isfinite(latents).all() and np.isfinite(states).all()):
            raise DivergedError(
                f"sampling: a latent or pixel is not finite, with {steps} steps and guidance {guidance:g}; "
                "expected finite numbers (is a weight not finite, or the guidance far too large?)"
            )
        return Generated(states[-1], latents, states, times)

    return map(draw, range(-(-num // size)) if numbers is None else numbers)


def _starts(model: vdm.VDM, num: int, z: np.ndarray | Sequence[np.ndarray] | None) -> tuple[np.ndarray, ...] | None:
    """The given starts, one per stage; raises InputError where they do not fit the model."""
    if z is None:
        return None
    shapes, stage = [(num, *model.latent_shape)], model
    while stage.config.reduce:
        stage = stage.base
        shapes.insert(0, (num, *stage.latent_shape))
    starts = (z,) if isinstance(z, np.ndarray) else tuple(z)
    if [part.shape for part in starts] != shapes:
        found = ", ".join(str(part.shape) for part in starts)
        raise InputError(f"z: shape {found}; expected {', '.join(map(str, shapes))}")
    return starts


@partial(jax.jit, static_argnames=("graph", "guided", "solver", "grid", "num_states"))
def _generate(
    params: vdm.Params,
    seed: Array | int,
    samples: Int[Array, " n"],
    z: tuple[Array, ...] | None,
    labels: Float[Array, "m classes"] | None,
    steps: Array | int,
    first: Array | int,
    guidance: Array | float,
    eta: Array | float,
    pilot: Float[Array, "1 classes"] | None,
    *,
    graph: nnx.GraphDef,
    guided: bool,
    solver: str,
    grid: str,
    num_states: int,
) -> tuple[Float[Array, "k n *latent"], Float[Array, "k n h w c"], Float[Array, " k"]]:
    model = vdm.merge(graph, params)
    root = jax.random.key(seed)
    drawing = _Drawing(root, labels, steps, guidance, guided, solver, eta, grid, pilot)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(samples)
    latents, table = _drawn(model, keys, drawing, z=z, first=first, num_states=num_states)
    times = time_at((first - segment_ends(first, num_states)[1:]) / steps, table)  # the last is exactly 0
    scale = gaussian.align(gaussian.alpha(model.gamma(times)), latents)
    states = jax.lax.map(lambda latent: model.picture(model.decode(latent)), latents / scale)
    return latents, states, times


class _Drawing(NamedTuple):
    """What the chains of all stages share."""

    root: Key[Array, ""]
    labels: Float[Array, "m classes"] | None
    steps: Array | int
    guidance: Array | float
    guided: bool
    solver: str
    eta: Array | float
    grid: str
    pilot: Float[Array, "1 classes"] | None  #: the label of the chains that a grid is measured on


def _drawn(
    model: vdm.VDM,
    keys: Key[Array, " n"],
    drawing: _Drawing,
    *,
    z: tuple[Array, ...] | None = None,
    first: Array | int,
    num_states: int = 1,
) -> tuple[Float[Array, "k n *latent"], Float[Array, " knots"] | None]:
    """The latents of a chain and its grid; of a cascade, those of its last stage, after chains for its copies."""
    own = model
    if model.config.reduce:
        others = _folded(keys, MAX_STEPS + 1)  # no step has this number
        latents, _ = _drawn(model.base, others, drawing, z=z and z[:-1], first=drawing.steps)
        picture = model.base.picture(model.base.decode(latents[-1] / gaussian.alpha(model.base.gamma(jnp.zeros(())))))
        shown = jnp.round(255.0 * picture).astype(jnp.uint8)
        own = cascade.given(model, shown)
    start = _first_latents(model, keys) if z is None else z[-1]
    table = _table(model, drawing)
    label, null = model.embed(drawing.labels, n=1), model.embed(None, n=1) if drawing.guided else None
    latents = chain(
        own,
        start,
        label,
        null,
        keys=keys,
        steps=drawing.steps,
        first=first,
        guidance=drawing.guidance,
        num_states=num_states,
        solver=drawing.solver,
        eta=drawing.eta,
        grid=table,
    )
    return latents, table


def _table(model: vdm.VDM, drawing: _Drawing) -> Float[Array, " knots"] | None:
    """The grid of a stage. A measured one depends on the seed and the first label, not on the samples of a batch."""
    if drawing.grid == "time":
        return None
    even = gamma_grid(model.gamma)
    if drawing.grid == "gamma":
        return even
    keys = _folded(jnp.broadcast_to(drawing.root, (PILOTS,)), jnp.arange(PILOTS) + MAX_STEPS + 2)
    pilot = drawing._replace(labels=drawing.pilot, grid="gamma", solver="ddim", eta=0.0, steps=PILOT_STEPS)
    states, _ = _drawn(model, keys, pilot, first=PILOT_STEPS, num_states=PILOT_STEPS)
    return error_grid(model.gamma, jnp.concatenate([_first_latents(model, keys)[None], states]))


def _first_latents(model: vdm.VDM, keys: Key[Array, " n"]) -> Float[Array, "n *latent"]:
    """z_1, by each sample's key; steps are numbered from 1, so 0 is free for the start."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), model.latent_shape))(keys)


def _folded(keys: Key[Array, " n"], number: Int[Array, " n"] | int) -> Key[Array, " n"]:
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
