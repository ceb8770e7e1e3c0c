"""Draw synthetic images from a run, marked with where they come from."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medvdm import data as data_
from medvdm.errors import InputError
from medvdm.models.generate import Generated, batches, collected
from medvdm.runs import provenance as provenance_
from medvdm.runs.config import InpaintConfig, SampleConfig, settings
from medvdm.runs.run import Run
from medvdm.training.devices import Layout, barrier, first_process, joined, own_parts

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
        """Write .npz, .png or DICOM, marked as synthetic; see :func:`medvdm.runs.provenance.write_samples`."""
        provenance_.write_samples(
            path,
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
    z: np.ndarray | Sequence[np.ndarray] | None = None,
    first: int | None = None,
    num_states: int = 1,
    **changes: Any,
) -> Samples:
    """Draw synthetic images, on all devices of all processes; every process returns all of them.

    Args:
        run: from :func:`load`.
        num: how many; as in ``config`` if None.
        config: the settings.
        z, first, num_states: see :func:`medvdm.models.generate.generate`.
        changes: settings of :class:`medvdm.runs.config.SampleConfig` by name: ``steps``, ``sampler``, ``eta``,
            ``grid``, ``label`` (the name of a class, or several names for images that carry all of them),
            ``guidance``, ``seed``, ``batch_size``.

    Raises:
        InputError: an unknown setting, a bad count or seed, an unknown label, or a label for an unconditional model.
        RunError: a label, or the null, that was not trained (:meth:`medvdm.runs.run.Run.require_trained`).
    """
    config = settings(config, changes if num is None else {**changes, "num": num})
    findings = findings_of(run, config, config.num)
    count = _count(config)
    turns = own_parts(count)
    drawn = _batches(run, config, findings, turns, z=z, first=first, num_states=num_states)

    def everyones() -> Iterator[Generated]:
        for turn, mine in enumerate(drawn):
            every = joined([_full(mine, config)], jax.process_count())
            for process, part in enumerate(every):
                number = turn * jax.process_count() + process
                if number < count:
                    yield _cut(part, config.num - number * _size(config))

    whole = collected(drawn if jax.process_count() == 1 else everyones(), config.num)
    return Samples(
        images=whole.images,
        findings=findings,
        class_names=run.class_names,
        provenance=_provenance(run, config, z, first),
        states=whole.states,
        times=whole.times,
    )


def sample_to(
    path: str | Path, run: Run, num: int | None = None, config: SampleConfig = DEFAULTS, **changes: Any
) -> None:
    """Draw synthetic images into a file, on all devices of all processes.

    An archive (.npz) and DICOM files are written batch by batch: the memory is that of one batch, whatever ``num``. Of
    several processes, each draws its share of the batches into a part beside ``path`` (which all must be able to
    reach), and the first joins them. A grid (.png) is drawn in memory.

    Args:
        path: the file, .npz, .png or .dcm, replaced as a whole if it exists; or a folder for DICOM files. See
            :func:`medvdm.runs.provenance.write_samples` for the names of several.
        run, num, config, changes: as :func:`sample`.

    Raises:
        as :func:`sample` and :func:`medvdm.runs.provenance.write_samples`.
    """
    place, suffix = provenance_.place(path)
    config = settings(config, changes if num is None else {**changes, "num": num})
    channels = run.config.model.image_shape[2]
    if suffix != ".npz" and channels not in (1, 3):
        raise InputError(f"out: {place}: the run's images have {channels} channels; expected .npz, or 1 or 3 channels")
    if suffix == ".png":
        drawn = sample(run, config=config)
        if first_process():
            drawn.save(place)
        return
    findings = findings_of(run, config, config.num)
    mine = range(jax.process_index(), _count(config), jax.process_count())
    images = (part.images for part in _batches(run, config, findings, mine))
    write = partial(
        provenance_.write_samples,
        path,
        findings=findings,
        class_names=run.class_names,
        provenance=_provenance(run, config, None, None),
    )
    if jax.process_count() == 1:
        write(images=images)
        return
    token = int(joined([np.asarray(secrets.randbits(32))], jax.process_count())[0])  # the first process's, for all
    folder = place.parent / f".{place.name}.{token:08x}.parts"
    try:
        folder.mkdir(exist_ok=True)
        for number, part in zip(mine, images, strict=True):
            np.save(folder / f"{number}.npy", part)
        barrier("drawn")
        if first_process():
            write(images=(np.load(folder / f"{number}.npy") for number in range(_count(config))))
    finally:
        if first_process():
            shutil.rmtree(folder, ignore_errors=True)
    barrier("joined")


def drawer(run: Run, config: SampleConfig) -> Callable[[int], np.ndarray]:
    """Draws the batches of :func:`sample` one by one: gives the images (m, h, w, c) of the batch of a number from 0 on.

    Batch b holds the samples from ``b * batch_size`` on.

    Raises:
        at the call, as :func:`sample`.
    """
    findings = findings_of(run, config, config.num)
    _batches(run, config, findings, ())  # refuses what cannot be drawn, and draws nothing yet
    return lambda number: next(_batches(run, config, findings, [number])).images


def findings_of(run: Run, config: SampleConfig | InpaintConfig, n: int) -> np.ndarray:
    """The label of the settings as (n, k) multi-hot, n rows alike.

    Raises:
        InputError: a bad seed, an unknown label, or a label for an unconditional model.
        RunError: a label, or the null, that was not trained.
    """
    check_seed(config.seed)
    if config.label and not run.config.model.classes:
        raise InputError(f"label: '{config.label[0]}', but the run is unconditional; expected none")
    findings = np.zeros((max(n, 0), len(run.class_names)), np.uint8)
    findings[:, [data_.index_of(name, run.class_names, "label") for name in config.label]] = 1
    run.require_trained(null=not config.label or config.guidance != 0, classes=config.label)
    return findings


def _batches(
    run: Run, config: SampleConfig, findings: np.ndarray, numbers: Iterable[int], **more: Any
) -> Iterator[Generated]:
    """Some of the batches, each drawn on all devices of this process."""
    layout = Layout(max(_size(config), 1), local=True)
    return batches(
        run.graph,
        jax.device_put(run.params, layout.replicated),
        num=config.num,
        steps=config.steps,
        labels=findings.astype(np.float32) if config.label else None,
        guidance=config.guidance,
        solver=config.sampler,
        eta=config.eta,
        grid=config.grid,
        seed=config.seed,
        batch_size=config.batch_size,
        numbers=numbers,
        place=layout.put,
        **more,
    )


def _size(config: SampleConfig) -> int:
    """Samples per batch."""
    return min(config.num, config.batch_size)


def _count(config: SampleConfig) -> int:
    """Number of batches; 1 where a count is none, which is refused when the batches are asked for."""
    return -(-config.num // _size(config)) if _size(config) > 0 else 1


def _full(part: Generated, config: SampleConfig) -> Generated:
    """A batch filled up to the size of the others, as processes exchange batches of one size."""
    lacking = _size(config) - len(part.images)
    latents, states = (
        np.concatenate([a, np.repeat(a[:, -1:], lacking, 1)], axis=1) for a in (part.latents, part.states)
    )
    return Generated(states[-1], latents, states, part.times)


def _cut(part: Generated, left: int) -> Generated:
    """The first ``left`` samples of a batch."""
    return Generated(part.images[:left], part.latents[:, :left], part.states[:, :left], part.times)


def _provenance(
    run: Run, config: SampleConfig, z: np.ndarray | Sequence[np.ndarray] | None, first: int | None
) -> dict[str, Any]:
    return run.provenance(
        seed=config.seed,
        steps=config.steps,
        sampler=config.sampler,
        eta=config.eta,
        grid=config.grid,
        guidance=config.guidance,
        label=list(config.label),
        start=_start(z, first, config.steps),
    )


def _start(z: np.ndarray | Sequence[np.ndarray] | None, first: int | None, steps: int) -> str:
    """What the chain began from, for the provenance: a chain from an image's latent is no pure sample."""
    at = "" if first in (None, steps) else f" at step {first} of {steps}"
    if z is None:
        return f"N(0, I){at}"
    digest = hashlib.sha256()
    for part in [z] if isinstance(z, np.ndarray) else z:
        digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    at = at or f" at step {steps} of {steps}"
    return f"started from a given latent{at} (sha256 {digest.hexdigest()[:16]})"


def check_seed(seed: int) -> None:
    """Raise InputError unless JAX and NumPy can both take the seed."""
    if not 0 <= seed < 2**31:
        raise InputError(f"seed: {seed}; expected 0 to {2**31 - 1}")
