"""Audit a run: its samples held against real images, and three other sets of images beside them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from medvdm import data as data_
from medvdm.data import ImageData
from medvdm.errors import DataError, InputError
from medvdm.evaluation import held_out as held_out_
from medvdm.evaluation.audit import Space, audit_set
from medvdm.runs.run import Run, changed, load_data
from medvdm.runs.sample import sample
from medvdm.runs.store import AUDITS, write_json


def audit(
    run: Run,
    data: ImageData | None = None,
    *,
    num: int = 256,
    steps: int = 250,
    label: str | None = None,
    guidance: float = 0.0,
    split: str = "test",
    seed: int = 0,
    save: bool = True,
) -> dict[str, Any]:
    """Draw samples and audit them; the same audits of :func:`audit_sets` stand beside them.

    Args:
        run: from :func:`load`.
        data: the run's own data, where it has to be given again; loaded if None.
        num: how many samples.
        steps, label, guidance: as in :func:`sample`.
        split: the real images that all are held against, 'val' or 'test'. With a label, those that have it.
        seed: of the samples, the pairs and the folds.
        save: also write the result into the run's folder, under ``audits/``.

    Returns:
        For each set, the result of :func:`medvdm.evaluation.audit.audit_set`, and what they were computed from.

    Raises:
        InputError: fewer than 10 samples, another split, or as in :func:`sample`.
        RunError: data that the run was not trained on.
        DataError: the split has no image, or none with the label.
    """
    data = load_data(run) if data is None else data
    sets = audit_sets(run, data, num=num, steps=steps, label=label, guidance=guidance, split=split, seed=seed)
    train = data.indices("train")
    held_out, patients = sets.pop("held_out")
    shared = {
        "real": held_out,
        "train": data.read(train),
        "space": Space(run.baselines.mean, run.baselines.components, run.baselines.variances),
        "real_groups": patients,
        "train_groups": data.patients[train],
        "seed": seed,
    }
    result = {
        **run.provenance(seed=seed, steps_sampled=steps, label=label, guidance=guidance),
        "split": split,
        "num_held_out": len(held_out),
        **{name: audit_set(images, groups=groups, **shared) for name, (images, groups) in sets.items()},
    }
    if save:
        (run.path / AUDITS).mkdir(exist_ok=True)
        name = f"{split}-{run.step}-{run.weights}-{num}x{steps}-seed{seed}"
        name += "" if label is None else f"-{data_.index_of(label, run.class_names, 'label')}-w{guidance:g}"
        write_json(run.path / AUDITS / f"{name}.json", result)
    return result


def audit_sets(
    run: Run,
    data: ImageData,
    *,
    num: int,
    steps: int,
    label: str | None = None,
    guidance: float = 0.0,
    split: str = "test",
    seed: int = 0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The sets of images that an audit compares, each with the name of every image's patient.

    ``samples`` of the run; ``decoded``, the held-out images through encoder and decoder, the best that samples can
    be; ``linear_gaussian``, samples of the baseline (missing without one); ``real``, the yardstick, images of the
    other held-out split (missing where it has fewer than four patients); ``held_out``, the real images that all others
    are held against. A drawn image is a patient of its own.

    Raises:
        as :func:`audit`.
    """
    if num < 10:
        raise InputError(f"num: {num}; expected at least 10")
    if split not in ("val", "test"):
        raise InputError(f"split: '{split}'; expected held-out images, 'val' or 'test'")
    if data.fingerprint() != run.record["data"]["fingerprint"]:
        raise changed(run)
    # Not training images: the components, which are a feature space of the audit, were fitted on those.
    held_out, other = data.indices(split), np.flatnonzero(data.splits == ("val" if split == "test" else "test"))
    if label is not None:
        index = data_.index_of(label, run.class_names, "label")
        held_out, other = (i[data.labels[i, index] > 0] for i in (held_out, other))
        if not len(held_out):
            raise DataError(f"{data.name}: no image of '{label}' in '{split}'; expected some")
    drawn = sample(run, num, steps=steps, label=label, guidance=guidance, seed=seed).images
    x, key = data.read(held_out), jax.random.key(seed)
    size = min(len(x), 64)
    rows = np.minimum(np.arange(-(-len(x) // size) * size), len(x) - 1).reshape(-1, size)  # the last part filled up
    decoded = [
        held_out_.reconstruct(run.params, x[part], jax.random.fold_in(key, i), graph=run.graph)
        for i, part in enumerate(rows)
    ]
    linear = run.baselines.sample(num, seed)
    sets = {
        "samples": (drawn, _strangers("sample", num)),
        "decoded": (np.concatenate(decoded)[: len(x)], data.patients[held_out]),
        "linear_gaussian": None
        if linear is None
        else (linear.reshape(drawn.shape), _strangers("linear-gaussian sample", num)),
        "real": (data.read(other), data.patients[other]) if len(set(data.patients[other])) >= 4 else None,
        "held_out": (x, data.patients[held_out]),
    }
    return {name: given for name, given in sets.items() if given is not None}


def _strangers(name: str, num: int) -> np.ndarray:
    return np.array([f"{name} {i}" for i in range(num)])
