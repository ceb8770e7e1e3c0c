"""The bound of given images under a run, each with its standard error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import flax.nnx as nnx
import jax
import numpy as np

from medvdm.data.base import check_multi_hot
from medvdm.errors import InputError, InputTypeError
from medvdm.evaluation import held_out
from medvdm.images import as_images
from medvdm.models import vdm
from medvdm.models.likelihoods import check_levels
from medvdm.runs.run import Run
from medvdm.theory.bound import bits_per_dim

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """An estimate of -log p(x), or of a bound of it, of n images.

    Attributes:
        nats: (n,) mean over the draws.
        stderr: (n,) its standard error, in nats.
        draws: per image.
        image_shape: (height, width, channels).
    """

    nats: np.ndarray
    stderr: np.ndarray
    draws: int
    image_shape: tuple[int, int, int]

    @property
    def bits_per_dim(self) -> np.ndarray:
        """(n,) ``nats`` in bits per pixel and channel."""
        return bits_per_dim(self.nats, self.image_shape)

    @property
    def bits_per_dim_stderr(self) -> np.ndarray:
        """(n,) ``stderr`` in bits per pixel and channel."""
        return bits_per_dim(self.stderr, self.image_shape)


@dataclass(frozen=True, kw_only=True)
class ImageBound(PerImage):
    """The negative bound of n images, one value per image, in nats unless said otherwise.

    Attributes:
        nats: (n,) mean over the draws: an upper bound of -log p(x), up to ``stderr``.
        stderr: (n,) its standard error, from draws that follow one another in time.
        reconstruction, diffusion, prior: (n,) its three terms.
        floor: (n,) binary entropy of the pixels, below which no Bernoulli model can go; None for 8-bit gray values.
        draws: of time and noise per image.
        image_shape: (height, width, channels).
    """

    reconstruction: np.ndarray
    diffusion: np.ndarray
    prior: np.ndarray
    floor: np.ndarray | None

    @property
    def excess_bits_per_dim(self) -> np.ndarray:
        """(n,) bound - floor, in bits per pixel and channel: distortion and rate, the part that depends on the model.

        Raises:
            InputError: a model of gray values, whose bits have no floor that is known.
        """
        if self.floor is None:
            raise InputError("excess: the run's model of 8-bit gray values has no floor; expected bits_per_dim")
        return bits_per_dim(self.nats - self.floor, self.image_shape)


def bound(
    run: Run,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    draws: int = 16,
    batch_size: int = 32,
    seed: int = 0,
) -> ImageBound:
    r"""The negative bound of given images, each with its standard error.

    .. math:: \frac1S \sum_{s=1}^S \ell_s \quad\text{with the error}\quad
        \sqrt{\frac{1}{2 S (S - 1)} \sum_{s=2}^S (\ell_s - \ell_{s-1})^2},

    where :math:`\ell_s` is reconstruction + diffusion + prior loss of the image by one draw of time and noise, and S
    the number of ``draws``. The s-th time lies in the s-th part of the interval, so that what changes slowly with time
    is no error: the error falls as one over the root of ``draws``, at first faster, and is stated too large where they
    are few. The mean over the images of a split is that of :func:`evaluate` with the same ``draws``, ``batch_size`` and
    ``seed``.

    Args:
        run: from :func:`load`.
        images: (n, h, w) or (n, h, w, c), as many pixels as the run's; uint8, or float in [0, 1]. A run with an 8-bit
            likelihood takes uint8 only: :func:`medvdm.images.to_levels` rounds images in [0, 1].
        labels: for a conditional run, (n,) integers, positions in ``run.class_names``, or (n, k) of 0 and 1; the null,
            'no label given', if None.
        draws: of time and noise per image, the times spread evenly; at least 2.
        batch_size: images at a time.
        seed: of the draws.

    Raises:
        InputError: values that are not finite or outside [0, 1], another shape than the run's, labels that do not fit
            or for an unconditional run, draws below 2, a batch size below 1, or a seed of more than 32 bits.
        InputTypeError: images or labels of another dtype; images that are not uint8 for an 8-bit likelihood.
        RunError: labels, or the null, that the run was never trained with.
    """
    each = partial(_terms_of_batch, draws=draws)
    terms, floor = by_batches(run, images, labels, each, draws=draws, batch_size=batch_size, seed=seed)
    return ImageBound(
        nats=terms.total.mean(axis=0),
        stderr=terms.stderr,
        **{name: term.mean(axis=0) for name, term in terms._asdict().items()},
        floor=floor,
        draws=draws,
        image_shape=run.config.model.image_shape,
    )


def by_batches(
    run: Run,
    images: np.ndarray,
    labels: np.ndarray | None,
    each: Callable[..., T],
    *,
    draws: int,
    batch_size: int,
    seed: int,
) -> T:
    """Do the same with every batch of given images, which are taken and refused as :func:`bound` does.

    Args:
        run, images, labels, draws, batch_size, seed: of :func:`bound`.
        each: as :func:`medvdm.evaluation.held_out.by_batches` takes it, with the keyword ``graph`` besides.
    """
    images = _levels(np.asarray(images)) if run.eight_bit else as_images(np.asarray(images))
    shape = run.config.model.image_shape
    if images.shape[1:] != shape:
        raise InputError(f"images: shape {images.shape}; expected (n, *{shape}), that of the run")
    held_out.check_counts(draws, batch_size, seed)
    if draws < 2:
        raise InputError(f"draws: {draws}; expected at least 2, for a standard error")
    run.require_trained(null=labels is None, labels=labels is not None)
    hot = None if labels is None else _multi_hot(np.asarray(labels), len(images), run)
    return held_out.by_batches(
        lambda rows: (images[rows], None if hot is None else hot[rows]),
        len(images),
        partial(each, graph=run.graph),
        run.params,
        batch_size=batch_size,
        seed=seed,
    )


def _terms_of_batch(
    params: vdm.Params,
    x: np.ndarray,
    on_devices: jax.Array,
    labels: jax.Array | None,
    key: jax.Array,
    *,
    graph: nnx.GraphDef,
    draws: int,
) -> tuple[held_out.Terms, np.ndarray | None]:
    key_terms, _ = jax.random.split(key)  # as an evaluation does, whose second key is for its pictures
    terms = held_out.bound_terms(graph, params, on_devices, labels, draws=draws, key=key_terms)
    return terms, None if x.dtype == np.uint8 else held_out.entropy(x)


def _levels(images: np.ndarray) -> np.ndarray:
    """Images (n, h, w, c) of gray values, which are never rounded here."""
    check_levels(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise InputError(f"images: shape {images.shape}; expected (n, h, w) or (n, h, w, c), none of them 0")
    return images


def _multi_hot(labels: np.ndarray, n: int, run: Run) -> np.ndarray:
    """Labels as float32 (n, k) of 0 and 1."""
    k = run.config.model.classes
    if not k:
        raise InputError("labels: given, but the run is unconditional; expected none")
    if labels.shape == (n, k) and labels.dtype.kind in "buif":
        check_multi_hot(labels)
        return labels.astype(np.float32)
    if labels.shape != (n,):
        raise InputError(f"labels: shape {labels.shape}, {labels.dtype}; expected {(n,)}, or {(n, k)} of 0 and 1")
    if labels.dtype.kind not in "ui":
        raise InputTypeError(f"labels: dtype {labels.dtype}; expected integers, positions in class_names")
    if labels.min() < 0 or labels.max() >= k:
        raise InputError(f"labels: {labels.min()} to {labels.max()}; expected 0 to {k - 1}, positions in class_names")
    return np.eye(k, dtype=np.float32)[labels]
