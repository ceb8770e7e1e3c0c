"""A run on disk: where its files are, how they are written, and how a trained model is loaded from them.

=====================  ===================================================================================
``config.json``        version, settings, data and environment: the record that everything else is made from
``baselines.npz``      the baselines, fitted on the training images
``checkpoints/``       Orbax checkpoints
``metrics.jsonl``      one line a training step
``evaluations.jsonl``  one line a held-out evaluation during training
``results/``           one JSON an ``evaluate`` call
``audits/``            one JSON an ``audit`` call
``MODEL_CARD.md``      the model card, made from the files above
=====================  ===================================================================================
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import numpy as np

from medvdm import baselines as baselines_
from medvdm import config as config_
from medvdm import data as data_
from medvdm import devices, evaluation, marks, quality, sampling, vdm
from medvdm.checkpoints import Checkpoints
from medvdm.config import RunConfig
from medvdm.data import DataConfig, ImageData
from medvdm.errors import DataError, InputError, MissingFileError, RunError

CONFIG, BASELINES, CHECKPOINTS = "config.json", "baselines.npz", "checkpoints"
METRICS, EVALUATIONS, RESULTS, CARD = "metrics.jsonl", "evaluations.jsonl", "results", "MODEL_CARD.md"
AUDITS = "audits"


def version() -> str:
    """The installed version of medvdm."""
    return importlib.metadata.version("medvdm")


def environment() -> dict[str, str]:
    """What the run was computed with."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": devices.describe(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def data_record(data: ImageData) -> dict[str, Any]:
    """What the model card and a resumed run need to know of the data."""
    return {
        "name": data.name,
        "origin": data.origin,
        "split_rule": data.split_rule,
        "counts": data.counts(),
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "fingerprint": data.fingerprint(),
        "notes": list(data.notes),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file all at once: a reader, or a kill, never sees half of it."""
    with marks.atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, record: Any) -> None:
    """:func:`write_text` of a JSON value; NaN is refused rather than written."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises MissingFileError or RunError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: not found; expected the folder of a run") from None
    except (OSError, ValueError) as problem:
        raise RunError(f"{path}: {problem}; expected JSON written by medvdm") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (path / CONFIG).exists()


def read_record(path: Path) -> tuple[dict[str, Any], RunConfig]:
    """The record of a run and the settings in it; raises MissingFileError or RunError."""
    record = read_json(path / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise RunError(f"{path / CONFIG}: has no 'config'; expected the record of a run")
    return record, config_.from_json(record["config"], where=str(path / CONFIG))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with its record.

    Attributes:
        path: the run's folder.
        config: its settings.
        record: the content of ``config.json``.
        step: training steps behind these weights.
        weights: 'raw', or 'ema' for the moving average.
        graph: the model's static description, see :func:`medvdm.vdm.split`.
        params: its weights, a nested dict of arrays.
    """

    path: Path
    config: RunConfig
    record: dict[str, Any]
    step: int
    weights: str
    graph: nnx.GraphDef
    params: vdm.Params

    @cached_property
    def model(self) -> vdm.VDM:
        """The model as an object."""
        return vdm.merge(self.graph, self.params)

    @cached_property
    def baselines(self) -> baselines_.Baselines:
        """The baselines that were fitted on the run's training images."""
        return baselines_.load(self.path / BASELINES)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the run's data."""
        return tuple(self.record["data"]["class_names"])

    def metrics(self) -> list[dict[str, Any]]:
        """One record a training step."""
        return read_lines(self.path / METRICS)

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Where a sample of this run comes from, for the sample's file."""
        return {
            "run": self.path.name,
            "version": self.record["version"],
            "preset": self.config.preset,
            "data": self.record["data"]["name"],
            "data_fingerprint": self.record["data"]["fingerprint"],
            "step": self.step,
            "weights": self.weights,
            **more,
        }


def load(path: str | Path, *, ema: bool = False, step: int | None = None) -> Run:
    """Load a run's newest checkpoint, or that of a given step.

    Args:
        path: the run's folder.
        ema: load the moving average of the weights instead of the weights.
        step: an earlier step that is still kept (``keep_checkpoints``).

    Raises:
        MissingFileError: no run there.
        RunError: the checkpoint is missing, damaged or of another config; or the run keeps no average.
    """
    path = Path(path)
    record, config = read_record(path)
    if ema and not config.training.ema_decay:
        raise RunError(f"{path}: this run keeps no moving average (ema_decay is 0); expected one for --ema")
    if not (path / CHECKPOINTS).is_dir():
        raise MissingFileError(f"{path / CHECKPOINTS}: not found; expected at least one checkpoint")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: vdm.new_params(config.model, 0))
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    settings = config_.fingerprint(config)
    with Checkpoints(path / CHECKPOINTS, settings=settings, create=False) as checkpoints:
        step, params = checkpoints.restore_weights(like, "ema" if ema else "params", step)
    return Run(
        path=path,
        config=config,
        record=record,
        step=step,
        weights="ema" if ema else "raw",
        graph=vdm.graph_of(config.model),
        params=params,
    )


def load_data(run: Run, name: str | None = None, data_dir: str | None = None) -> ImageData:
    """The run's own data, or another source brought to the run's image size."""
    settings = run.config.data
    height, width, _ = run.config.model.image_shape
    if name is not None and name != settings.data:
        if height != width:
            raise InputError(f"data: the run's images are {height}x{width}; expected square ones for other data")
        settings = DataConfig(data=name, image_size=height)
    if data_dir is not None:
        settings = replace(settings, data_dir=data_dir)
    if settings.data not in data_.names() and name is None:
        raise InputError(
            f"data: the run was trained on '{settings.data}' given from Python; expected it to be given again"
        )
    return data_.load(settings)


def evaluate(
    run: Run,
    data: ImageData | None = None,
    *,
    split: str = "test",
    null: bool = False,
    draws: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    save: bool = True,
) -> dict[str, Any]:
    """Evaluate a run; see :func:`medvdm.evaluation.evaluate_weights` for the keys.

    Args:
        run: from :func:`load`.
        data: the images; the run's own data if None.
        split: 'train', 'val', 'test' or 'all'.
        null: evaluate a conditional model without the labels.
        draws, batch_size, seed: as in :func:`medvdm.evaluation.evaluate_weights`.
        save: also write the result into the run's folder and renew its model card.
    """
    own = data is None
    data = load_data(run) if data is None else data
    same = data.fingerprint() == run.record["data"]["fingerprint"]
    if own and not same:
        raise _changed(run)
    labelled = run.config.model.classes > 0 and not null
    if labelled and data.class_names != run.class_names:
        raise InputError(
            f"{data.name}: classes {', '.join(data.class_names)}; expected {', '.join(run.class_names)}, or --null"
        )
    found = evaluation.evaluate_weights(
        run.graph,
        run.params,
        data,
        split,
        baselines=run.baselines,
        null=null,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
    )
    result = {
        "run": run.path.name,
        "version": version(),
        "step": run.step,
        "weights": run.weights,
        "own_data": same,
        **found,
    }
    if save:
        (run.path / RESULTS).mkdir(exist_ok=True)
        name = f"{data.name}-{split}-{run.step}-{run.weights}" + ("-null" if null else "")
        name += "" if same else f"-{data.fingerprint()}"  # other data may bear the same name
        write_json(run.path / RESULTS / f"{name}.json", result)
        write_card(run.path)
    return result


def _changed(run: Run) -> RunError:
    return RunError(f"{run.path}: the data is no longer what the run was trained on (names, labels or pixels differ)")


def write_card(path: Path) -> None:
    """(Re)write the model card from the run's files."""
    record, _ = read_record(path)
    steps = read_lines(path / METRICS)
    last = steps[-1] if steps else None
    results = [read_json(p) for p in sorted((path / RESULTS).glob("*.json"))]
    marks.write_card(
        path / CARD,
        {
            **record,
            "training": {
                "steps_done": last["step"] if last else 0,
                "seconds": last["seconds"] if last else 0.0,
                "last": {k: v for k, v in last.items() if k.endswith("_bpd")} if last else {},
            },
            "evaluations": results,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Synthetic images with what is needed to mark them.

    Attributes:
        images: (n, h, w, c) float32 in [0, 1], the Bernoulli means.
        labels: (n,) class indices; -1 where no label was given.
        class_names: the names behind the indices.
        provenance: run, version, seed, ...
        states: (k, n, h, w, c) intermediate states, noisiest first; see :class:`medvdm.sampling.Samples`.
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
        marks.write_samples(
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
        z, first, num_states: see :func:`medvdm.sampling.generate`.

    Raises:
        InputError: a bad count or seed, an unknown label, or a label for an unconditional model.
    """
    if not 0 <= seed < 2**31:
        raise InputError(f"seed: {seed}; expected 0 to {2**31 - 1}")
    labels, index = None, -1
    if label is not None:
        if not run.config.model.classes:
            raise InputError(f"label: '{label}', but the run is unconditional; expected none")
        index = data_.index_of(label, run.class_names, "label")
        labels = np.zeros((max(num, 1), len(run.class_names)), np.float32)
        labels[:, index] = 1.0
    drawn = sampling.generate(
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
        For each set, the result of :func:`medvdm.quality.audit`, and what they were computed from.

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
        "space": quality.Space(run.baselines.mean, run.baselines.components, run.baselines.variances),
        "real_groups": patients,
        "train_groups": data.patients[train],
        "seed": seed,
    }
    result = {
        **run.provenance(seed=seed, steps_sampled=steps, label=label, guidance=guidance),
        "split": split,
        "num_held_out": len(held_out),
        **{name: quality.audit(images, groups=groups, **shared) for name, (images, groups) in sets.items()},
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
        raise _changed(run)
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
        evaluation.reconstruct(run.params, x[part], jax.random.fold_in(key, i), graph=run.graph)
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
