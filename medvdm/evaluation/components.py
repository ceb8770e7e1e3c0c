"""Principal components of training images: exact where these fit in memory, by random projections where not."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PRNGKeyArray

from medvdm.errors import InputError
from medvdm.training import augmentation


def check_components(k: int, images: int, pixels: int, copies: int) -> None:
    """Raise InputError unless k components can be measured on the images and ``copies`` augmented copies of each."""
    most = min(images * (1 + copies) - 1, pixels)  # n images span n - 1 directions
    if not 0 < k <= most:
        wanted = f"1 to {most}" if most else "more images: one alone has no components"
        raise InputError(
            f"latent: {k}; expected {wanted}, for {images} training images of {pixels} pixels and {copies} "
            "augmented copies of each (basis_copies)"
        )


def principal_components(
    x: np.ndarray,
    k: int,
    *,
    key: PRNGKeyArray,
    copies: int = 0,
    batch_size: int = 64,
    rounds: int = 2,
    **augmentations: float,
) -> dict[str, Float[Array, "..."]]:
    """Mean, components and variances of images and of augmented copies of them, as :class:`Basis` holds them.

    A randomised subspace iteration (Halko, Martinsson & Tropp, 2011) that sees a batch at a time, so that the copies
    are never in memory together: k + 32 random combinations of the images, then ``rounds`` products with the
    covariance.

    Args:
        x: (n, h, w, c) training images in [0, 1].
        k: components wanted.
        key: of the augmentations and the random start.
        copies: augmented copies of each image, beside the image itself.
        augmentations: shift, size, exposure; see :func:`medvdm.training.augmentation.augment`.

    Raises:
        InputError: k is not below the number of images with their augmented copies, or above the number of pixels.
    """
    n, pixels = len(x), int(np.prod(x.shape[1:]))
    total = n * (1 + copies)
    check_components(k, n, pixels, copies if any(augmentations.values()) else 0)
    key_start, key_copies = jax.random.split(key)
    change = jax.jit(partial(augmentation.augment, **augmentations))

    def batches() -> Any:
        for copy in range(1 + copies):
            for start in range(0, n, batch_size):
                rows = jnp.asarray(x[start : start + batch_size])
                if copy:
                    rows = change(jax.random.fold_in(jax.random.fold_in(key_copies, copy), start), rows)
                yield rows.reshape(len(rows), pixels)

    mean = sum(jnp.sum(rows, axis=0) for rows in batches()) / total
    wide = min(k + 32, total, pixels)

    @jax.jit
    def start(rows: Array, mean: Array, key: Array) -> Array:
        return (rows - mean[None]).T @ jax.random.normal(key, (rows.shape[0], wide))

    @jax.jit
    def covary(rows: Array, mean: Array, q: Array) -> Array:
        return (rows - mean[None]).T @ ((rows - mean[None]) @ q)

    @jax.jit
    def inside(rows: Array, mean: Array, q: Array) -> Array:
        scores = (rows - mean[None]) @ q
        return scores.T @ scores

    span = sum(start(rows, mean, jax.random.fold_in(key_start, i)) for i, rows in enumerate(batches()))
    for _ in range(rounds):
        q = jnp.linalg.qr(span)[0]
        span = sum(covary(rows, mean, q) for rows in batches())
    q = jnp.linalg.qr(span)[0]
    values, vectors = jnp.linalg.eigh(sum(inside(rows, mean, q) for rows in batches()) / (total - 1))
    components = (q @ vectors[:, ::-1][:, :k]).T
    # A component is known up to its sign. Its largest entry is positive here, whatever the machine.
    largest = jnp.take_along_axis(components, jnp.argmax(jnp.abs(components), axis=1, keepdims=True), axis=1)
    return {
        "mean": mean,
        "components": components * jnp.sign(largest),
        "variances": jnp.maximum(values[::-1][:k], 1e-6),
    }


# IMPORTS


def exact_components(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (P,), components (k, P) and variances (k,) of the rows of x (n, P); n may be far below P.

    From the n x n Gram matrix, whose eigenvectors give the components: n^2 P operations instead of n P^2. Components
    of (numerically) no variance are left out, so fewer than k may come back.
    """
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = x - mean
    gram = (centred @ centred.T).astype(np.float64)
    largest = [max(len(x) - max(k, 1), 0), len(x) - 1]
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=largest, overwrite_a=True)  # in rising order
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    useful = values > 1e-6 * max(values[0], 1e-30) if len(values) else np.zeros(0, bool)
    values, vectors = values[useful], vectors[:, useful]
    components = (vectors / np.sqrt(values)).T.astype(np.float32) @ centred
    return mean, components, (values / max(len(x) - 1, 1)).astype(np.float32)
