"""Audit a run: its samples held against real images, and three other sets of images beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from medvdm import data as data_
from medvdm.data import ImageData
from medvdm.errors import DataError, InputError
from medvdm.evaluation import held_out as held_out_
from medvdm.evaluation.audit import LEAST_IMAGES, LEAST_PATIENTS, Distances, Set, Space, compare_set, distances, draw
from medvdm.models.vdm import Params
from medvdm.runs.config import AuditConfig, SampleConfig, settings
from medvdm.runs.model_card import renew_card
from medvdm.runs.run import Run, as_seen, changed, load_data
from medvdm.runs.sample import check_seed, sample
from medvdm.runs.store import AUDITS, check_writable, write_json
from medvdm.training.devices import first_process, joined, own_parts

PART = 2**24  #: values of the part of the training images that is in memory at a time: 64 MiB
DEFAULTS = AuditConfig()


def audit(
    run: Run,
    data: ImageData | None = None,
    config: AuditConfig = DEFAULTS,
    *,
    save: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Draw samples and audit them; the same audits of the sets of :func:`audit_sets` stand beside them.

    All sets have one number of images, ``num_images`` of the result: several of the audits depend on it.

    Args:
        run: from :func:`load`.
        data: the run's own data, where it has to be given again; loaded if None.
        config: the settings.
        save: also write the result into the run's folder, under ``audits/``, and renew its model card.
        changes: settings of :class:`medvdm.runs.config.AuditConfig` by name: ``num``, ``split``, ``label``, ...

    Returns:
        For each set, the result of :func:`medvdm.evaluation.audit.audit_set`, and what they were computed from.

    Raises:
        InputError: an unknown setting, fewer than 10 samples, another split, fewer than four held-out patients, or as
            in :func:`sample`.
        RunError: data that the run was not trained on.
        DataError: the split has no image, or none with the label.
    """
    config = settings(config, changes)
    run.require_whole("the baselines and what tells its data")
    if save:
        check_writable(run.path / AUDITS)
    data = load_data(run) if data is None else data
    sets = audit_sets(run, data, config)
    held_out = sets.pop("held_out")
    space = Space(run.baselines.mean, run.baselines.components, run.baselines.variances)
    nearest = nearest_training(sets, as_seen(run, data), space)
    result = {
        **run.provenance(
            seed=config.seed, steps_sampled=config.steps, label=list(config.label), guidance=config.guidance
        ),
        "split": config.split,
        "num_images": len(held_out.images),
        **{
            name: compare_set(one, held_out, space, seed=config.seed) | nearest[name].summary()
            for name, one in sets.items()
        },
    }
    if save and first_process():
        (run.path / AUDITS).mkdir(exist_ok=True)
        name = f"{config.split}-{run.step}-{run.weights}-{len(held_out.images)}x{config.steps}-seed{config.seed}"
        if config.label:
            name += f"-{'+'.join(str(i) for i in _indices(config, run))}-w{config.guidance:g}"
        write_json(run.path / AUDITS / f"{name}.json", result)
        renew_card(run.path)
    return result


