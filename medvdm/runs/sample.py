"""Draw synthetic images from a run, marked with where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvdm import data as data_
from medvdm.errors import InputError
from medvdm.models.generate import generate
from medvdm.runs import provenance as provenance_
from medvdm.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Synthetic images with what is needed to mark them.

    Attributes:
        images: (n, h, w, c) float32 in [0, 1], the Bernoulli means.
        labels: (n,) class indices; -1 where no label was given.
        class_names: the names behind the indices.
        provenance: run, version, seed, ...
        states: (k, n, h, w, c) intermediate states, noisiest first; see :class:`medvdm.models.generate.Samples`.
        times: (k,) their times.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    states: np.ndarray
    times: np.ndarray

    def save(self, path: str | Path) -> None:
        """Write .npz or .png, marked as synthetic."""
        provenance_.write_samples(
            Path(path),
            images=self.images,
            labels=self.labels,
            class_names=self.class_names,
            provenance=self.provenance,
        )


def sample(
    run: Run,
    num: int = 16,
    *,
    steps: int = 250,
    label: str | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    z: np.ndarray | None = None,
    first: int | None = None,
    num_states: int = 1,
) -> Samples:
    """Draw synthetic images.

    Args:
        run: from :func:`load`.
        num: how many.
        steps: T of the ancestral chain.
        label: name of a class; None draws from the trained null (or an unconditional model).
        guidance: w in eps_hat = (1 + w) eps_hat(label) - w eps_hat(null); needs a label.
        seed: sample i of a seed is always the same.
        z, first, num_states: see :func:`medvdm.models.generate.generate`.

    Raises:
        InputError: a bad count or seed, an unknown label, or a label for an unconditional model.
    """
    check_seed(seed)
    labels, index = None, -1
    if label is not None:
        if not run.config.model.classes:
            raise InputError(f"label: '{label}', but the run is unconditional; expected none")
        index = data_.index_of(label, run.class_names, "label")
        labels = np.zeros((max(num, 1), len(run.class_names)), np.float32)
        labels[:, index] = 1.0
    drawn = generate(
        run.graph,
        run.params,
        num=num,
        steps=steps,
        labels=labels,
        guidance=guidance,
        seed=seed,
        z=z,
        first=first,
        num_states=num_states,
    )
    return Samples(
        images=drawn.images,
        labels=np.full(num, index, np.int64),
        class_names=run.class_names,
        provenance=run.provenance(seed=seed, steps=steps, guidance=guidance, label=label),
        states=drawn.states,
        times=drawn.times,
    )


def check_seed(seed: int) -> None:
    """Raise InputError unless JAX and NumPy can both take the seed."""
    if not 0 <= seed < 2**31:
        raise InputError(f"seed: {seed}; expected 0 to {2**31 - 1}")
