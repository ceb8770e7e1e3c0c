"""Draw synthetic images from a run, marked with where they come from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvdm import data as data_
from medvdm.errors import InputError
from medvdm.models.generate import generate
from medvdm.runs import provenance as provenance_
from medvdm.runs.config import SampleConfig, settings
from medvdm.runs.run import Run

DEFAULTS = SampleConfig()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Synthetic images with what is needed to mark them.

    Attributes:
        images: (n, h, w, c) float32 in [0, 1], the Bernoulli means.
        findings: (n, k) uint8, multi-hot: 1 where an image was drawn for a class; all 0 where no label was given.
        class_names: the names behind the indices.
        provenance: run, version, seed, ...
        states: (k, n, h, w, c) intermediate states, noisiest first; see :class:`medvdm.models.generate.Generated`.
        times: (k,) their times.
    """

    images: np.ndarray
    findings: np.ndarray
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    states: np.ndarray
    times: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(n,) class indices; -1 where no label was given, or several."""
        return provenance_.index_of_one(self.findings)

    def save(self, path: str | Path) -> None:
        """Write .npz or .png, marked as synthetic."""
        provenance_.write_samples(
            Path(path),
            images=self.images,
            findings=self.findings,
            class_names=self.class_names,
            provenance=self.provenance,
        )


def sample(
    run: Run,
    num: int | None = None,
    config: SampleConfig = DEFAULTS,
    *,
    z: np.ndarray | None = None,
    first: int | None = None,
    num_states: int = 1,
    **changes: Any,
) -> Samples:
    """Draw synthetic images.

    Args:
        run: from :func:`load`.
        num: how many; as in ``config`` if None.
        config: the settings.
        z, first, num_states: see :func:`medvdm.models.generate.generate`.
        changes: settings of :class:`medvdm.runs.config.SampleConfig` by name: ``steps``, ``label`` (the name of a
            class, or several names for images that carry all of them), ``guidance``, ``seed``.

    Raises:
        InputError: an unknown setting, a bad count or seed, an unknown label, or a label for an unconditional model.
    """
    config = settings(config, changes if num is None else {**changes, "num": num})
    num, seed, names = config.num, config.seed, run.class_names
    check_seed(seed)
    if config.label and not run.config.model.classes:
        raise InputError(f"label: '{config.label[0]}', but the run is unconditional; expected none")
    findings = np.zeros((max(num, 0), len(names)), np.uint8)
    findings[:, [data_.index_of(name, names, "label") for name in config.label]] = 1
    drawn = generate(
        run.graph,
        run.params,
        num=num,
        steps=config.steps,
        labels=findings.astype(np.float32) if config.label else None,
        guidance=config.guidance,
        seed=seed,
        z=z,
        first=first,
        num_states=num_states,
    )
    return Samples(
        images=drawn.images,
        findings=findings,
        class_names=names,
        provenance=run.provenance(
            seed=seed,
            steps=config.steps,
            guidance=config.guidance,
            label=list(config.label),
            start=_start(z, first, config.steps),
        ),
        states=drawn.states,
        times=drawn.times,
    )


def _start(z: np.ndarray | None, first: int | None, steps: int) -> str:
    """What the chain began from, for the provenance: a chain from an image's latent is no pure sample."""
    at = "" if first in (None, steps) else f" at step {first} of {steps}"
    if z is None:
        return f"N(0, I){at}"
    z = np.ascontiguousarray(z, np.float32)
    at = at or f" at step {steps} of {steps}"
    return f"started from a given latent{at} (sha256 {hashlib.sha256(z.tobytes()).hexdigest()[:16]})"


def check_seed(seed: int) -> None:
    """Raise InputError unless JAX and NumPy can both take the seed."""
    if not 0 <= seed < 2**31:
        raise InputError(f"seed: {seed}; expected 0 to {2**31 - 1}")
