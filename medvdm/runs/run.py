"""A trained model with its record: load it from its folder, and load the data that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import flax.nnx as nnx
import jax

from medvdm import data as data_
from medvdm.data import DataConfig, ImageData
from medvdm.errors import InputError, MissingFileError, RunError
from medvdm.evaluation import baselines as baselines_
from medvdm.evaluation import gaussian_images
from medvdm.models import vdm
from medvdm.paths import local_path
from medvdm.runs import config as config_
from medvdm.runs.config import RunConfig
from medvdm.runs.store import BASELINES, BEST, CHECKPOINTS, GAUSSIAN, METRICS, read_lines, read_record
from medvdm.runs.weights import read_weights
from medvdm.training.checkpoints import Checkpoints
from medvdm.training.devices import Layout, available, local


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

    @cached_property
    def gaussian(self) -> gaussian_images.GaussianImages | None:
        """The Gaussian of gray values that was fitted on the run's training images.

        None for a model of images in [0, 1], and where there were no validation images to choose it on.
        """
        if not self.eight_bit or not self.record["data"]["counts"]["val"]["images"]:
            return None
        return gaussian_images.load(self.path / GAUSSIAN)

    @property
    def eight_bit(self) -> bool:
        """Whether the model's images are gray values from 0 to 255, with a law over all 256, or lie in [0, 1]."""
        return self.config.model.integers

    @property
    def name(self) -> str:
        """The name of the run's folder, also where it was given as '.'."""
        return self.path.resolve().name

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the run's data."""
        return tuple(self.record["data"]["class_names"])

    def metrics(self) -> list[dict[str, Any]]:
        """One record a training step."""
        return read_lines(self.path / METRICS)

    def require_whole(self, what: str) -> None:
        """Refuse to do what a run that was exported for release lacks.

        Args:
            what: what is needed, such as 'the baselines'.

        Raises:
            RunError: the run was exported (:mod:`medvdm.runs.export`).
        """
        require_whole(self.path, self.record, what)

    def require_trained(self, *, null: bool = False, labels: bool = False, classes: Sequence[str] = ()) -> None:
        """Refuse to use of a conditional model what its training never met.

        Args:
            null: whether 'no label' is to be used.
            labels: whether labels are to be used.
            classes: names of the classes that are to be drawn from.

        Raises:
            RunError: ``label_dropout`` was 0 (the null never met), or 1 (no label met), or no training image carried
                one of the classes.
        """
        if not self.config.model.classes:
            return
        if null and self.config.training.label_dropout == 0:
            raise RunError(
                f"{self.path}: its null ('no label') was not trained (label_dropout is 0); "
                "expected labels, and no guidance"
            )
        if (labels or classes) and self.config.training.label_dropout == 1:
            raise RunError(f"{self.path}: its labels were not trained (label_dropout is 1); expected the null")
        for name in classes:
            if name not in self.record["trained_classes"]:
                raise RunError(f"{self.path}: no training image carried '{name}'; expected a class that was trained")

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Where a sample of this run comes from, for the sample's file."""
        return {
            "run": self.name,
            "version": self.record["version"],
            "preset": self.config.preset,
            "data": self.record["data"]["name"],
            "data_fingerprint": self.record["data"]["fingerprint"],
            "step": self.step,
            "weights": self.weights,
            **more,
        }


