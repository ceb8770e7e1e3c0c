"""Train a model: check everything, prepare the run's folder, and hand the rest to :mod:`medvdm.training.loop`.

The way goes down once. What can be refused is refused before anything is written. Then the folder is locked, the
baselines are fitted and the record is written; then training starts, or continues at the newest checkpoint. Before
:func:`fit` returns, the last checkpoint has been read back from the disk.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medvdm import data as data_
from medvdm.data import ImageData
from medvdm.data.planted import check_given
from medvdm.errors import DivergedError, InputError, RunError, StoppedError
from medvdm.evaluation import baselines, gaussian_images
from medvdm.evaluation.components import check_components, principal_components
from medvdm.models import vdm
from medvdm.paths import local_path
from medvdm.runs import config as config_
from medvdm.runs.config import RunConfig
from medvdm.runs.journal import MAX_LOOK, Looks, StepLog
from medvdm.runs.model_card import renew_card
from medvdm.runs.record import data_record, environment, version
from medvdm.runs.run import Run, require_whole
from medvdm.runs.store import (
    BASELINES,
    BEST,
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    GAUSSIAN,
    LOCK,
    METRICS,
    SECRET,
    holds_run,
    locked,
    read_record,
    write_json,
    write_secret,
)
from medvdm.training import loop, privacy_accounting, private
from medvdm.training.batches import private_batches, training_batches, training_indices, training_patients
from medvdm.training.checkpoints import Cadence, Checkpoints, check_folder, read_back
from medvdm.training.devices import Layout, barrier, describe, first_process, first_said, local
from medvdm.training.step import TrainState, augmentations, init_state, jit_step, learning_rate, new_state


def fit(
    config: RunConfig,
    out: str | Path,
    *,
    data: ImageData | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Train a model and leave a run in the folder ``out``.

    Args:
        config: the settings, for example from :func:`medvdm.runs.presets.preset`.
        out: the run's folder; made if need be.
        data: images from Python (:func:`medvdm.data.from_arrays`) instead of those that ``config.data`` names.
        resume: continue the run in ``out`` exactly where its newest checkpoint left it. With more ``steps`` than
            before, a finished run is extended: the learning rate follows the longer cosine from there on.
        progress: say on stderr what is trained on what, with the notes of the data, and show the progress.

    Returns:
        The finished run, with its weights. Its last checkpoint has been read back.

    Raises:
        InputError, DataError, MissingFileError: settings, data or a folder that cannot be used; nothing has been
            written.
        RunError: ``out`` holds a run already (without ``resume``), holds none or one of other settings (with it),
            another process is training into it, or the disk cannot hold the checkpoints.
        DivergedError: a loss or a weight is not finite; the last good checkpoint is intact.
        NotSavedError: the last checkpoint was written and does not read back.
        StoppedError: SIGTERM or Ctrl-C; the state has been saved, and read back.
    """
    out = local_path(out, "out")
    _check_out(out, resume)
    if data is None:
        data = data_.load(config.data)
    else:
        check_given(data, config.data)
        config = replace(config, data=replace(config.data, data=data.name))
    config = fill_in(config, data)
    layout = Layout(config.training.batch_size)
    _check_data(config, data)
    extension = None
    if resume:
        extension = _check_same(out, config, data)
    else:
        _check_room(out, config)
    progress = progress and first_process()
    notes = _notes(config, data) + ([extension] if extension else [])
    privacy = _privacy(config, data)
    if progress:
        _announce(config, data, [*notes, *([privacy_accounting.sentence(privacy)] if privacy else [])])
    with contextlib.ExitStack() as stack:
        stack.enter_context(_claimed(out, resume))
        images = None
        if extension:
            _extend(out, config, extension, privacy)
        elif not resume:
            images = _prepare(out, config, data, notes, privacy)
        if privacy and first_process() and not (resume and (out / SECRET).exists()):  # no two runs have the same noise
            write_secret(out / SECRET, f"{private.new_secret()}\n")
        barrier("prepared")
        record = read_record(out)[0]
        settings = {"settings": config_.fingerprint(config), "earlier": config_.earlier_fingerprints(config, record)}
        checkpoints = stack.enter_context(Checkpoints(out / CHECKPOINTS, keep=config.keep.keep_checkpoints, **settings))
        best = stack.enter_context(Checkpoints(out / BEST, keep=1, **settings)) if config.keep.keep_best else None
        like = _like(config, layout)
        if checkpoints.latest() is None:
            state = first_state(config, data, layout, images)
        else:
            state = checkpoints.restore(like)
        del images  # half a gigabyte that training has no use for
        state, stopped = _train(out, config, data, layout, state, checkpoints, best, progress=progress)
        step = int(state.step)
        read_back(out / CHECKPOINTS, like, step, settings=settings["settings"])
        if first_process():
            baselines.load(out / BASELINES)
            if _has_gaussian(config, data):
                gaussian_images.load(out / GAUSSIAN)
            renew_card(out)
            if step == config.training.steps:
                (out / SECRET).unlink(missing_ok=True)  # with it the noise could be taken away again
        barrier("finished")
    if stopped and step < config.training.steps:
        name = signal.Signals(stopped).name
        raise StoppedError(f"{name}: saved step {step} in {out}; continue with --resume", stopped)
    return Run(
        path=out,
        config=config,
        record=record,
        step=step,
        weights="raw",
        graph=vdm.graph_of(config.model),
        params=local(state.params),
    )


