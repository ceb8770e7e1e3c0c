"""The options of each command, read by tyro: a field is an option, the text below it its help.

Every command composes the dataclasses of the Python API, so every setting is an option under its own name and is
declared in one place. What is added here are the places on disk and what is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, Suppress, UseAppendAction, arg

from medvdm.data import DataConfig
from medvdm.models.vdm import VDMConfig
from medvdm.runs.config import (
    AuditConfig,
    BenchmarkConfig,
    DenoiseConfig,
    EvaluateConfig,
    InpaintConfig,
    KeepConfig,
    PrivacyConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
)
from medvdm.runs.presets import PRESETS
from medvdm.training.step import TrainConfig

#: :data:`medvdm.runs.pretrained.NAMES`, said again: to ask it costs every command a quarter of a second.
PRETRAINED = ("phantom",)
RunFolder = Positional[Annotated[str, arg(metavar="RUN")]]
Step = Annotated[int | Literal["best"] | None, arg(metavar="N|best")]
Labels = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What has to be known of a training before its other options can be read: their defaults depend on it."""

    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder of the run."""
    preset: Annotated[str | None, arg(metavar="NAME")] = None
    """Settings to start from."""
    resume: bool = False
    """Continue the run in --out."""


@dataclass(frozen=True, kw_only=True)
class Model(VDMConfig):
    """The model, without what comes from the data."""

    image_shape: Suppress[tuple[int, int, int]] = (256, 256, 1)
    classes: Suppress[int] = 0


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes that do one piece of work together; the same command is started in each."""

    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Address of process 0 in a run of several processes; 'auto' where the cluster tells."""
    num_processes: int = 1
    """Number of processes."""
    process_id: int = 0
    """Which of them this is."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model and leave a run in a folder."""

    out: Annotated[str, arg(metavar="FOLDER")]
    """Folder of the run."""
    preset: Literal[PRESETS] = "demo"  # type: ignore[valid-type]
    """Settings to start from. It gives every option below its default; --preset NAME --help shows those of NAME."""
    resume: bool = False
    """Continue the run in --out exactly where its newest checkpoint left it."""
    conditional: bool = False
    """Condition the model on the labels (with a trained null for 'no label')."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Model = field(default_factory=Model)
    training: TrainConfig = field(default_factory=TrainConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    progress: bool = True
    """Say on stderr what is trained on what, with notes on the data, and show the progress."""
    processes: Processes = field(default_factory=Processes)


def train_defaults(config: RunConfig) -> Train:
    """The options of ``train`` that stand for a config, before the user changes any."""
    return Train(
        out=tyro.MISSING,
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
    """The bound of a run on held-out images, its error, and what else describes these images."""

    run: RunFolder
    """Folder of the run."""
    data: Annotated[str | None, arg(metavar="NAME")] = None
    """Other data than the run's own, brought to the size of the run's images."""
    data_dir: Annotated[str | None, arg(metavar="PATH")] = None
    """Where the images are now; by default where they were."""
    image_size: int | None = None
    """Height and width of the run's images, to which any data are brought; no other is possible."""
    evaluation: EvaluateConfig = field(default_factory=EvaluateConfig)
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""
    ema: bool = False
    """Evaluate the moving average of the weights."""
    json: bool = False
    """Print one JSON object and nothing else."""
    processes: Processes = field(default_factory=Processes)


@dataclass(frozen=True, kw_only=True)
class Drawn(SampleConfig):
    """How the images are drawn."""

    label: Labels = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw synthetic images from a run, or from a model that comes with the package."""

    run: Positional[Annotated[str | None, arg(metavar="RUN")]] = None
    """Folder of the run."""
    pretrained: Literal[PRETRAINED] | None = None  # type: ignore[valid-type]
    """A small trained model that comes with the package, in place of a run."""
    out: Annotated[str, arg(metavar="FILE")]
    """File to write, .npz (images, labels, where they come from), .png (a grid) or .dcm (DICOM, several NAME-1.dcm and
    so on), or a folder for DICOM files, made if it is not there."""
    drawing: Drawn = field(default_factory=Drawn)
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""
    ema: bool = False
    """Use the moving average of the weights."""
    processes: Processes = field(default_factory=Processes)


@dataclass(frozen=True, kw_only=True)
class Filled(InpaintConfig):
    """How what is not known is drawn."""

    label: Labels = ()


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Draw the pixels of an image under a mask, given all others; for runs of a diffusion on pixels."""

    run: RunFolder
    """Folder of the run."""
    file: Positional[Annotated[str, arg(metavar="FILE")]]
    """The image, of the run's size."""
    mask: Annotated[str, arg(metavar="FILE")]
    """An image of the same size, white where pixels are to be drawn and black where they are kept."""
    out: Annotated[str, arg(metavar="FILE")]
    """PNG to write; of several samples NAME-sample-1.png and so on, for NAME.png."""
    filling: Filled = field(default_factory=Filled)
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""
    ema: bool = False
    """Use the moving average of the weights."""


