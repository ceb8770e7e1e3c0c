r"""What principal components in the files of a run give away by themselves, with no model asked.

A run keeps the mean and k principal components of training images (``baselines.npz``, and the ``basis`` of a
linear-start model). These are sums of training images. With :math:`k = n - 1` components of n images, every training
image lies in their span, and no other image does: :func:`residuals` tells them apart without an error. And the Gaussian
with these moments has seen nobody else, so it completes a training image of which a part is known
(:func:`complete`): who holds half of a patient's image gets the other half. Both end where n is many times k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medvdm.errors import InputError
from medvdm.evaluation.components import exact_components
from medvdm.evaluation.privacy.membership import attack

RIDGE = 0.1  #: noise of each pixel, as a share of the last published variance; those not published are below that


def residuals(images: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    r"""Share of each image's deviation from the mean that no combination of the components gives, (n,) from 0 to 1.

    .. math:: \frac{\|(I - U^T U)(x - \mu)\|^2}{\|x - \mu\|^2}

    Args:
        images: (n, ...) in the unit of the mean.
        mean: (P,) and components: (k, P), rows of unit length.

    Raises:
        InputError: images of another size.
    """
    offset = _offsets(images, mean)
    basis = np.asarray(components, np.float64)
    outside = offset - offset @ basis.T @ basis
    return np.sum(outside**2, axis=1) / np.maximum(np.sum(offset**2, axis=1), 1e-30)


def complete(
    images: np.ndarray,
    mean: np.ndarray,
    components: np.ndarray,
    variances: np.ndarray,
    known: np.ndarray,
    *,
    ridge: float = RIDGE,
) -> np.ndarray:
    r"""Images with the part that is not known replaced by the Gaussian's conditional mean; float64, of their shape.

    The law is :math:`x = \mu + U^T \Lambda^{1/2} w + s\, n` with standard normal w and n. From the known pixels, whose
    rows of :math:`U^T \Lambda^{1/2}` are A, follows :math:`E[w] = (A^T A + s^2 I)^{-1} A^T (x - \mu)_{known}`.

    Args:
        images: (n, h, w, c) in the unit of the mean.
        mean, components, variances: (P,), (k, P) and (k,), as :func:`exact_components` gives them.
        known: (h, w) bool.
        ridge: :math:`s^2` as a share of the last variance.

    Raises:
        InputError: images or a mask of another size, or a mask that knows all or nothing.
    """
    offset, seen = _offsets(images, mean), _pixels(known, images)
    loaded = np.asarray(components, np.float64) * np.sqrt(np.asarray(variances, np.float64))[:, None]
    a = loaded[:, seen]
    noise = ridge * float(variances[-1])
    w = np.linalg.solve(a @ a.T + noise * np.eye(len(a)), a @ offset[:, seen].T)
    completed = np.where(seen, offset, w.T @ loaded) + mean
    return completed.reshape(images.shape)


def agreement(images: np.ndarray, completed: np.ndarray, mean: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Correlation of true and completed pixels where the mask knows nothing, as deviations from the mean image: (n,).

    0 is what the mean image would give, which is no information about a person; 1 is the person's image.

    Raises:
        InputError: as :func:`complete`.
    """
    unseen = ~_pixels(known, images)
    pair = (_offsets(images, mean)[:, unseen], _offsets(completed, mean)[:, unseen])
    a, b = (x - x.mean(axis=1, keepdims=True) for x in pair)
    return np.sum(a * b, axis=1) / np.maximum(np.sqrt(np.sum(a**2, axis=1) * np.sum(b**2, axis=1)), 1e-30)


def left_half(images: np.ndarray) -> np.ndarray:
    """The mask (h, w) that knows the left half of images (n, h, w, c)."""
    return np.broadcast_to(np.arange(images.shape[2]) < images.shape[2] // 2, images.shape[1:3])


def components_give(
    train: np.ndarray,
    held_out: np.ndarray,
    mean: np.ndarray,
    components: np.ndarray,
    variances: np.ndarray,
    *,
    patients: Sequence[str] | np.ndarray,
    held_out_patients: Sequence[str] | np.ndarray,
    known: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What published components give away of the images that they were fitted on, as JSON takes it.

    Args:
        train, held_out: (n, h, w, c) images that the components were fitted on, and of other patients.
        mean, components, variances: what is published.
        patients, held_out_patients: whose the images are.
        known: (h, w) bool, the part of an image that the attacker holds; the left half if None.
        seed: of the resamples of :func:`medvdm.evaluation.privacy.membership.attack`.

    Returns:
        ``components``; ``residual_train`` and ``residual_held_out``, medians; ``attack`` by minus the residual; and
        ``completion_train`` and ``completion_held_out``, medians of :func:`agreement`.

    Raises:
        InputError: as :func:`complete` and the attack.
    """
    known = left_half(train) if known is None else known
    parts = {"train": train, "held_out": held_out}
    outside = {name: residuals(x, mean, components) for name, x in parts.items()}
    agree = {
        name: agreement(x, complete(x, mean, components, variances, known), mean, known) for name, x in parts.items()
    }
    scores = -np.concatenate([outside["train"], outside["held_out"]])
    people = np.concatenate([np.asarray(patients, str), np.asarray(held_out_patients, str)])
    return {
        "components": len(components),
        **{f"residual_{name}": float(np.median(values)) for name, values in outside.items()},
        "attack": attack(scores, np.arange(len(scores)) < len(train), people, seed=seed),
        **{f"completion_{name}": float(np.median(values)) for name, values in agree.items()},
    }


def table(
    train: np.ndarray,
    held_out: np.ndarray,
    *,
    patients: Sequence[str] | np.ndarray,
    held_out_patients: Sequence[str] | np.ndarray,
    images: Sequence[int],
    components: Sequence[int],
    known: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """:func:`components_give` for components of the first n training images, for each n and k; k = n - 1 always.

    Returns:
        Rows with ``images``, ``components``, ``auc``, ``auc_interval``, and the medians. A k above n - 1 is left out.

    Raises:
        InputError: an n of less than 2 or more than there are; otherwise as :func:`components_give`.
    """
    rows = []
    for n in images:
        if not 2 <= n <= len(train):
            raise InputError(f"images: {n}; expected 2 to {len(train)}, the number of training images")
        mean, directions, variances = exact_components(train[:n].reshape(n, -1), n - 1)
        for k in sorted({k for k in components if k < len(directions)} | {len(directions)}):
            found = components_give(
                *(train[:n], held_out, mean, directions[:k], variances[:k]),
                patients=patients[:n],
                held_out_patients=held_out_patients,
                known=known,
            )
            told = found.pop("attack")
            rows.append({"images": n, **found, "auc": told["auc"], "auc_interval": told["auc_interval"]})
    return rows


def _offsets(images: np.ndarray, mean: np.ndarray) -> np.ndarray:
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    if flat.shape[1:] != mean.shape:
        raise InputError(f"images: {flat.shape[1]} pixels per image; expected {mean.size}, as the mean has")
    return flat - mean


def _pixels(known: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The mask for the entries of a flat image, (P,)."""
    if known.shape != images.shape[1:3] or known.all() or not known.any():
        raise InputError(
            f"known: {int(known.sum())} pixels of a mask {known.shape}; expected a part of {images.shape[1:3]}"
        )
    return np.repeat(known.reshape(-1), images.shape[3])