# --- Before anything is written --------------------------------------------------------------------------------------


def _check_out(out: Path, resume: bool) -> None:
    if out.is_symlink() and not out.exists():
        raise InputError(f"out: {out} is a link to nothing; expected a folder or a new name")
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"out: {existing} is a file; expected a folder or a new name")
    check_folder(out, "out")
    if (out / LOCK).exists():
        with locked(out):  # where a process is training into it right now, say so, and not what lies there already
            pass
    _check_content(out, resume)


def _check_content(out: Path, resume: bool) -> None:
    if resume and not holds_run(out):
        raise RunError(f"out: {out} holds no run to resume; expected one, or no --resume to start it")
    if resume:
        require_whole(out, read_record(out)[0], "the optimiser's state")
        return
    if holds_run(out):
        raise RunError(f"out: {out} holds a run already; expected a new folder, or --resume to continue it")
    left = [name for name in (CHECKPOINTS, BEST, METRICS, EVALUATIONS, BASELINES, GAUSSIAN) if (out / name).exists()]
    if left:
        raise RunError(f"out: {out} holds {left[0]} of a run without its {CONFIG}; expected a new or empty folder")


def fill_in(config: RunConfig, data: ImageData) -> RunConfig:
    """The config with the model's image shape and classes, which come from the data."""
    classes = len(data.class_names) if config.conditional else 0
    return replace(config, model=replace(config.model, image_shape=data.image_shape, classes=classes))


def _check_data(config: RunConfig, data: ImageData) -> None:
    """Refuse images that this model cannot be trained on."""
    indices = training_indices(data, config.training.batch_size)  # refuses a batch that is too large
    if config.training.dp_noise:
        training_patients(data, config.training.batch_size)  # likewise
        privacy_accounting.require()
    if config.model.reduce:
        config.model.base()  # refuses sides that cannot be reduced
    if config.training.crop > min(data.image_shape[:2]):
        raise InputError(
            f"crop: {config.training.crop}; expected at most {min(data.image_shape[:2])}, the images' side"
        )
    if config.keep.keep_best and not np.any(data.splits == "val"):
        raise InputError(f"keep_best: {data.name} has no validation images; expected some to judge the weights by")
    if vdm.ARCHITECTURES[config.model.architecture].measures_components:
        augmented = any(augmentations(config.training).values())
        check_components(
            config.model.latent,
            min(len(indices), baselines.MAX_IMAGES),
            config.model.dimensions,
            config.training.basis_copies if augmented else 0,
        )


