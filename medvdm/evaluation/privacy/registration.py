r"""How alike two images are after one was laid over the other: shifted, mirrored and zoomed.

The similarity is the normalised correlation r of the pixels where both images are, so brightness and contrast do not
count; the distance is :math:`\sqrt{1 - r}`, which is the Euclidean distance of the standardised images, over
:math:`\sqrt 2` and the root of their number of pixels.

* :func:`coarse`: all pairs of two sets, on images of 32 pixels, over shifts of up to 3 of them and both orientations:
  a matrix product for each.
* :func:`fine`: chosen pairs, on images of 64 pixels, all smoothed alike, which noise and blur then disturb less. From
  the coarse shift, Gauss-Newton steps on shift and zoom maximise r.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

COARSE, FINE = 32, 64  #: pixels of the longer side
REACH = 3  #: coarse pixels of shift, to each side; an eighth of the side of smaller images
BLUR = 1.0  #: coarse pixels, the deviation of the blur of :func:`smoothed`
STEPS = 6  #: of Gauss-Newton
SMOOTH = 1.0  #: deviation in fine pixels of the blur that a sample and a training image are both given
LIMITS = np.array([9.0, 9.0, 0.07], np.float32)  #: of shift in fine pixels, and of the logarithm of the zoom
BATCH = 64  #: pairs of a fine comparison at a time


def small(images: np.ndarray, side: int) -> np.ndarray:
    """Images (n, h, w, c) as gray ones (n, h', w') with at most ``side`` pixels a side, by means over boxes."""
    from PIL import Image

    gray = np.asarray(images, np.float32).mean(axis=-1)
    height, width = gray.shape[1:]
    if max(height, width) <= side:
        return gray
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in gray])


class Coarse(NamedTuple):
    """The best of all moves for each pair: (m, n) similarity, and the number of the move that gives it."""

    similarity: np.ndarray
    move: np.ndarray


def coarse(images: np.ndarray, others: np.ndarray) -> Coarse:
    """Compare m with n images of the same shape, from :func:`small`, over all shifts and both orientations.

    A shift leaves only a part of either image over the other; the correlation is that of these parts.
    """
    images, others = np.asarray(images, np.float32), np.asarray(others, np.float32)
    best = np.full((len(images), len(others)), -1, np.float32)
    move = np.zeros(best.shape, np.int16)
    for number, (dy, dx) in enumerate(_shifts(images.shape[1:])):
        there = standardised(_window(others, -dy, -dx)).T
        for flipped in (False, True):
            here = standardised(_window(images[:, :, ::-1] if flipped else images, dy, dx))
            found = here @ there
            np.copyto(move, 2 * number + flipped, where=found > best)
            np.maximum(best, found, out=best)
    return Coarse(best, move)


def smoothed(images: np.ndarray, others: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Similarity (n,) of pairs of coarse images at moves (n,) from :func:`coarse`, both blurred by :data:`BLUR`."""
    from scipy.ndimage import gaussian_filter

    shifts, found = _shifts(images.shape[1:]), np.empty(len(move), np.float32)
    images, others = (gaussian_filter(one.astype(np.float32), (0, BLUR, BLUR)) for one in (images, others))
    for number in np.unique(move):
        here, (dy, dx) = move == number, shifts[number // 2]
        ours = images[here][:, :, ::-1] if number % 2 else images[here]
        pairs = standardised(_window(ours, dy, dx)), standardised(_window(others[here], -dy, -dx))
        found[here] = np.einsum("np,np->n", *pairs)
    return found


def describe(move: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """What coarse moves (...) of images of this shape are: ``shift`` (..., 2), ``zoom`` and ``flipped``, see Fine."""
    shift = np.array(_shifts(shape), np.float32)[move // 2] / max(shape)
    return {"shift": shift, "zoom": np.ones(move.shape, np.float32), "flipped": move % 2 == 1}


def _shifts(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """All shifts in question, nearest first, so that of equal similarities the smaller move counts."""
    reach = min(REACH, max(1, min(shape) // 8))
    steps = range(-reach, reach + 1)
    return sorted(((dy, dx) for dy in steps for dx in steps), key=lambda move: move[0] ** 2 + move[1] ** 2)


def _window(images: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """The part of images that another set, shifted by (dy, dx), lies over."""
    height, width = images.shape[1:]
    return images[:, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)]


def standardised(images: np.ndarray) -> np.ndarray:
    """Images (n, h, w) as rows of mean 0 and length 1: the product of two is their correlation."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


class Fine(NamedTuple):
    """Pairs after registration.

    Attributes:
        similarity: (n,) normalised correlation of the smoothed images, where both are.
        shift: (n, 2) of the first against the second, down and to the right, as fractions of the longer side.
        zoom: (n,) magnification of the first against the second.
        flipped: (n,) whether the first image was mirrored.
    """

    similarity: np.ndarray
    shift: np.ndarray
    zoom: np.ndarray
    flipped: np.ndarray


def fine(images: np.ndarray, others: np.ndarray, move: np.ndarray, coarse_shape: tuple[int, int]) -> Fine:
    """Register pairs of images (n, h, w), from :func:`small`, from the coarse ``move`` on.

    Args:
        images, others: the pairs.
        move: (n,) numbers of moves from :func:`coarse`.
        coarse_shape: height and width of the images of the coarse comparison.
    """
    from scipy.ndimage import gaussian_filter

    begun = describe(np.asarray(move, int), coarse_shape)
    start = begun["shift"] * np.float32(max(images.shape[1:]))
    turned = np.where(begun["flipped"][:, None, None], images[:, :, ::-1], images)
    turned, others = (gaussian_filter(one.astype(np.float32), (0, SMOOTH, SMOOTH)) for one in (turned, others))
    parts = []
    for first in range(0, len(start), BATCH):
        rows = np.minimum(np.arange(first, first + BATCH), len(start) - 1)  # one size: nothing is compiled anew
        found = jax.device_get(_register(turned[rows], others[rows], start[rows]))
        parts.append([part[: len(start) - first] for part in found])
    similarity, moved = (np.concatenate(one) for one in zip(*parts, strict=True))
    return Fine(similarity, moved[:, :2] / max(images.shape[1:]), np.exp(moved[:, 2]), begun["flipped"])


@jax.jit
def _register(images: Array, others: Array, start: Array) -> tuple[Array, Array]:
    """Similarity (n,), and shift and logarithm of the zoom (n, 3)."""
    return jax.vmap(_register_one)(images, others, start)


def _register_one(image: Array, other: Array, start: Array) -> tuple[Array, Array]:
    first = jnp.concatenate([start, jnp.zeros(1)])

    def step(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        at, best, best_at = state
        residual = lambda p: _residual(image, other, p)  # noqa: E731
        r, jacobian = residual(at), jax.jacfwd(residual)(at)
        similarity = 1 - 0.5 * jnp.sum(r**2)
        better = similarity > best
        best, best_at = jnp.where(better, similarity, best), jnp.where(better, at, best_at)
        normal = jacobian.T @ jacobian
        damped = normal + 1e-3 * jnp.diag(jnp.diag(normal)) + 1e-9 * jnp.eye(len(at))
        moved = jnp.clip(at - jnp.linalg.solve(damped, jacobian.T @ r), -LIMITS, LIMITS)
        return (jnp.where(jnp.all(jnp.isfinite(moved)), moved, best_at), best, best_at), None

    (_, best, at), _ = jax.lax.scan(step, (first, jnp.array(-jnp.inf), first), None, length=STEPS)
    return best, at


def _laid_over(other: Array, at: Array) -> tuple[Array, Array]:
    """The second image as it lies under the first, and 1 where it does."""
    height, width = other.shape
    cy, cx = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - cy, jnp.arange(width) - cx, indexing="ij")
    y, x = (y - at[0]) / jnp.exp(at[2]) + cy, (x - at[1]) / jnp.exp(at[2]) + cx
    inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    return jax.scipy.ndimage.map_coordinates(other, [y, x], order=1, mode="nearest"), inside.astype(other.dtype)


def _residual(image: Array, other: Array, at: Array) -> Array:
    """Difference of the two standardised images where both are; its squared length is 2 - 2 r."""
    laid, inside = _laid_over(other, at)
    inside = jax.lax.stop_gradient(inside)
    return (_unit(image, inside) - _unit(laid, inside)).ravel()


def _unit(image: Array, inside: Array) -> Array:
    centred = (image - jnp.sum(image * inside) / jnp.maximum(jnp.sum(inside), 1.0)) * inside
    return centred / jnp.sqrt(jnp.maximum(jnp.sum(centred**2), 1e-8))
