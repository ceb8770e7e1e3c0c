r"""What a model has memorised of canaries: the rank of a planted secret among secrets that it has never met.

A canary (:mod:`medvdm.data.planted`) is one of many images that differ in a secret only. With its loss among those of
R references, of which :math:`b` are smaller and :math:`e` equal,

.. math::

    \mathrm{rank} = 1 + b + e / 2, \qquad \mathrm{exposure} = \log_2 (R + 1) - \log_2 \mathrm{rank}.

Exposure counts the bits by which the model narrows the search for the secret, from 0 to :math:`\log_2(R + 1)`. A model
that has learnt nothing gives a uniform rank, and with it not 0 bits but, as the mean of :math:`-\ln u` over uniform
:math:`u` is 1, about :math:`1 / \ln 2 = 1.44` bits; :func:`chance_exposure` is exact.

Source: Carlini, Liu, Erlingsson, Kos and Song, "The Secret Sharer: Evaluating and Testing Unintended Memorization in
Neural Networks" (2019), definitions 4 and 5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medvdm.errors import InputError

FALSE_POSITIVES = 0.01  #: share of references that a test may take for planted


def ranks(canary_losses: np.ndarray, reference_losses: np.ndarray) -> np.ndarray:
    """Place of each canary's loss among those of its references: (N,), from 1 (the smallest) to R + 1; ties half each.

    Args:
        canary_losses: (N,), in any unit.
        reference_losses: (N, R) in the same unit, of the same X-rays with other secrets.

    Raises:
        InputError: shapes that do not fit together, no canary or reference, or a loss that is not finite.
    """
    canary, reference = np.asarray(canary_losses, np.float64), np.asarray(reference_losses, np.float64)
    if canary.ndim != 1 or reference.ndim != 2 or len(reference) != len(canary) or 0 in reference.shape:
        raise InputError(
            f"losses: shapes {canary.shape} and {reference.shape}; expected (N,) of canaries and (N, R) of references"
        )
    if not (np.isfinite(canary).all() and np.isfinite(reference).all()):
        raise InputError("losses: values that are not finite; expected numbers")
    smaller = (reference < canary[:, None]).sum(axis=1)
    equal = (reference == canary[:, None]).sum(axis=1)
    return 1 + smaller + equal / 2


def exposure(canary_losses: np.ndarray, reference_losses: np.ndarray) -> np.ndarray:
    r"""Exposure of each canary in bits, :math:`\log_2(R + 1) - \log_2 \mathrm{rank}`: (N,), 0 to :func:`most_exposure`.

    Arguments and errors: as of :func:`ranks`.
    """
    return most_exposure(np.shape(reference_losses)[-1]) - np.log2(ranks(canary_losses, reference_losses))


def most_exposure(references: int) -> float:
    r"""The largest exposure that R references can show, :math:`\log_2(R + 1)` bits."""
    return math.log2(references + 1)


def chance_exposure(references: int) -> float:
    r"""Mean exposure in bits where the rank is uniform on 1, ..., R + 1: what a model shows that has learnt nothing.

    .. math:: \log_2 (R + 1) - \frac{1}{R + 1} \sum_{k=1}^{R+1} \log_2 k = \log_2(R + 1) - \frac{\log_2 (R + 1)!}{R + 1}

    By Stirling's formula it rises to :math:`1 / \ln 2 = 1.4427`.
    """
    n = references + 1
    return math.log2(n) - math.lgamma(n + 1) / (n * math.log(2))


def summary(copies: np.ndarray, canary_losses: np.ndarray, reference_losses: np.ndarray) -> dict[str, Any]:
    """What the ranks say, for each number of copies.

    Canaries are independent of each other under a model that has learnt nothing; so the standard errors count them, and
    are None for a single one. The false positives of a test are references: with fewer than 99, none can be 1 % of
    them, and its numbers are None.

    Args:
        copies: (N,) how often each canary is in the training images.
        canary_losses: (N,), see :func:`ranks`.
        reference_losses: (N, R).

    Returns:
        JSON-ready: ``num_canaries``, ``references`` (R), ``exposure_most``, ``exposure_chance`` (in bits),
        ``tpr_chance`` (the exact share of a uniform rank), and ``by_copies``, a list in rising order of ``copies`` with
        ``num_canaries``, the mean ``exposure`` in bits, ``auc`` (the share of references with a larger loss, ties half;
        0.5 is chance) and ``tpr`` (the share of canaries with a loss below the 1 % quantile of their references', so
        that one in a hundred references is taken for planted at most), each with ``..._stderr``.

    Raises:
        InputError: as :func:`ranks`, or other than one number of copies per canary.
    """
    rank = ranks(canary_losses, reference_losses)
    num_references = np.shape(reference_losses)[1]
    copies = np.asarray(copies)
    if copies.shape != rank.shape:
        raise InputError(f"copies: shape {copies.shape}; expected {rank.shape}, one per canary")
    last = math.floor(FALSE_POSITIVES * (num_references + 1) + 1e-9)  # the last rank that the test calls planted
    per_canary = {
        "exposure": most_exposure(num_references) - np.log2(rank),
        "auc": (num_references + 1 - rank) / num_references,
        "tpr": (rank <= last).astype(np.float64),
    }
    groups = []
    for number in np.unique(copies):
        mine = copies == number
        group: dict[str, Any] = {"copies": int(number), "num_canaries": int(mine.sum())}
        for name, values in per_canary.items():
            group |= {name: None, f"{name}_stderr": None} if name == "tpr" and not last else _mean(name, values[mine])
        groups.append(group)
    return {
        "num_canaries": len(rank),
        "references": num_references,
        "exposure_most": most_exposure(num_references),
        "exposure_chance": chance_exposure(num_references),
        "tpr_chance": last / (num_references + 1) if last else None,
        "by_copies": groups,
    }


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_stderr": error}
