"""Sets of images of which it is known whether they hold copies: run beside every audit, to say if it can be trusted.

Must be found: training images with light noise, mirrored, shifted; draws of a model that has learnt twenty images by
heart; draws of a kernel density of the training images. Must be clean: held-out images, as they are and blurred.

Draws of a linear model with as many components as images are no copies, since each mixes all images: it is found by
what it publishes (:mod:`medvdm.evaluation.privacy.published`), not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from medvdm.evaluation.privacy.copies import Keep, Shelf, calibrate, flagged, measure, now, reduced, under

NUM = 100  #: images of each control
LEAST = 0.5  #: share of a control that must be found
NOISE, SHIFT = 0.02, 0.05  #: light noise in gray values of [0, 1]; shift as a fraction of the side
MEMORISED = 20
BANDWIDTH = 0.02  #: deviation of the kernel density in gray values


def noisy(images: np.ndarray, rng: np.random.Generator, deviation: float = NOISE) -> np.ndarray:
    """With normal noise, clipped to [0, 1]."""
    return np.clip(images + rng.normal(0, deviation, images.shape), 0, 1).astype(np.float32)


def mirrored(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left and right exchanged."""
    return images[:, :, ::-1].copy()


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each by up to 5 % of the side in both directions, the border repeated."""
    from scipy.ndimage import shift

    side = max(images.shape[1:3])
    moves = rng.uniform(-SHIFT, SHIFT, (len(images), 2)) * side
    return np.stack([shift(x, (*m, 0), order=1, mode="nearest") for x, m in zip(images, moves, strict=True)])


def blurred(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With a deviation of 1/32 of the side, about as smooth as a latent model's samples."""
    from scipy.ndimage import gaussian_filter

    sigma = max(images.shape[1:3]) / 32
    return gaussian_filter(images, (0, sigma, sigma, 0))


def as_they_are(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unchanged."""
    return images


#: Controls that must be found: name, what is done to training images, and how many different ones are drawn from.
FOUND: dict[str, tuple[Callable[..., np.ndarray], int | None]] = {
    "training images, noise": (noisy, None),
    "training images, mirrored": (mirrored, None),
    "training images, shifted": (shifted, None),
    "memoriser of 20 images": (lambda x, rng: noisy(blurred_little(x), rng, 0.01), MEMORISED),
    "kernel density": (lambda x, rng: noisy(x, rng, BANDWIDTH), None),
}
#: Controls that must be clean, made of held-out images.
CLEAN = {"held-out images": as_they_are, "held-out images, blurred": blurred}


def blurred_little(images: np.ndarray) -> np.ndarray:
    """As an autoencoder blurs: a deviation of 1/128 of the side."""
    from scipy.ndimage import gaussian_filter

    sigma = max(images.shape[1:3]) / 128
    return gaussian_filter(images, (0, sigma, sigma, 0))


def control(name: str, train: Shelf, held_out: Shelf, num: int = NUM, seed: int = 0) -> Shelf:
    """The images of a control; draws with replacement where there are fewer than ``num``."""
    rng = np.random.default_rng([seed, *name.encode()])
    source = train if name in FOUND else held_out
    change, different = FOUND[name] if name in FOUND else (CLEAN[name], None)
    if name in CLEAN:  # each once
        rows = np.sort(rng.permutation(len(source))[:num])
    else:
        pool = rng.permutation(len(source))[: different or len(source)]
        rows = rng.choice(pool, num, replace=len(pool) < num)
    return Shelf.from_arrays(change(source.read(rows), rng), names=[f"{name} {i}" for i in range(len(rows))])


def run_controls(
    train: Shelf, held_out: Shelf, *, keep: Keep = now, alarm: float = 0.01, num: int = NUM, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Every control by the rule of :mod:`medvdm.evaluation.privacy.copies`.

    The threshold of the clean ones is calibrated on one half of the held-out patients, and they are the other half.

    Returns:
        By name: ``num``, ``found`` (the share called copies), ``must`` ('be found' or 'be clean') and ``behaved``: at
        least half of them found; or none called.
    """
    people = np.unique(held_out.patients)
    half = np.random.default_rng(seed).permutation(people)[: len(people) // 2]
    first = np.isin(held_out.patients, half)
    null, fresh = held_out.take(np.flatnonzero(first)), held_out.take(np.flatnonzero(~first))
    of_train = reduced(train, "train", keep=keep)
    of_null = measure(reduced(null, "control-null", keep=keep), of_train, keep=under("control-null", keep))
    out = {}
    for name in (*FOUND, *CLEAN):
        part = f"control-{name.replace(' ', '-').replace(',', '')}"
        images = control(name, train, fresh, num, seed)
        found = measure(reduced(images, part, keep=keep), of_train, keep=under(part, keep))
        share = float(flagged(found, calibrate(of_null, null.patients, len(images), alarm)).mean())
        must = "be found" if name in FOUND else "be clean"
        behaved = share >= LEAST if name in FOUND else share == 0
        out[name] = {"num": len(images), "found": share, "must": must, "behaved": bool(behaved)}
    return out
