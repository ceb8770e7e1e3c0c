"""The options of each command, read by tyro: a field is an option, the text below it its help.

``train`` composes the dataclasses of the Python API, so every setting of a run is an option under its own name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from tyro.conf import Positional, Suppress

from medvdm.data import DataConfig
from medvdm.models.vdm import VDMConfig
from medvdm.runs.config import KeepConfig, RunConfig
from medvdm.runs.presets import PRESETS
from medvdm.training.step import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Model(VDMConfig):
    """The model's settings, without those that come from the data."""

    image_shape: Suppress[tuple[int, int, int]] = (256, 256, 1)
    classes: Suppress[int] = 0


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model and leave a run in a folder."""

    out: str
    """Folder of the run."""
    preset: Literal[PRESETS] = "demo"  # type: ignore[valid-type]
    """Settings to start from; every option below changes one of them."""
    resume: bool = False
    """Continue the run in --out exactly where its newest checkpoint left it."""
    conditional: bool = False
    """Condition the model on the labels (with a trained null for 'no label')."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Model = field(default_factory=Model)
    training: TrainConfig = field(default_factory=TrainConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    progress: bool = True
    """Show a progress bar on stderr."""
    coordinator: str | None = None
    """HOST:PORT of process 0 in a run of several processes; 'auto' where the cluster tells."""
    num_processes: int = 1
    """Number of processes."""
    process_id: int = 0
    """Which of them this is."""


def train_defaults(config: RunConfig) -> Train:
    """The options of ``train`` that stand for a config, before the user changes any."""
    return Train(
        out="",
        preset=config.preset,
        conditional=config.conditional,
        data=config.data,
        model=Model(**vars(config.model)),
        training=config.training,
        keep=config.keep,
    )


def run_config(options: Train) -> RunConfig:
    """The config that the options of ``train`` stand for; the inverse of :func:`train_defaults`."""
    return RunConfig(
        preset=options.preset,
        conditional=options.conditional,
        data=options.data,
        model=VDMConfig(**{f.name: getattr(options.model, f.name) for f in fields(VDMConfig)}),
        training=options.training,
        keep=options.keep,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The bound of a run on held-out images, its error, the floor of the data, and the baselines."""

    run: Positional[str]
    """Folder of the run."""
    data: str | None = None
    """Other data than the run's own."""
    data_dir: str | None = None
    """Where the images are now."""
    split: str = "test"
    """train, val, test or all."""
    step: int | None = None
    """An earlier checkpoint that is still kept."""
    ema: bool = False
    """Evaluate the moving average of the weights."""
    null: bool = False
    """Evaluate a conditional model without the labels."""
    draws: int = 8
    """Independent draws of time and noise per image."""
    batch_size: int = 32
    """Images at a time."""
    seed: int = 0
    """Of the draws."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw synthetic images from a run."""

    run: Positional[str]
    """Folder of the run."""
    num: int = 16
    """How many images."""
    out: str
    """File to write: .npz (images, labels, where they come from) or .png (a grid)."""
    steps: int = 250
    """Steps T of the ancestral chain."""
    label: str | None = None
    """Class to draw from; by default the model's null, 'no label given'."""
    guidance: float = 0.0
    """Guidance weight w: eps = (1 + w) conditional - w null."""
    seed: int = 0
    """Of the samples; sample i of a seed is always the same."""
    ema: bool = False
    """Use the moving average of the weights."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Draw samples and hold them against real images: likeness, scales, grays, a classifier, nearest images."""

    run: Positional[str]
    """Folder of the run."""
    num: int = 256
    """How many samples."""
    steps: int = 250
    """Steps T of the ancestral chain."""
    label: str | None = None
    """Class to draw from, and of the real images; by default the model's null and all images."""
    guidance: float = 0.0
    """Guidance weight w: eps = (1 + w) conditional - w null."""
    split: str = "test"
    """The real images that all are held against, val or test."""
    data_dir: str | None = None
    """Where the images are now."""
    seed: int = 0
    """Of the samples, the pairs and the folds."""
    ema: bool = False
    """Use the moving average of the weights."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time a preset's training step against a hand-written plain JAX step, interleaved in one process."""

    preset: str = "demo"
    """Which preset."""
    batch_size: int = 16
    """Images a step."""
    image_size: int | None = None
    """Height and width; by default the preset's, or 64."""
    repeats: int = 20
    """Timed pairs of steps."""
    roofline: bool = False
    """Also measure the machine's ceilings and say how far above the least possible time the step is."""
    json: bool = False
    """Print one JSON object and nothing else."""
