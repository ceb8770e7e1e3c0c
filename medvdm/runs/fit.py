"""Train a model: the loop around :func:`medvdm.training.step.make_step`, and all that keeps it safe.

The order of work: everything that can be refused is checked before anything is written; then the record and the
baselines are written, and training starts or continues at the newest checkpoint. A step's images, times and noise
depend on the seed and the step's number only, so a resumed run gives the same losses as one never interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from medvdm import data as data_
from medvdm.data import ImageData
from medvdm.errors import DivergedError, InputError, RunError, StoppedError
from medvdm.evaluation import baselines, held_out
from medvdm.evaluation.components import check_components, principal_components
from medvdm.models import vdm
from medvdm.runs import config as config_
from medvdm.runs.config import RunConfig
from medvdm.runs.model_card import renew_card
from medvdm.runs.record import data_record, environment, version
from medvdm.runs.run import Run
from medvdm.runs.store import (
    BASELINES,
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    holds_run,
    read_lines,
    read_record,
    write_json,
    write_text,
)
from medvdm.training.batches import training_batches, training_indices
from medvdm.training.checkpoints import Checkpoints
from medvdm.training.devices import Layout, barrier, first_process, local
from medvdm.training.step import Metrics, TrainState, augmentations, init_state, jit_step, new_state

MAX_LOOK = 256  #: validation images of the looks during training, at most


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
        resume: continue the run in ``out`` exactly where its newest checkpoint left it.
        progress: show a progress bar on stderr.

    Returns:
        The finished run, with its weights.

    Raises:
        InputError, DataError, MissingFileError: settings or data that cannot be used; nothing has been written.
        RunError: ``out`` holds a run already (without ``resume``), holds none or one of other settings (with it), or
            the disk cannot hold the checkpoints.
        DivergedError: a loss or a weight is not finite; the last good checkpoint is intact.
        StoppedError: SIGTERM or Ctrl-C; the state has been saved.
    """
    out = Path(out)
    _check_out(out, resume)
    if data is None:
        data = data_.load(config.data)
    else:
        config = replace(config, data=replace(config.data, data=data.name))
    config = fill_in(config, data)
    layout = Layout(config.training.batch_size)
    indices = training_indices(data, config.training.batch_size)  # refuses a batch that is too large
    if vdm.ARCHITECTURES[config.model.architecture].measures_components:
        augmented = any(augmentations(config.training).values())
        check_components(
            config.model.latent,
            min(len(indices), baselines.MAX_IMAGES),
            config.model.dimensions,
            config.training.basis_copies if augmented else 0,
        )
    if resume:
        _check_same(out, config, data)
    else:
        _check_room(out, config)
        _prepare(out, config, data)
    state = _train(out, config, data, layout, progress=progress and first_process())
    return Run(
        path=out,
        config=config,
        record=read_record(out)[0],
        step=int(state.step),
        weights="raw",
        graph=vdm.graph_of(config.model),
        params=local(state.params),
    )