def _check_same(out: Path, config: RunConfig, data: ImageData) -> str | None:
    """Refuse to resume with anything that would change the run; a note where it becomes longer."""
    record, old = read_record(out)
    before, now = config_.flat(old), config_.flat(config)
    for name, value in now.items():
        if name not in (*config_.FREE_ON_RESUME, "steps") and before[name] != value:
            raise RunError(f"{name}: {value}; expected {before[name]}, with which {out} was started (--resume)")
    if record["data"]["fingerprint"] != data.fingerprint():
        raise RunError(f"{data.name}: not the images that {out} was started with (names, labels, splits or pixels)")
    done, asked = old.training.steps, config.training.steps
    if asked == done:
        return None
    settings, earlier = config_.fingerprint(old), config_.earlier_fingerprints(old, record)
    step = None
    if (out / CHECKPOINTS).is_dir():
        with Checkpoints(out / CHECKPOINTS, settings=settings, earlier=earlier, create=False) as checkpoints:
            step = checkpoints.latest()
    if asked < done or step != done:
        where = "finished" if step == done else f"at step {step or 0}"
        raise RunError(
            f"steps: {asked}; expected {done}, with which {out} was started, or more once it is finished "
            f"(it is {where})"
        )
    ends, goes_on = (float(learning_rate(c.training)(done)) for c in (old, config))
    return (
        f"extended from {done:,} to {asked:,} steps: the learning rate had come down to {ends:.2g} on the cosine of "
        f"{done:,} steps and goes on at {goes_on:.2g}, on that of {asked:,}"
    )


def _check_room(out: Path, config: RunConfig) -> None:
    """Refuse to start where the disk cannot hold the checkpoints that are kept, and one being written."""
    state = jax.eval_shape(lambda: init_state(config.model, config.training))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed = size * (config.keep.keep_checkpoints + 1 + 2 * config.keep.keep_best)
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(f"out: {existing} has {free / 1e6:.0f} MB free; expected {needed / 1e6:.0f} MB for checkpoints")


def _notes(config: RunConfig, data: ImageData) -> list[str]:
    """What a reader of the log and of the model card should know of this run, beside the notes on its data."""
    training = config.training
    notes = list(data.level_use().notes) if config.model.integers else []
    if training.steps < training.warmup_steps:
        most = max(float(learning_rate(training)(k)) for k in range(training.steps))
        notes.append(
            f"the {training.steps:,} steps end inside the warm-up of {training.warmup_steps:,}: the learning rate "
            f"comes to {most:.2g} of the {training.learning_rate:.2g} asked for"
        )
    if config.model.classes:
        if training.label_dropout == 0:
            notes.append("label_dropout is 0: the null ('no label') is not trained, so it cannot be used")
        if training.label_dropout == 1:
            notes.append("label_dropout is 1: no label is trained, so only the null ('no label') can be used")
        trained = _trained_classes(config, data)
        if lacking := [name for name in data.class_names if name not in trained]:
            notes.append(f"no training image carries {', '.join(lacking)}: not trained, so it cannot be used")
    return notes


def _privacy(config: RunConfig, data: ImageData) -> dict[str, Any] | None:
    """What the record says of a training with ``dp_noise``: the promise and what it follows from; None without."""
    training = config.training
    if not training.dp_noise:
        return None
    patients = len(training_patients(data, training.batch_size))
    numbers = {
        "noise": training.dp_noise,
        "batch": training.batch_size,
        "patients": patients,
        "steps": training.steps,
        "delta": privacy_accounting.usual_delta(patients),
    }
    return {"epsilon": privacy_accounting.epsilon(**numbers), "unit": "patient", "clip": training.dp_clip, **numbers}


def _trained_classes(config: RunConfig, data: ImageData) -> list[str]:
    """The classes that a conditional model meets in training: those that some training image carries."""
    if not config.model.classes:
        return []
    seen = data.labels[data.splits == "train"].any(axis=0)
    return [name for name, there in zip(data.class_names, seen, strict=True) if there]


