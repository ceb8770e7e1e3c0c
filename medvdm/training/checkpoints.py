"""Save and restore the training state with Orbax: in the background, all or nothing.

One checkpoint holds separate items, so that evaluation reads the weights without the optimiser: ``params``, ``ema``
(if any) and ``opt_state``. A fourth, ``seal``, is a small JSON with the fingerprint of the run's settings and a
CRC-32 of each item: a file that was damaged, or moved here from another run, is refused rather than used. The step
is the checkpoint's name. Orbax is imported when it is first used.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medvdm.errors import InputError, MedvdmError, NotSavedError, RunError
from medvdm.models.vdm import Params
from medvdm.training.devices import first_said
from medvdm.training.step import TrainState

#: Orbax lists its own files by a glob pattern that begins with the folder's path, and TensorStore reads a backslash in
#: another way than the file system. In such a folder weights are lost, or those of a folder beside it are read.
PATTERN_CHARACTERS = "*?[]\\"


def check_folder(folder: Path, what: str) -> None:
    """Raise InputError for a folder in whose path (from the root) Orbax and TensorStore would lose a checkpoint."""
    if not str(folder).isprintable():
        raise InputError(f"{what}: {str(folder)!a}; expected a path in UTF-8 without control characters")
    found = sorted({character for character in str(folder.absolute()) if character in PATTERN_CHARACTERS})
    if found:
        raise InputError(
            f"{what}: {folder.absolute()} has {' '.join(found)} in its path, which the checkpoint library reads as a "
            f"pattern; expected a path without any of {' '.join(PATTERN_CHARACTERS)}"
        )


class Checkpoints:
    """The checkpoints of one folder; use it as a context manager, so that it waits for pending writes.

    Args:
        folder: where they are, one sub-folder per step.
        settings: fingerprint of the run's settings, written into each seal.
        earlier: fingerprints that a checkpoint may also bear: those of the run before it was extended.
        keep: how many of the newest to keep.
        create: make the folder.

    Raises:
        InputError: the path of the folder holds what the checkpoint library would take for a pattern.
    """

    def __init__(self, folder: Path, *, settings: str, earlier: Sequence[str] = (), keep: int = 2, create: bool = True):
        import orbax.checkpoint as ocp

        check_folder(folder, "run")
        for name in ("absl", "asyncio"):  # orbax narrates every file, and every failure before it is raised
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._ocp = ocp
        self.folder = folder.absolute()
        self._settings, self._accepted = settings, {settings, *earlier}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, weights_only: bool = False) -> None:
        """Start saving; returns once the arrays are copied, while the files are still being written.

        Args:
            state: what to save; its memory may be used again afterwards.
            weights_only: leave out the optimiser's state, so training cannot go on from here.
        """
        items = {"params": state.params}
        if state.ema is not None:
            items["ema"] = state.ema
        if not weights_only:
            items["opt_state"] = state.opt_state
        # On a CPU the files are written from these very arrays, and the next step would fill them anew.
        items = _copy(items)
        crc = {name: _crc32(tree) for name, tree in items.items()}
        args = {name: self._ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["seal"] = self._ocp.args.JsonSave({"settings": self._settings, "crc32": crc})
        with _plain_errors(self.folder, "saving"):
            self._manager.save(int(state.step), args=self._ocp.args.Composite(**args))

    def saving(self) -> bool:
        """Whether files are still being written."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Block until everything is on disk."""
        with _plain_errors(self.folder, "saving"):
            self._manager.wait_until_finished()

    def preempted(self, step: int) -> bool:
        """Whether all processes agree that this is the step at which to stop (several processes, after SIGTERM)."""
        return self._manager.reached_preemption(step)

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, onto the devices of ``like``: a state of ShapeDtypeStructs with shardings.

        Raises:
            RunError: no checkpoint, a damaged one, or one of another config.
        """
        step = self._require()
        items = {"params": like.params, "opt_state": like.opt_state}
        if like.ema is not None:
            items["ema"] = like.ema
        found = self._restore(step, items)
        counter = jax.device_put(jnp.asarray(step, jnp.int32), like.step.sharding)
        return TrainState(counter, found["params"], found["opt_state"], found.get("ema"))

    def restore_weights(self, like: Params, which: str, step: int | None = None) -> tuple[int, Params]:
        """A step (the newest by default) and its ``params`` or ``ema``; raises RunError as :meth:`restore`."""
        step = self._require(step)
        return step, self._restore(step, {which: like})[which]

    def _require(self, step: int | None = None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise RunError(f"{self.folder}: no complete checkpoint found; expected at least one saved step")
        if step is not None and step not in steps:
            raise RunError(f"{self.folder}: no checkpoint of step {step}; expected one of {steps}")
        return steps[-1] if step is None else step

    def _restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        restore = self._ocp.args.StandardRestore
        place = self.folder / str(step)
        with _plain_errors(place, "reading"):
            wanted = {name: restore(like) for name, like in items.items()}
            wanted["seal"] = self._ocp.args.JsonRestore()
            found = self._manager.restore(step, args=self._ocp.args.Composite(**wanted))
            seal = found["seal"]
            arrays = jax.block_until_ready({name: found[name] for name in items})
            settings, crc = seal["settings"], seal["crc32"]
        if settings not in self._accepted:
            raise RunError(f"{place}: belongs to settings {settings}; expected {self._settings}, those of config.json")
        for name, tree in arrays.items():
            if _crc32(tree) != crc.get(name):
                raise RunError(f"{place}: '{name}' is damaged (its CRC-32 differs); expected it as it was saved")
        return arrays


def read_back(folder: Path, like: TrainState, step: int, *, settings: str) -> None:
    """Read the checkpoint that training ends with as a later process would: anew from the disk, seal and all.

    Raises:
        NotSavedError: it is not there, is of another step, or does not hold what was saved.
    """
    try:
        with Checkpoints(folder, settings=settings, create=False) as checkpoints:
            found = int(checkpoints.restore(like).step)
    except RunError as problem:
        raise NotSavedError(f"step {step} was saved, but does not read back: {problem}") from None
    if found != step:
        raise NotSavedError(f"{folder}: the newest checkpoint is of step {found}; expected {step}, the last one saved")


class Cadence:
    """When to save: at the steps that were asked for, or, by default, as often as saving is cheap.

    By default a checkpoint is due at a multiple of ``every``, but not before :data:`LEAST_SECONDS` have passed since
    the last one, nor before training has run for :data:`LEAST_RATIO` times as long as that one took to write. So the
    writing costs a tenth of the time at most, and a kill costs a minute of training, or ten times such a writing.

    Args:
        every: steps between checkpoints.
        exact: save at each of these steps, whatever it costs.
        clock: seconds; for tests.
    """

    LEAST_SECONDS = 60.0
    LEAST_RATIO = 10.0

    def __init__(self, every: int, *, exact: bool, clock: Any = time.monotonic):
        self._every, self._exact, self._clock = every, exact, clock
        self._last = clock()  # when training began, or the last writing ended
        self._began: float | None = None
        self._took = 0.0

    def due(self, step: int) -> bool:
        """Whether to save at this step. Several processes ask together, and the first one's clock decides."""
        if step % self._every:
            return False
        if self._exact:
            return True
        quiet = self._clock() - self._last
        waits = self._began is None and quiet >= max(self.LEAST_SECONDS, self.LEAST_RATIO * self._took)
        return first_said(waits)

    def began(self) -> None:
        """Note that a writing begins."""
        self._began = self._clock()

    def ended(self) -> None:
        """Note that no writing is going on (any more)."""
        if self._began is not None:
            self._last = self._clock()
            self._took = self._last - self._began
            self._began = None


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _crc32(tree: Any) -> int:
    """CRC-32 of the bytes of all leaves, in order; arrays are read from this process's first device."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        crc = zlib.crc32(np.ascontiguousarray(leaf.addressable_data(0)).reshape(-1).view(np.uint8), crc)
    return crc


@contextlib.contextmanager
def _plain_errors(place: Path, doing: str) -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise into one line that names the folder."""
    try:
        yield
    except MedvdmError:
        raise
    except Exception as problem:  # the libraries raise ValueError, OSError, KeyError, ... for the same damage
        text = " ".join(str(problem).split())
        if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
            free = shutil.disk_usage(place if place.exists() else place.parent).free
            raise RunError(f"{place}: the disk is full ({free / 1e6:.0f} MB free) while {doing} a checkpoint") from None
        raise RunError(
            f"{place}: {doing} the checkpoint failed; expected a complete one of this config ({text[:200]})"
        ) from None