def _check_out(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; expected a folder or a new name")
    if resume and not holds_run(out):
        raise RunError(f"out: {out} holds no run to resume; expected one, or no --resume to start it")
    if not resume and holds_run(out):
        raise RunError(f"out: {out} holds a run already; expected a new folder, or --resume to continue it")


def fill_in(config: RunConfig, data: ImageData) -> RunConfig:
    """The config with the model's image shape and classes, which come from the data."""
    classes = len(data.class_names) if config.conditional else 0
    return replace(config, model=replace(config.model, image_shape=data.image_shape, classes=classes))


def first_state(config: RunConfig, data: ImageData, layout: Layout) -> TrainState:
    """The state at step 0 of a config that is filled in, on the devices of ``layout``.

    A 'linear-start' model measures its components here, on (augmented copies of) the training images.
    """
    state = new_state(config.model, config.training, layout.replicated)
    if vdm.ARCHITECTURES[config.model.architecture].measures_components:
        with jax.default_matmul_precision("highest"):  # a GPU's short products would leave them orthogonal to 3 digits
            basis = principal_components(
                data.read(_spread(data.indices("train"), baselines.MAX_IMAGES)),
                config.model.latent,
                key=jax.random.fold_in(jax.random.key(config.training.seed), 2**31 - 1),  # no step has this number
                copies=config.training.basis_copies,
                **augmentations(config.training),
            )
        basis = jax.device_put(basis, layout.replicated)
        ema = None if state.ema is None else vdm.with_components(state.ema, _copy(basis))
        state = state._replace(params=vdm.with_components(state.params, basis), ema=ema)
    return state


def _check_same(out: Path, config: RunConfig, data: ImageData) -> None:
    """Refuse to resume with anything that would change the run."""
    record, old = read_record(out)
    before, now = config_.flat(old), config_.flat(config)
    for name, value in now.items():
        if name not in config_.FREE_ON_RESUME and before[name] != value:
            raise RunError(f"{name}: {value}; expected {before[name]}, with which {out} was started (--resume)")
    if record["data"]["fingerprint"] != data.fingerprint():
        raise RunError(f"{data.name}: not the images that {out} was started with (names, labels, splits or pixels)")


def _check_room(out: Path, config: RunConfig) -> None:
    """Refuse to start where the disk cannot hold the checkpoints that are kept, and one being written."""
    state = jax.eval_shape(lambda: init_state(config.model, config.training))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed = size * (config.keep.keep_checkpoints + 1)
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(f"out: {existing} has {free / 1e6:.0f} MB free; expected {needed / 1e6:.0f} MB for checkpoints")


def _prepare(out: Path, config: RunConfig, data: ImageData) -> None:
    """Fit the baselines and write the record; on any failure nothing of it stays."""
    if first_process():
        made = next((p for p in reversed((out, *out.parents)) if not p.exists()), None)
        try:
            out.mkdir(parents=True, exist_ok=True)
            fitted = baselines.fit(
                data.read(_spread(data.indices("train"), baselines.MAX_IMAGES)),
                data.read(_spread(np.flatnonzero(data.splits == "val"), baselines.MAX_VALIDATION_IMAGES)),
            )
            baselines.save(fitted, out / BASELINES)
            record = {
                "version": version(),
                "config": config_.to_json(config),
                "data": data_record(data),
                "environment": environment(),
            }
            write_json(out / CONFIG, record)
        except BaseException:
            (out / BASELINES).unlink(missing_ok=True)
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise
    barrier("prepared")


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the indices, evenly spread."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).astype(int)]


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _train(out: Path, config: RunConfig, data: ImageData, layout: Layout, *, progress: bool) -> TrainState:
    settings, steps = config.training, config.training.steps
    checkpoint_every = config.keep.every("checkpoint", steps)
    evaluate_every = config.keep.every("evaluate", steps)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                out / CHECKPOINTS,
                settings=config_.fingerprint(config),
                keep=config.keep.keep_checkpoints,
                create=True,
            )
        )
        if checkpoints.latest() is None:
            state = first_state(config, data, layout)
        else:
            shapes = jax.eval_shape(lambda: init_state(config.model, settings))
            state = checkpoints.restore(
                jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout.replicated), shapes)
            )
        start = int(state.step)
        # Lines past the checkpoint belong to steps that will be taken again.
        log = stack.enter_context(_StepLog(out, start)) if first_process() else None
        bar = stack.enter_context(
            tqdm(
                total=steps,
                initial=start,
                unit="step",
                disable=not progress,
                file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file needs no animation
            )
        )
        asked = stack.enter_context(_stop_requests())
        look = _Look(out, config, data, start) if first_process() else None
        step_fn = jit_step(config.model, settings)
        batches = training_batches(
            data,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start=start,
            rows=layout.rows(settings.batch_size),
        )
        pending: deque[tuple[int, Metrics]] = deque()

        def report_until(left: int) -> None:
            """Read the metrics of finished steps, all but the newest ``left``."""
            while len(pending) > left:
                number, metrics = pending.popleft()
                values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
                if not all(map(math.isfinite, values.values())):
                    checkpoints.wait()
                    raise DivergedError(
                        f"step {number}: the loss is {values['loss']}; expected a finite number "
                        f"(last good checkpoint: {checkpoints.latest() or 'none'}, in {out})"
                    )
                if log is not None:
                    bar.set_postfix(log.write(number, values), refresh=False)
                bar.update()

        def save() -> None:
            report_until(0)
            if not bool(_finite(state.params)):
                checkpoints.wait()
                raise DivergedError(
                    f"step {number}: a weight is not finite (last good checkpoint: "
                    f"{checkpoints.latest() or 'none'}, in {out})"
                )
            if log is not None:
                log.flush()
            # The step will reuse this state's memory while the files are still being written: save a copy.
            checkpoints.save(_copy(state))

        for number in range(start + 1, steps + 1):
            images, labels = next(batches)
            state, metrics = step_fn(state, layout.put(images), layout.put(labels) if config.model.classes else None)
            pending.append((number, metrics))
            report_until(1)  # the device works on this step while the host reads the one before
            stop = asked.signal if jax.process_count() == 1 else checkpoints.preempted(number) and signal.SIGTERM
            if number % checkpoint_every == 0 or number == steps or stop:
                save()
            if number % evaluate_every == 0 or number == steps:
                report_until(0)
                if look is not None:
                    look(number, state)
            if stop and number < steps:
                checkpoints.wait()
                name = signal.Signals(stop).name
                raise StoppedError(f"{name}: saved step {number} in {out}; continue with --resume", stop)
        checkpoints.wait()
    if first_process():
        renew_card(out)
    barrier("finished")
    return state