@dataclass(frozen=True, kw_only=True)
class Held(AuditConfig):
    """How the samples are drawn, and which real images they are held against."""

    label: Labels = ()


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Draw samples and hold them against real images: likeness, scales, grays, a classifier, nearest images.

    With --privacy: what has the model kept of its training images? Copies among the samples, membership, canaries, and
    what its files give away; of a model that is not ours, copies by folders of images.
    """

    run: Positional[Annotated[str | None, arg(metavar="RUN")]] = None
    """Folder of the run."""
    privacy: bool = False
    """Look for what the model has kept of its training images."""
    audit: Held = field(default_factory=Held)
    privacy_settings: PrivacyConfig = field(default_factory=PrivacyConfig)
    samples: Annotated[str | None, arg(metavar="DIR")] = None
    """With --privacy: samples from a folder or an .npz file; by default drawn from the run."""
    train: Annotated[str | None, arg(metavar="DIR")] = None
    """With --privacy: training images from a folder; by default the run's."""
    held_out: Annotated[str | None, arg(metavar="DIR")] = None
    """With --privacy: images of other patients from the same source, for the threshold; by default the run's."""
    patient_pattern: str | None = None
    """Regular expression with one group, searched in the relative path, that gives the patient of the images in --train
    and --held-out."""
    image_size: int | None = None
    """Height and width that images from folders are brought to; by default those of the training images."""
    work: Annotated[str | None, arg(metavar="DIR")] = None
    """Folder that keeps what is finished of a --privacy without a run, so that it can be interrupted."""
    data_dir: Annotated[str | None, arg(metavar="PATH")] = None
    """Where the images are now; by default where they were."""
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""
    ema: bool = False
    """Use the moving average of the weights."""
    json: bool = False
    """Print one JSON object and nothing else."""
    processes: Processes = field(default_factory=Processes)


@dataclass(frozen=True, kw_only=True)
class Removed(DenoiseConfig):
    """How noise is removed."""

    noise: Annotated[float | Literal["auto"], arg(metavar="auto|S")] = "auto"


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """Remove the noise of image files with a run on pixels: PNG, JPEG, TIFF, BMP or DICOM."""

    run: RunFolder
    """Folder of the run."""
    files: Positional[Annotated[tuple[str, ...], arg(metavar="FILE...")]] = ()
    """Images, of which out gets NAME.png, NAME-sample-1.png, ..., NAME-std.png, and NAME.dcm of a DICOM file."""
    out: Annotated[str, arg(metavar="DIR")]
    """Folder to write into, made if it is not there."""
    denoising: Removed = field(default_factory=Removed)
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""
    ema: bool = False
    """Use the moving average of the weights."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What each image costs in bits, where that lies among held-out images, and which tests call it unusual."""

    run: RunFolder
    """Folder of the run, of a model of 8-bit gray values."""
    files: Positional[Annotated[tuple[str, ...], arg(metavar="FILE...")]] = ()
    """Images: PNG, JPEG, TIFF, BMP or DICOM."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    maps: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for a map of each image's bits."""
    window: Annotated[str | None, arg(metavar="LOW,HIGH")] = None
    """Stored values that become black and white, or full, which is each file's own range; by default the run's."""
    data_dir: Annotated[str | None, arg(metavar="PATH")] = None
    """Where the run's own images are now; by default where they were."""
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""
    ema: bool = False
    """Use the moving average of the weights."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Say which marks files bear: whether they say that they are synthetic, and where they say that they come from."""

    files: Positional[Annotated[tuple[str, ...], arg(metavar="FILE...")]] = ()
    """Samples (.npz, .png, .dcm), or any other archive of NumPy, DICOM file or image."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run for release: weights, settings and card, without what need not leave."""

    run: RunFolder
    """Folder of the run."""
    out: Annotated[str, arg(metavar="DIR")]
    """Folder to write, new or empty."""
    ema: bool = True
    """The averaged weights, where the run keeps an average; else the raw ones."""
    step: Step = None
    """An earlier checkpoint that is still kept, or best (--keep-best); by default the newest."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time a preset's training step against a hand-written plain JAX step, interleaved in one process."""

    preset: Annotated[str, arg(metavar="NAME")] = "demo"
    """Which preset."""
    batch_size: int = 16
    """Images per step."""
    image_size: int | None = None
    """Height and width; by default the preset's, or 64."""
    timing: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    json: bool = False
    """Print one JSON object and nothing else."""