def _announce(config: RunConfig, data: ImageData, notes: list[str]) -> None:
    """One line on stderr that says what is trained on what, and one for each note."""
    counts = data.counts()
    splits = ", ".join(f"{of['images']:,} {split}" for split, of in counts.items())
    shape = jax.eval_shape(lambda: vdm.new_params(config.model, 0))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shape))
    people = sum(of["patients"] for of in counts.values())
    classes = _counted(len(data.class_names), "class", "classes") if config.model.classes else "unconditional"
    lines = [
        f"{data.name}: {len(data):,} images ({splits}) of {_counted(people, 'patient', 'patients')}, "
        f"{' x '.join(map(str, data.image_shape))}, {classes}; {parameters:,} parameters; {describe()}",
        *(f"note: {note}" for note in (*data.notes, *data.check_splits(), *notes)),
    ]
    for line in lines:
        print(" ".join(line.split()), file=sys.stderr)


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


# --- The folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(out: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder for this training; a folder made here goes away again unless it comes to hold a run."""
    if not first_process():
        yield
        return
    missing = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _check_content(out, resume)  # another process may have finished a run here meanwhile
            yield
    finally:
        if not holds_run(out):
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty: another process writes there
                    folder.rmdir()


def _prepare(
    out: Path, config: RunConfig, data: ImageData, notes: list[str], privacy: dict[str, Any] | None
) -> np.ndarray | None:
    """Fit the baselines and write the record; on any failure nothing of it stays. Returns the images it has read."""
    if not first_process():
        return None
    images = _basis_images(data)
    try:
        fitted = baselines.fit(
            images, data.read(_spread(np.flatnonzero(data.splits == "val"), baselines.MAX_VALIDATION_IMAGES))
        )
        baselines.save(fitted, out / BASELINES)
        if _has_gaussian(config, data):
            gaussian_images.save(_gaussian(data), out / GAUSSIAN)
        record = {
            "version": version(),
            "config": config_.to_json(config),
            "data": data_record(data, integers=config.model.integers),
            "environment": environment(),
            "trained_classes": _trained_classes(config, data),
            "notes": notes,
            "extended_from": [],
            **({"privacy": privacy} if privacy else {}),
        }
        write_json(out / CONFIG, record)
    except BaseException:
        for name in (BASELINES, GAUSSIAN):
            (out / name).unlink(missing_ok=True)
        raise
    return images


def _has_gaussian(config: RunConfig, data: ImageData) -> bool:
    """Whether the Gaussian of gray values is fitted: for a model of them, with images to choose its diagonal on."""
    return config.model.integers and bool(np.any(data.splits == "val"))


def _gaussian(data: ImageData) -> gaussian_images.GaussianImages:
    """The Gaussian of the training images, which are read in parts."""
    train = _spread(data.indices("train"), gaussian_images.MAX_IMAGES)
    validation = _spread(data.indices("val"), gaussian_images.MAX_VALIDATION_IMAGES)
    parts = (data.levels(train[first : first + 64]) for first in range(0, len(train), 64))
    return gaussian_images.fit(parts, data.levels(validation))


def _extend(out: Path, config: RunConfig, note: str, privacy: dict[str, Any] | None) -> None:
    """Write into the record that the run becomes longer, and what that costs in privacy."""
    if not first_process():
        return
    record, old = read_record(out)
    record["config"] = config_.to_json(config)
    record["extended_from"] = [*record["extended_from"], old.training.steps]
    record["notes"] = [*record["notes"], note]
    if privacy:
        record["privacy"] = privacy
    write_json(out / CONFIG, record)


def _basis_images(data: ImageData) -> np.ndarray:
    """The training images that baselines and components are measured on."""
    return data.read(_spread(data.indices("train"), baselines.MAX_IMAGES))


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the indices, evenly spread."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).astype(int)]


# --- Training --------------------------------------------------------------------------------------------------------


