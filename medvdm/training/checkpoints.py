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
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medvdm.errors import MedvdmError, RunError
from medvdm.models.vdm import Params
from medvdm.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run folder; use it as a context manager, so that it waits for pending writes."""

    def __init__(self, folder: Path, *, settings: str, keep: int = 2, create: bool = True):
        import orbax.checkpoint as ocp

        for name in ("absl", "asyncio"):  # orbax narrates every file, and every failure before it is raised
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._ocp = ocp
        self.folder = folder.absolute()
        self._settings = settings
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Start saving; returns once the arrays are copied, while the files are still being written."""
        save = self._ocp.args.StandardSave
        items = {"params": save(state.params), "opt_state": save(state.opt_state)}
        if state.ema is not None:
            items["ema"] = save(state.ema)
        crc = {name: _crc32(getattr(state, name)) for name in items}
        items["seal"] = self._ocp.args.JsonSave({"settings": self._settings, "crc32": crc})
        with _plain_errors(self.folder, "saving"):
            self._manager.save(int(state.step), args=self._ocp.args.Composite(**items))

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
        if settings != self._settings:
            raise RunError(f"{place}: belongs to settings {settings}; expected {self._settings}, those of config.json")
        for name, tree in arrays.items():
            if _crc32(tree) != crc.get(name):
                raise RunError(f"{place}: '{name}' is damaged (its CRC-32 differs); expected it as it was saved")
        return arrays


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