def load(path: str | Path, *, ema: bool = False, step: int | Literal["best"] | None = None) -> Run:
    """Load a run's newest checkpoint, or that of a given step.

    Args:
        path: the run's folder.
        ema: load the moving average of the weights instead of the weights.
        step: an earlier step that is still kept (``keep_checkpoints``), or 'best' for that with the least bound on
            validation images (``keep_best``).

    Raises:
        InputError: ``path`` is no path of a folder, see :func:`medvdm.paths.local_path`.
        MissingFileError: no run there.
        RunError: the checkpoint is missing, damaged or of another config; or the run keeps no average.

    A run that was exported for release has one set of weights, which is loaded whether or not ``ema`` is said where
    they are averages; other weights, or another step, are a RunError.
    """
    path = local_path(path, "run")
    record, config = read_record(path)
    if "exported" in record:
        return _load_exported(path, record, config, ema, step)
    if ema and not config.training.ema_decay:
        raise RunError(f"{path}: this run keeps no moving average (ema_decay is 0); expected one for --ema")
    folder = path / (BEST if step == "best" else CHECKPOINTS)
    if not folder.is_dir():
        wanted = "one kept by --keep-best" if step == "best" else "at least one checkpoint"
        raise MissingFileError(f"{folder}: not found; expected {wanted}")
    # Of several processes, each has a copy.
    sharding = Layout(len(available())).replicated
    shapes = jax.eval_shape(lambda: vdm.new_params(config.model, 0))
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    settings, earlier = config_.fingerprint(config), config_.earlier_fingerprints(config, record)
    with Checkpoints(folder, settings=settings, earlier=earlier, create=False) as checkpoints:
        step, params = checkpoints.restore_weights(like, "ema" if ema else "params", None if step == "best" else step)
    return Run(
        path=path,
        config=config,
        record=record,
        step=step,
        weights="ema" if ema else "raw",
        graph=vdm.graph_of(config.model),
        params=local(params),
    )


def _load_exported(
    path: Path, record: dict[str, Any], config: RunConfig, ema: bool, step: int | Literal["best"] | None
) -> Run:
    made = record["exported"]
    if ema and made["weights"] != "ema":
        raise RunError(f"{path}: exported for release with its raw weights only; expected no --ema")
    if step not in (None, made["step"]):
        raise RunError(f"{path}: exported for release at step {made['step']} only; expected no --step, not {step}")
    return Run(
        path=path,
        config=config,
        record=record,
        step=made["step"],
        weights=made["weights"],
        graph=vdm.graph_of(config.model),
        params=read_weights(path, config.model, made["sha256"]),
    )


def require_whole(path: Path, record: dict[str, Any], what: str) -> None:
    """:meth:`Run.require_whole` of a record."""
    if "exported" in record:
        raise RunError(f"{path}: exported for release, which left out {what}; expected the run that it was made from")


def load_data(
    run: Run, name: str | None = None, data_dir: str | None = None, image_size: int | None = None
) -> ImageData:
    """The run's own data, or others brought to the run's image size.

    Whatever is named here is brought to the size of the run's images with the run's own ``fit``, and has a note of it.

    Args:
        run: from :func:`load`.
        name: another source than the run's own.
        data_dir: where the images are now.
        image_size: the run's, said again; the model takes no other.

    Raises:
        InputError: another image size than the run's, images that cannot be brought to it, or data that were given
            from Python.
        RunError: the run's own data, where the run was exported for release.
        MedvdmError: as :func:`medvdm.data.load`.
    """
    if name is None:
        run.require_whole("what tells its data")
    settings = run.config.data
    height, width, _ = run.config.model.image_shape
    if image_size not in (None, height) or (image_size is not None and height != width):
        raise InputError(f"image_size: {image_size}; expected that of the run's images, {height}x{width}")
    if name is None and settings.data not in data_.names():
        raise InputError(
            f"data: the run was trained on '{settings.data}', given from Python, which the command line cannot take; "
            f"expected a call from Python with the same data, as medvdm.evaluate(medvdm.load({str(run.path)!r}), data)"
        )
    if (name is None or name == settings.data) and data_dir is None:
        return data_.load(settings)
    if name is not None and name != settings.data:
        settings = DataConfig(data=name, fit=settings.fit)
    settings = replace(settings, data_dir=data_dir, image_size=height if height == width else settings.image_size)
    data = data_.load(settings)
    if data.image_shape[:2] != (height, width):
        found = "x".join(map(str, data.image_shape[:2]))
        raise InputError(
            f"data: {data.name} has images of {found} pixels; expected those of the run, {height}x{width} "
            "(only square ones are resized)"
        )
    return replace(data, notes=(*data.notes, f"brought to the run's {height}x{width} pixels, fit '{settings.fit}'"))


def as_seen(run: Run, data: ImageData) -> ImageData:
    """The images as the run's model knows them: those of an 8-bit likelihood, and so its samples, are gray levels."""
    return replace(data, reader=data.levels) if run.eight_bit else data


def changed(run: Run) -> RunError:
    """The error for data that are no longer what the run was trained on."""
    return RunError(f"{run.path}: the data is no longer what the run was trained on (names, labels or pixels differ)")
