r"""Held-out evaluation: the three terms, their error, the floor of the data, and the baselines beside them.

What the numbers are, in bits per dimension unless said otherwise:

* ``vlb_bpd`` = reconstruction + diffusion + latent (prior), the negative bound;
* ``floor_bpd``, the mean binary entropy of the pixels: no Bernoulli model can go below it, see
  :func:`medvdm.models.likelihoods.bernoulli_floor`;
* ``excess_bpd`` = vlb - floor, the only part that a model can change;
* ``rate_bits_per_image`` = diffusion + latent in bits per image: what the latent is charged for what it tells;
* ``vlb_bpd_stderr``, over images, clustered by patient; ``vlb_bpd_stderr_noise``, over the draws of time and noise;
* ``over_lingauss_bpd`` = vlb - linear-Gaussian VDM on the same images (below 0: the model is better), with the standard
  error of that *paired* difference, clustered by patient.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import numpy as np
from jaxtyping import Array, Float

from medvdm.data import ImageData
from medvdm.errors import InputError
from medvdm.evaluation import baselines as baselines_
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.models import vdm
from medvdm.models.likelihoods import bernoulli_mean
from medvdm.theory import bound
from medvdm.training.batches import padded_batches


@partial(jax.jit, static_argnames=("graph",))
def _bound(
    params: vdm.Params, x: Array, labels: Array | None, key: Array, *, graph: nnx.GraphDef
) -> Float[Array, "3 n"]:
    terms = bound.terms(vdm.merge(graph, params), x, labels, key=key)
    return jax.numpy.stack([terms.reconstruction, terms.diffusion, terms.prior])


@partial(jax.jit, static_argnames=("graph",))
def reconstruct(params: vdm.Params, x: Array, key: Array, *, graph: nnx.GraphDef) -> Float[Array, "n h w c"]:
    """Images through the encoder, the least noise of the schedule, and the decoder: the Bernoulli means."""
    model = vdm.merge(graph, params)
    return bernoulli_mean(bound.decode_z0(model, model.encode(x), key))


def bound_terms(
    graph: nnx.GraphDef,
    params: vdm.Params,
    x: np.ndarray,
    labels: np.ndarray | None,
    *,
    draws: int,
    key: jax.Array,
) -> Float[np.ndarray, "draws 3 n"]:
    """Independent draws of (reconstruction, diffusion, latent) of each image, in nats per image."""
    return np.stack([_bound(params, x, labels, jax.random.fold_in(key, d), graph=graph) for d in range(draws)])


def quick(
    graph: nnx.GraphDef, params: vdm.Params, data: ImageData, indices: np.ndarray, *, batch_size: int, labelled: bool
) -> dict[str, float]:
    """One draw of the terms on a few images, for a look during training; bits per dimension."""
    parts = []
    for number, ((x, labels), count) in enumerate(padded_batches(data, indices, batch_size)):
        key = jax.random.fold_in(jax.random.key(0), number)
        parts.append(bound_terms(graph, params, x, labels if labelled else None, draws=1, key=key)[0, :, :count])
    means = bound.bits_per_dim(np.concatenate(parts, axis=1).mean(axis=1), data.image_shape)
    return {**dict(zip(TERMS, map(float, means), strict=True)), "vlb_bpd": float(means.sum())}


TERMS = ("reconstruction_bpd", "diffusion_bpd", "latent_bpd")


def evaluate_weights(
    graph: nnx.GraphDef,
    params: vdm.Params,
    data: ImageData,
    split: str,
    *,
    baselines: baselines_.Baselines | None = None,
    null: bool = False,
    draws: int = 8,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model on one split; the keys are explained in the module's head.

    Args:
        graph, params: the model.
        data, split: the images.
        baselines: fitted on the model's own training images; their entries are None without it.
        null: evaluate a conditional model without the labels.
        draws: independent draws of time and noise per image, at least 2 for an error over them.
        batch_size: images at a time.
        seed: of the draws.

    Raises:
        InputError: draws or batch_size below 1, a seed of more than 32 bits, or data of another shape or number of
            classes than the model.
        DataError: the split is empty.
    """
    start = time.perf_counter()
    config = vdm.merge(graph, params).config
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed}; expected 0 to {2**32 - 1}")
    if data.image_shape != config.image_shape:
        raise InputError(f"{data.name}: images of shape {data.image_shape}; expected {config.image_shape}")
    labelled = config.classes > 0 and not null
    if labelled and len(data.class_names) != config.classes:
        raise InputError(f"{data.name}: {len(data.class_names)} classes; expected {config.classes}, or --null")
    indices = data.indices(split)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("terms", "floor", "mean_image", "pca64", "lingauss", "lingauss_rate", "psnr", "ssim")
    }
    for number, ((x, labels), count) in enumerate(padded_batches(data, indices, min(batch_size, len(indices)))):
        key = jax.random.fold_in(jax.random.key(seed), number)
        key_terms, key_picture = jax.random.split(key)
        terms = bound_terms(graph, params, x, labels if labelled else None, draws=draws, key=key_terms)
        x_hat = np.asarray(reconstruct(params, x, key_picture, graph=graph))[:count]
        x = x[:count]
        columns["terms"].append(terms[:, :, :count])
        columns["floor"].append(_entropy(x))
        columns["psnr"].append(-10.0 * np.log10(np.maximum(np.mean((x - x_hat) ** 2, axis=(1, 2, 3)), 1e-12)))
        columns["ssim"].append(_ssim(x, x_hat))
        if baselines is not None:
            columns["mean_image"].append(baselines.mean_image(x))
            columns["pca64"].append(baselines.pca(x))
            linear = baselines.linear_gaussian(x)
            columns["lingauss"].append(None if linear is None else linear[0] + linear[1])
            columns["lingauss_rate"].append(None if linear is None else linear[1])

    def mean(name: str) -> float | None:
        parts = columns[name]
        return None if not parts or parts[0] is None else float(np.concatenate(parts).mean())

    def bpd(nats: float | None) -> float | None:
        return None if nats is None else float(bound.bits_per_dim(nats, config.image_shape))

    terms = np.concatenate(columns["terms"], axis=2).astype(np.float64)  # draws, term, image
    patients = data.patients[indices]
    totals = terms.sum(axis=1)
    by_draw = totals.mean(axis=1)
    noise = float(by_draw.std(ddof=1) / math.sqrt(draws)) if draws > 1 else math.nan
    vlb_nats, floor = float(totals.mean()), mean("floor")
    lingauss_rate = mean("lingauss_rate")
    over, over_stderr = None, None
    if lingauss_rate is not None:
        difference = totals.mean(axis=0) - np.concatenate(columns["lingauss"])
        over, over_stderr = float(difference.mean()), clustered_stderr(difference, patients)
    result = {
        "data": data.name,
        "split": split,
        "labels": "true" if labelled else "null" if config.classes else "none",
        "num_images": len(indices),
        "num_patients": len(set(patients)),
        "draws": draws,
        **{name: bpd(float(terms[:, i].mean())) for i, name in enumerate(TERMS)},
        "vlb_bpd": bpd(vlb_nats),
        "vlb_bpd_stderr": bpd(clustered_stderr(totals.mean(axis=0), patients)),
        "vlb_bpd_stderr_noise": bpd(noise),
        "floor_bpd": bpd(floor),
        "excess_bpd": bpd(vlb_nats - floor),
        "vlb_nats_per_image": vlb_nats,
        "rate_bits_per_image": float(terms[:, 1:].sum(axis=1).mean()) / math.log(2.0),
        "psnr_db": mean("psnr"),
        "ssim": mean("ssim"),
        "mean_image_bpd": bpd(mean("mean_image")),
        "pca64_bpd": bpd(mean("pca64")),
        "lingauss_bpd": bpd(mean("lingauss")),
        "over_lingauss_bpd": bpd(over),
        "over_lingauss_bpd_stderr": bpd(over_stderr),
        "lingauss_rate_bits_per_image": None if lingauss_rate is None else lingauss_rate / math.log(2.0),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in result.items()}


def _entropy(x: np.ndarray) -> np.ndarray:
    """Binary entropy of the pixels in nats per image; float64, as it is a floor that others are compared with."""
    from scipy.special import entr

    x = x.reshape(len(x), -1).astype(np.float64)
    return (entr(x) + entr(1.0 - x)).sum(axis=1)


def _ssim(x: np.ndarray, x_hat: np.ndarray) -> np.ndarray | None:
    """SSIM (scikit-image's, 7x7 window, data range 1) of each image; None for images too small for the window."""
    from skimage.metrics import structural_similarity

    if min(x.shape[1:3]) < 7:
        return None
    pairs = zip(x, x_hat, strict=True)
    return np.array([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs])