def audit_sets(
    run: Run,
    data: ImageData,
    config: AuditConfig = DEFAULTS,
    **changes: Any,
) -> dict[str, Set]:
    """The sets of images that an audit compares, each with the name of every image's patient, all of one size.

    ``samples`` of the run; ``decoded``, the held-out images through encoder and decoder, the best that samples can
    be (missing for a diffusion on pixels, whose z_0 is the image); ``linear_gaussian``, samples of the baseline
    (missing without one); ``real``, the yardstick, images of the other held-out split (missing where it has fewer than
    four patients or ten images); ``held_out``, the real images that all others are held against. A drawn image is a
    patient of its own.

    The size is ``num``, or what the smaller of the two splits has. Real images are drawn at random.

    Raises:
        as :func:`audit`.
    """
    config = settings(config, changes)
    num, split, seed = config.num, config.split, config.seed
    if num < LEAST_IMAGES:
        raise InputError(f"num: {num}; expected at least {LEAST_IMAGES}")
    if split not in ("val", "test"):
        raise InputError(f"split: '{split}'; expected held-out images, 'val' or 'test'")
    check_seed(seed)
    if data.fingerprint() != run.record["data"]["fingerprint"]:
        raise changed(run)
    data = as_seen(run, data)
    # Not training images: the components, which are a feature space of the audit, were fitted on those.
    held_out, other = data.indices(split), np.flatnonzero(data.splits == ("val" if split == "test" else "test"))
    if config.label:
        wanted = _indices(config, run)
        held_out, other = (i[data.labels[i][:, wanted].all(axis=1)] for i in (held_out, other))
        if not len(held_out):
            raise DataError(f"{data.name}: no image of '{' and '.join(config.label)}' in '{split}'; expected some")
    if (patients := _patients(held_out, data)) < LEAST_PATIENTS:
        raise InputError(f"split: '{split}' has images of {patients} patients; expected at least {LEAST_PATIENTS}")
    # A column of few images costs all sets their size.
    yardstick = len(other) >= LEAST_IMAGES and _patients(other, data) >= LEAST_PATIENTS
    n = min(num, len(held_out), *([len(other)] if yardstick else []))
    held_out = held_out[draw(len(held_out), n, seed)]
    if yardstick:
        other = other[draw(len(other), n, seed)]
        yardstick = _patients(other, data) >= LEAST_PATIENTS
    drawing = {f.name: getattr(config, f.name) for f in dataclasses.fields(SampleConfig)}
    drawn = sample(run, n, SampleConfig(**drawing)).images
    x = data.read(held_out)
    linear = run.baselines.sample(n, seed)
    sets = {
        "samples": Set(drawn, _each_its_own("sample", n)),
        # A latent of the image's shape shows the image itself, which says nothing about samples.
        "decoded": None if run.model.architecture.on_pixels else Set(_decoded(run, x, config), data.patients[held_out]),
        "linear_gaussian": None
        if linear is None
        else Set(linear.reshape(drawn.shape), _each_its_own("linear-Gaussian sample", n)),
        "real": Set(data.read(other), data.patients[other]) if yardstick else None,
        "held_out": Set(x, data.patients[held_out]),
    }
    return {name: given for name, given in sets.items() if given is not None}


def nearest_training(sets: dict[str, Set], data: ImageData, space: Space) -> dict[str, Distances]:
    """Distances of each set to the training images of other patients.

    The training images are read once, in parts of 64 MiB; of several processes, each reads its share.
    """
    train = data.indices("train")
    size = max(1, PART // np.prod(data.image_shape))
    count = -(-len(train) // size)

    def parts() -> Iterator[Set]:
        for number in own_parts(count):
            rows = train[number * size : (number + 1) * size]
            yield Set(data.read(rows), data.patients[rows])

    mine = distances(sets, parts(), space)
    every = joined([mine], jax.process_count())  # one result per process
    return {
        name: Distances(*(np.min([getattr(one[name], field) for one in every], axis=0) for field in Distances._fields))
        for name in sets
    }


def _decoded(run: Run, x: np.ndarray, config: AuditConfig) -> np.ndarray:
    """Images through encoder and decoder."""

    def each(params: Params, _: np.ndarray, on_devices: jax.Array, __: None, key: jax.Array) -> np.ndarray:
        x_hat = held_out_.reconstruct(params, on_devices, key, graph=run.graph)
        return np.moveaxis(np.asarray(x_hat), 0, -1)

    read = lambda rows: (x[rows], None)  # noqa: E731
    decoded = held_out_.by_batches(read, len(x), each, run.params, batch_size=config.batch_size, seed=config.seed)
    return np.moveaxis(decoded, -1, 0)


def _indices(config: AuditConfig, run: Run) -> list[int]:
    return [data_.index_of(name, run.class_names, "label") for name in config.label]


def _patients(rows: np.ndarray, data: ImageData) -> int:
    return len(set(data.patients[rows]))


def _each_its_own(name: str, num: int) -> np.ndarray:
    """Names of patients for images that have none: each is one of its own."""
    return np.array([f"{name} {i}" for i in range(num)])