def first_state(config: RunConfig, data: ImageData, layout: Layout, images: np.ndarray | None = None) -> TrainState:
    """The state at step 0 of a config that is filled in, on the devices of ``layout``.

    A 'linear-start' model measures its components here, on (augmented copies of) the training images: on ``images``
    where these have been read already.
    """
    state = new_state(config.model, config.training, layout.replicated)
    if vdm.ARCHITECTURES[config.model.architecture].measures_components:
        with jax.default_matmul_precision("highest"):  # a GPU's short products would leave them orthogonal to 3 digits
            basis = principal_components(
                _basis_images(data) if images is None else images,
                config.model.latent,
                key=jax.random.fold_in(jax.random.key(config.training.seed), 2**31 - 1),  # no step has this number
                copies=config.training.basis_copies,
                **augmentations(config.training),
            )
        basis = jax.device_put(basis, layout.replicated)
        ema = None if state.ema is None else vdm.with_components(state.ema, jax.tree.map(jnp.copy, basis))
        state = state._replace(params=vdm.with_components(state.params, basis), ema=ema)
    return state


def _like(config: RunConfig, layout: Layout) -> TrainState:
    """The shapes and places of the state's arrays."""
    shapes = jax.eval_shape(lambda: init_state(config.model, config.training))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout.replicated), shapes)


def _train(
    out: Path,
    config: RunConfig,
    data: ImageData,
    layout: Layout,
    state: TrainState,
    checkpoints: Checkpoints,
    best: Checkpoints | None,
    *,
    progress: bool,
) -> tuple[TrainState, int]:
    """Give the loop what it asks for; returns the state, saved, and the signal that ended training early, or 0."""
    settings, steps, start = config.training, config.training.steps, int(state.step)
    validation = _spread(np.flatnonzero(data.splits == "val"), MAX_LOOK)
    evaluate_every = config.keep.every("evaluate", steps)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(StepLog(out, start)) if first_process() else None
        looks = Looks(out, config, data, validation, start) if first_process() else None
        bar = stack.enter_context(loop.Progress(start, steps, show=progress))
        asked = stack.enter_context(loop.stop_requests())
        cadence = Cadence(config.keep.every("checkpoint", steps), exact=config.keep.checkpoint_every > 0)

        def write(number: int, values: dict[str, float]) -> None:
            if log is not None:
                log.write(number, values)
            bar.update(values)

        def save(number: int, state: TrainState) -> None:
            if log is not None:
                log.flush()
            if best is not None:
                best.wait()  # a look that the record tells of is never newer than the weights it speaks of
            cadence.began()
            checkpoints.save(state)

        def save_due(number: int) -> bool:
            if not checkpoints.saving():
                cadence.ended()
            return cadence.due(number)

        def keep_best(number: int, state: TrainState) -> None:
            if best is not None and (best.latest() or 0) < number:
                best.save(state, weights_only=True)

        def look(number: int, state: TrainState) -> None:
            if len(validation) and first_said(looks is not None and looks.write(number, state)):
                keep_best(number, state)

        def stop(number: int) -> bool:
            if jax.process_count() > 1 and checkpoints.preempted(number):
                asked.signal = signal.SIGTERM
            return bool(asked.signal)

        if first_said(looks is not None and looks.best_step == start > 0):
            keep_best(start, state)  # killed between this look and its weights, or not asked for until now
        secret = int((out / SECRET).read_text()) if settings.dp_noise and start < steps else None
        batches_of = partial(training_batches, seed=settings.seed)
        if secret is not None:
            batches_of = partial(private_batches, secret=secret)
        batches = batches_of(
            data,
            batch_size=settings.batch_size,
            start=start,
            rows=layout.rows(settings.batch_size),
            integers=config.model.integers,
        )
        on_devices = (
            (layout.put(images), layout.put(labels) if config.model.classes else None) for images, labels in batches
        )
        hooks = loop.Hooks(
            log=write,
            save=save,
            look=look,
            save_due=save_due,
            look_due=lambda number: number % evaluate_every == 0,
            stop=stop,
        )
        try:
            state = loop.train(state, jit_step(config.model, settings, secret), on_devices, steps=steps, hooks=hooks)
        except DivergedError as problem:
            checkpoints.wait()
            good = checkpoints.latest() or "none"
            raise DivergedError(f"{problem} (last good checkpoint: {good}, in {out})") from None
        checkpoints.wait()
        if best is not None:
            best.wait()
    return state, asked.signal
