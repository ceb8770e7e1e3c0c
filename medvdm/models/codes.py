r"""Images as codes: up the probability flow to :math:`z_1`, and down again, without noise.

The flow (:mod:`medvdm.theory.solvers`) is an ordinary differential equation, so it runs both ways: each image has one
:math:`z_1`, and each :math:`z_1` one image. Of a cascade the code is one :math:`z_1` per stage, the smallest first; the
stages above the first run given the image's own copies. Up with DDIM's step it is known as DDIM inversion (Song, Meng &
Ermon 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from medvdm.errors import InputError, nearest
from medvdm.models import cascade, vdm
from medvdm.theory import gaussian, solvers
from medvdm.theory.sampling import chain

#: Those that draw no noise.
SOLVERS = tuple(name for name, solver in solvers.SOLVERS.items() if not solver.noise)


def encode(
    graph: nnx.GraphDef,
    params: vdm.Params,
    images: np.ndarray,
    *,
    steps: int,
    solver: str = "heun",
    labels: np.ndarray | None = None,
) -> list[np.ndarray]:
    r"""The code of each image: :math:`z_1` at the end of the flow from :math:`z_0 = \alpha_0 f`, without its noise.

    :func:`medvdm.models.generate.generate` with ``z`` the code, the same solver and ``grid="gamma"`` goes back.

    Args:
        graph, params: the model, from :func:`medvdm.models.vdm.split`.
        images: (n, h, w, c), as the model takes them.
        steps: of the solver, evenly spaced in gamma.
        solver: one of :data:`SOLVERS`.
        labels: (n, k) multi-hot; None is the null.

    Returns:
        One array ``(n, *latent_shape)`` for each stage of the model, the smallest copy first.

    Raises:
        InputError: an unknown solver, steps below 1, or labels of another shape; and as the encoder does for images.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver: '{solver}'; {nearest(solver, SOLVERS)}")
    if steps < 1:
        raise InputError(f"steps: {steps}; expected at least 1")
    classes = vdm.merge(graph, params).config.classes
    if labels is not None and labels.shape != (len(images), classes):
        raise InputError(f"labels: shape {labels.shape}; expected {(len(images), classes)}, multi-hot")
    given = None if labels is None else jnp.asarray(labels, jnp.float32)
    return jax.device_get(_encode(params, jnp.asarray(images), given, steps, graph=graph, solver=solver))


@partial(jax.jit, static_argnames=("graph", "solver"))
def _encode(
    params: vdm.Params,
    x: Num[Array, "n h w c"],
    labels: Float[Array, "n k"] | None,
    steps: Array | int,
    *,
    graph: nnx.GraphDef,
    solver: str,
) -> list[Array]:
    keys = jax.random.split(jax.random.key(0), x.shape[0])  # of noise that these solvers do not draw
    codes = []
    for stage in cascade.stages(vdm.merge(graph, params), x):
        model = stage.model
        z_0 = gaussian.alpha(model.gamma(jnp.zeros(()))) * model.encode(stage.images)
        upwards = solvers.gamma_grid(model.gamma)[::-1]
        label = model.embed(labels, n=1)
        codes.append(chain(model, z_0, label, keys=keys, steps=steps, first=steps, solver=solver, grid=upwards)[-1])
    return codes


def between(one: Sequence[np.ndarray], other: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    r"""A code on the great circle from one (share 0) to another (share 1), stage by stage.

    .. math:: \frac{\sin((1 - s) \omega)}{\sin \omega}\, z + \frac{\sin(s\, \omega)}{\sin \omega}\, z', \qquad
        \cos \omega = \frac{\langle z, z' \rangle}{\|z\| \|z'\|}

    Independent normal vectors of many dimensions are nearly orthogonal and of one length; the straight line between two
    passes through shorter ones, which are no codes of any image.

    Raises:
        InputError: codes of different shapes.
    """
    out = []
    for z, w in zip(one, other, strict=True):
        if z.shape != w.shape:
            raise InputError(f"codes: shapes {z.shape} and {w.shape}; expected the same")
        axes = tuple(range(1, z.ndim))
        product = np.sum(z * w, axis=axes, keepdims=True)
        lengths = np.sqrt(np.sum(z**2, axis=axes, keepdims=True) * np.sum(w**2, axis=axes, keepdims=True))
        omega = np.arccos(np.clip(product / lengths, -1.0, 1.0))
        small = omega < 1e-4  # nearly the same code: the straight line
        sine = np.where(small, 1.0, np.sin(omega))
        first = np.where(small, 1.0 - share, np.sin((1.0 - share) * omega) / sine)
        second = np.where(small, share, np.sin(share * omega) / sine)
        out.append((first * z + second * w).astype(np.float32))
    return out