class _StepLog:
    """``metrics.jsonl``: one line per step, each step once, also after a kill and a resume."""

    def __init__(self, out: Path, start: int):
        path = out / METRICS
        kept = [r for r in read_lines(path) if r["step"] <= start]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = self._flushed = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=50)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, step: int, values: dict[str, float]) -> dict[str, str]:
        """Add a step; returns the terms as short texts for the progress bar."""
        now = time.perf_counter()
        self._recent.append(now)
        span = self._recent[-1] - self._recent[0]
        rate = (len(self._recent) - 1) / span if span > 0 else 1.0 / max(now - self._start, 1e-9)
        record = {
            "step": step,
            "seconds": round(self._before + now - self._start, 3),
            "steps_per_second": round(rate, 4),
            **values,
        }
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if now - self._flushed > 1.0:
            self.flush()
        short = {"reconstruction": "recon", "diffusion": "diff", "latent": "latent"}
        return {text: f"{values[f'{name}_bpd']:.4g}" for name, text in short.items()}

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.perf_counter()


class _Look:
    """``evaluations.jsonl``: the bound on validation patients during training, by one draw."""

    def __init__(self, out: Path, config: RunConfig, data: ImageData, start: int):
        self._path = out / EVALUATIONS
        self._data = data
        self._indices = _spread(np.flatnonzero(data.splits == "val"), MAX_LOOK)
        self._graph = vdm.graph_of(config.model)
        self._labelled = config.model.classes > 0
        kept = [r for r in read_lines(self._path) if r["step"] <= start]
        write_text(self._path, "".join(json.dumps(r) + "\n" for r in kept))

    def __call__(self, step: int, state: TrainState) -> None:
        if not len(self._indices):
            return
        for weights, params in (("raw", state.params), ("ema", state.ema)):
            if params is None:
                continue
            found = held_out.quick(
                self._graph,
                local(params),  # one device is enough for a look
                self._data,
                self._indices,
                batch_size=min(32, len(self._indices)),
                labelled=self._labelled,
            )
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "split": "val", "weights": weights, **found}) + "\n")


class _Requests:
    signal: int = 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Requests]:
    """Note SIGTERM and the first Ctrl-C instead of dying of them; a second Ctrl-C interrupts at once."""
    asked = _Requests()

    def note(number: int, frame: Any) -> None:
        if asked.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = number

    old: dict[int, Any] = {}
    try:
        if jax.process_count() == 1:  # several processes agree on a step through JAX's own handler
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ValueError):  # not in the main thread: signals are not ours to handle
                    old[number] = signal.signal(number, note)
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
