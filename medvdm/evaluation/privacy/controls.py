"""Sets of images of which it is known whether they hold copies: run beside every audit, to say if it can be trusted.

Must be found: changed training images; draws of a kernel density of the training images, and of a model that has learnt
twenty of them by heart. Must be clean: held-out images, as they are and blurred, and draws of a linear Gaussian model.

The last learns from the training images all that it knows, and with as many components as images every draw is a
mixture of all of them. So none is a copy, and this audit rightly finds nothing there; whose images they were is told by
what the model publishes (:mod:`medvdm.evaluation.privacy.published`). A clean copy audit is no proof of privacy.

``mixed`` is the hardest. With only a few dozen held-out patients the threshold can be too high for it: then the
control does not behave, which says rightly that changed copies may pass. More held-out images help.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medvdm.errors import InputError
from medvdm.evaluation.components import exact_components
from medvdm.evaluation.privacy.search import Keep, Shelf, calibrate, flagged, measure, now, reduced, under

NUM = 100  #: images of each control
LEAST = 0.5  #: share of a control that must be found
NOISE, SHIFT = 0.02, 0.05  #: light noise in gray values of [0, 1]; shift as a fraction of the side
MEMORISED = 20  #: images that the memoriser knows
MIXED = 300  #: training images that the linear model is fitted on, at most
COMPONENTS = 32  #: of the linear model

#: Names of :func:`run_controls`: those that must be found, and those that must be clean.
FOUND = ("noise", "mirrored", "shifted", "mixed", "kernel density", "memoriser")
CLEAN = ("held-out", "held-out, blurred", "linear model")


def changed_copies(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Images (n, h, w, c) in [0, 1] changed in four ways, each of the same shape.

    ``noise``: normal, of deviation 0.02. ``mirrored``: left and right exchanged. ``shifted``: by up to 5 % of the side
    in both directions, the border repeated. ``mixed``: half of them mirrored, all shifted by up to 2.5 % and brightened
    or darkened (gray values to the power of 0.9 to 1.1), with noise.
    """
    rng = np.random.default_rng(seed)
    turned = np.where(rng.random(len(images))[:, None, None, None] < 0.5, images[:, :, ::-1], images)
    power = rng.uniform(0.9, 1.1, (len(images), 1, 1, 1))
    return {
        "noise": _noisy(images, NOISE, rng),
        "mirrored": images[:, :, ::-1].copy(),
        "shifted": _shifted(images, SHIFT, rng),
        "mixed": _noisy(_shifted(turned, SHIFT / 2, rng) ** power, NOISE, rng),
    }


def kernel_density(images: np.ndarray, bandwidth: float, n: int, seed: int) -> np.ndarray:
    """n draws of the mixture of normals of this deviation around the images (m, h, w, c): a model that only copies."""
    rng = np.random.default_rng(seed)
    return _noisy(images[rng.integers(len(images), size=n)], bandwidth, rng)


def memoriser(images: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n draws of a model that knows :data:`MEMORISED` of the images by heart, blurred a little, as autoencoders do."""
    rng = np.random.default_rng(seed)
    known = images[rng.permutation(len(images))[:MEMORISED]]
    return kernel_density(blurred(known, 1 / 128), 0.01, n, seed)


def linear_gaussian(images: np.ndarray, k: int, n: int, seed: int) -> np.ndarray:
    """n draws of the normal law with mean and k principal components of the images (m, h, w, c), clipped to [0, 1].

    With k = m - 1 it has their mean and covariance: every draw is a mixture of all images, and no copy.

    Raises:
        InputError: k is not 1 to m - 1.
    """
    if not 1 <= k < len(images):
        raise InputError(f"k: {k}; expected 1 to {len(images) - 1} components, for {len(images)} images")
    mean, components, variances = exact_components(images.reshape(len(images), -1), k)
    scores = np.random.default_rng(seed).standard_normal((n, len(variances))) * np.sqrt(variances)
    return np.clip(mean + scores @ components, 0, 1).astype(np.float32).reshape(n, *images.shape[1:])


def blurred(images: np.ndarray, deviation: float = 1 / 32) -> np.ndarray:
    """With a deviation as a fraction of the side; 1/32 is about as smooth as a latent model's samples."""
    from scipy.ndimage import gaussian_filter

    sigma = deviation * max(images.shape[1:3])
    return gaussian_filter(images, (0, sigma, sigma, 0))


def _noisy(images: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(images + deviation * rng.standard_normal(images.shape, np.float32), 0, 1).astype(np.float32)


def _shifted(images: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import shift

    moves = rng.uniform(-most, most, (len(images), 2)) * max(images.shape[1:3])
    return np.stack([shift(x, (*m, 0), order=1, mode="nearest") for x, m in zip(images, moves, strict=True)])


def run_controls(
    train: Shelf, held_out: Shelf, *, keep: Keep = now, alarm: float = 0.01, num: int = NUM, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Every control by the rule of :mod:`medvdm.evaluation.privacy.search`.

    The rule is calibrated on one half of the held-out patients; the clean images are of the other half.

    Returns:
        By name (:data:`FOUND`, :data:`CLEAN`): ``num``, ``found`` (the share called copies), ``must`` ('be found' or
        'be clean') and ``behaved``: at least half of them found, or none.

    Raises:
        InputError: held-out images of fewer than four patients, which leaves no two halves.
    """
    rng = np.random.default_rng(seed)
    people = np.unique(held_out.patients)
    if len(people) < 4:
        raise InputError(f"held_out: {len(people)} patients; expected at least 4, in two halves for the controls")
    half = rng.permutation(people)[: len(people) // 2]
    first = np.isin(held_out.patients, half)
    null, fresh = held_out.take(np.flatnonzero(first)), held_out.take(np.flatnonzero(~first))
    of_train = reduced(train, "train", keep=keep)
    of_null = measure(reduced(null, "control-null", keep=keep), of_train, keep=under("control-null", keep))
    some, clean = (shelf.read(np.sort(rng.permutation(len(shelf))[:num])) for shelf in (train, fresh))
    few = train.read(np.sort(rng.permutation(len(train))[:MIXED]))
    sets = {
        **changed_copies(some, seed),
        "kernel density": kernel_density(some, NOISE, num, seed),
        "memoriser": memoriser(some, num, seed),
        "held-out": clean,
        "held-out, blurred": blurred(clean),
        "linear model": linear_gaussian(few, min(COMPONENTS, len(few) - 1), num, seed),
    }
    out = {}
    for name in (*FOUND, *CLEAN):
        part = f"control-{name.replace(', ', '-').replace(' ', '-')}"
        images = reduced(Shelf.from_arrays(sets[name]), part, keep=keep)
        found = measure(images, of_train, keep=under(part, keep))
        share = float(flagged(found, calibrate(of_null, null.patients, len(images), alarm)).mean())
        must = "be found" if name in FOUND else "be clean"
        behaved = share >= LEAST if name in FOUND else share == 0
        out[name] = {"num": len(images), "found": share, "must": must, "behaved": bool(behaved)}
    return out
