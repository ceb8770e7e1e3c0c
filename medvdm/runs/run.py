"""A trained model with its record: load it from its folder, and load the data that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax

from medvdm import data as data_
from medvdm.data import DataConfig, ImageData
from medvdm.errors import InputError, MissingFileError, RunError
from medvdm.evaluation import baselines as baselines_
from medvdm.models import vdm
from medvdm.runs import config as config_
from medvdm.runs.config import RunConfig
from medvdm.runs.store import BASELINES, CHECKPOINTS, METRICS, read_lines, read_record
from medvdm.training.checkpoints import Checkpoints


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with its record.

    Attributes:
        path: the run's folder.
        config: its settings.
        record: the content of ``config.json``.
        step: training steps behind these weights.
        weights: 'raw', or 'ema' for the moving average.
        graph: the model's static description, see :func:`medvdm.models.vdm.split`.
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


def changed(run: Run) -> RunError:
    """The error for data that are no longer what the run was trained on."""
    return RunError(f"{run.path}: the data is no longer what the run was trained on (names, labels or pixels differ)")
