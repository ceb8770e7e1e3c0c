"""The settings of a run with their JSON form, and the settings of what is done with a run.

A run is described by :class:`RunConfig` and nothing else. ``config.json`` in the run's folder is its JSON form, and a
run is only ever resumed or evaluated from that file. What ``evaluate``, ``sample``, ``audit`` and ``benchmark`` take
is declared here once: the Python functions and the options of the command line are these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from medvdm.data import DataConfig
from medvdm.errors import InputError, RunError, nearest
from medvdm.models.vdm import VDMConfig
from medvdm.training.step import TrainConfig, check


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """What a run keeps and how often it looks up. None of this changes the run's numbers."""

    evaluate_every: int = 0
    """Steps between held-out evaluations (on validation patients); 0 is ten times a run."""
    checkpoint_every: int = 0
    """Steps between checkpoints. 0 is ten times a run and at least every 1,000 steps, but not so often that saving
    takes more than about a tenth of the time, nor twice in a minute. The last step always saves."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    keep_best: bool = False
    """Also keep the weights with the least bound on validation images (averaged weights where there are any)."""

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: {getattr(self, name)}; expected 0 or more")
        if self.keep_checkpoints < 1:
            raise InputError(f"keep_checkpoints: {self.keep_checkpoints}; expected at least 1")

    def every(self, what: typing.Literal["evaluate", "checkpoint"], steps: int) -> int:
        """The interval in steps that applies to a run of ``steps``."""
        chosen = getattr(self, f"{what}_every")
        return chosen or max(1, min(steps // 10, 1000) if what == "checkpoint" else steps // 10)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run.

    ``model.image_shape`` and ``model.classes`` are filled in from the data when the run starts.
    """

    preset: str
    """Which preset the settings started from."""
    conditional: bool = False
    """Condition the model on the labels (with a trained null for 'no label')."""
    data: DataConfig = field(default_factory=DataConfig)
    model: VDMConfig = field(default_factory=VDMConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)

    def __post_init__(self) -> None:
        check(self.model, self.training)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a run is evaluated."""

    split: str = "test"
    """Which images, which is train, val, test or all."""
    null: bool = False
    """Evaluate a conditional model without the labels."""
    draws: int = 8
    """Draws of time and noise per image, the times spread evenly; the standard error needs at least 2."""
    batch_size: int = 32
    """Images at a time; the noise depends on it, the result's law does not."""
    seed: int = 0
    """Seed of the draws."""
    codecs: bool = False
    """Also give the bits of lossless codecs on the same images, for a model of 8-bit gray values (extra codecs)."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are drawn from a run."""

    num: int = 16
    """How many images."""
    steps: int = 250
    """Steps T of the chain. Each evaluates the network once, of heun twice."""
    sampler: typing.Literal["ancestral", "ddim", "heun", "dpmpp"] = "ancestral"
    """What a step is: a draw from the model's own chain, DDIM, Heun's step, or DPM-Solver++(2M)."""
    eta: float = 0.0
    """How much noise DDIM's steps add: 0 is none, 1 is the ancestral chain."""
    grid: typing.Literal["time", "gamma", "error"] = "time"
    """Where the steps lie: evenly in t, evenly in gamma, or so that they err alike, as measured on four chains."""
    label: tuple[str, ...] = ()
    """Class to draw from, given again for each further one; by default the model's null, 'no label given'."""
    guidance: float = 0.0
    """Guidance weight w in eps = (1 + w) conditional - w null; needs a label."""
    seed: int = 0
    """Seed of the samples; sample i of a seed is always the same, however many are drawn."""
    batch_size: int = 64
    """Images drawn at a time, on all devices of a process; it changes the speed and the memory only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", labels_of(self.label))


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """How what is not known of an image is drawn."""

    samples: int = 1
    """How many draws of each image."""
    steps: int = 50
    """Steps T of the chain, of each stage of a cascade."""
    sampler: typing.Literal["ancestral", "ddim", "heun", "dpmpp"] = "dpmpp"
    """What a step is, as of sample."""
    turns: int = 5
    """How long a step solves for what is known, at most; each turn costs about as much as the network. 0 only puts in
    what is known."""
    label: tuple[str, ...] = ()
    """Class to draw from, given again for each further one; by default the model's null, 'no label given'."""
    guidance: float = 0.0
    """Guidance weight w in eps = (1 + w) conditional - w null; needs a label."""
    seed: int = 0
    """Seed; draw j of image i of a seed is always the same, however many are drawn."""
    batch_size: int = 8
    """Images drawn at a time; it changes the speed and the memory only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", labels_of(self.label))


@dataclass(frozen=True, kw_only=True)
class AuditConfig(SampleConfig):
    """How samples of a run are audited: how they are drawn, and which real images they are held against."""

    num: int = 256
    """Images of each set, at least 10 and at most as many as the held-out splits have."""
    split: str = "test"
    """The real images that all are held against, val or test; with a label, those that have it."""
    seed: int = 0
    """Seed of the samples, of which real images are drawn, of the pairs and the folds."""


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """How a model is audited for what it has kept of its training images."""

    alarm: float = 0.01
    """Chance that any of the samples of a model that has kept nothing is called a copy; it sets the threshold."""
    images: int = 512
    """Images of each group whose membership is attacked, at most."""
    levels: int = 8
    """Noise levels, spread evenly in gamma, at which the error of the denoiser is looked at."""
    draws: int = 8
    """Draws of noise per image, of the bound and at each level."""
    secrets: int = 100
    """Secrets that were not planted, with which each canary is compared."""
    loss_batch: int = 32
    """Images whose losses are computed at a time; it changes the speed and the memory only."""
    audit_seed: int = 0
    """Seed of the noise, of the folds and of the controls."""

    def __post_init__(self) -> None:
        if not 0 < self.alarm < 1:
            raise InputError(f"alarm: {self.alarm:g}; expected a chance between 0 and 1")
        for name, least in (("images", 20), ("levels", 2), ("draws", 1), ("secrets", 20), ("loss_batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """How noise is removed from images."""

    noise: float | typing.Literal["auto"] = "auto"
    """Deviation of the noise in gray values on [0, 1], or auto, estimated in each image; with a gain, of the
    electronic noise."""
    gain: float = 0.0
    """Low dose: gray values per photon, whose noise grows with the signal; 0 is noise that is the same everywhere."""
    samples: int = 0
    """Draws from the posterior beside its mean; from two on, their spread is a map of doubt."""
    steps: int = 100
    """Steps of the chain of each draw; with 25, draws are a tenth too alike."""
    seed: int = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How images are scored, and against how many held-out ones."""

    draws: int = 16
    """Draws of time and noise per image, the times spread evenly; the standard error needs at least 2."""
    held_out: int = 256
    """Validation images of the run's own data that each image is placed among, at most."""
    share: float = 0.05
    """Of images like the held-out ones, the share that a test may call unusual."""
    codec: typing.Literal["none", "png", "webp", "jpegls", "jxl"] = "none"
    """Also measure the bits above the size of a lossless file of the same image (extra codecs)."""
    seed: int = 0
    """Seed of the times and the noise, which are the same for all images."""
    batch_size: int = 32
    """Images at a time; it changes the speed and the memory only."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """How a training step is timed."""

    repeats: int = 40
    """Timed pairs of steps, at least 3."""
    roofline: bool = False
    """Also measure the machine's ceilings and say how far above the least possible time the step is."""


def labels_of(label: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of classes as a tuple: one name, several, or None for none."""
    if label is None:
        return ()
    return (label,) if isinstance(label, str) else tuple(map(str, label))


Settings = TypeVar(
    "Settings",
    EvaluateConfig,
    SampleConfig,
    InpaintConfig,
    AuditConfig,
    PrivacyConfig,
    BenchmarkConfig,
    DenoiseConfig,
    ScoreConfig,
)


def settings(start: Settings, changes: dict[str, Any]) -> Settings:
    """The settings ``start`` with some changed by name.

    Raises:
        InputError: a name that is no setting, with the nearest.
    """
    names = [f.name for f in dataclasses.fields(start)]
    for name in changes:
        if name not in names:
            raise InputError(f"setting: '{name}' is unknown; {nearest(name, names)}")
    return dataclasses.replace(start, **changes)


def change(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace settings by name in whichever part of the config holds them."""
    parts: dict[str, Any] = {}
    known = ["conditional"]
    for part in ("data", "model", "training", "keep"):
        old = getattr(config, part)
        names = [f.name for f in dataclasses.fields(old)]
        known += names
        mine = {k: changes.pop(k) for k in names if k in changes}
        parts[part] = dataclasses.replace(old, **mine)
    if "conditional" in changes:
        parts["conditional"] = changes.pop("conditional")
    if changes:
        word = next(iter(changes))
        close = difflib.get_close_matches(word, known, n=1)
        raise InputError(f"setting: '{word}' is unknown" + (f"; did you mean '{close[0]}'?" if close else ""))
    return dataclasses.replace(config, **parts)


def flat(config: RunConfig) -> dict[str, Any]:
    """All settings by name (names are unique over the parts)."""
    out: dict[str, Any] = {"preset": config.preset, "conditional": config.conditional}
    for part in ("data", "model", "training", "keep"):
        out |= dataclasses.asdict(getattr(config, part))
    return out


#: Settings that an earlier version did not have. Where a record lacks one, its default holds, so a default here is what
#: was done before and never changes; at its default a setting is no part of a fingerprint either.
LATER = (
    *("width", "scales", "blocks", "patch", "details", "attention", "rounding", "reduce", "base_scales"),  # 0.3.0
    *("crop", "stages", "noise_weight"),  # 0.3.0
    *("visits", "withhold", "canaries", "canary_copies"),  # 0.4.0
    *("dp_noise", "dp_clip"),  # 0.4.0
)

#: Settings that may differ when a run is resumed: where the images lie now, and what the run keeps.
FREE_ON_RESUME = ("data_dir", "evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_best")


def fingerprint(config: RunConfig) -> str:
    """A short hash of all settings that define the run's numbers; each checkpoint carries it."""
    defaults = flat(RunConfig(preset=config.preset))
    fixed = {
        name: value
        for name, value in flat(config).items()
        if name not in FREE_ON_RESUME and not (name in LATER and value == defaults[name])
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def earlier_fingerprints(config: RunConfig, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The fingerprints that a run had before it was extended, by its record; its older checkpoints bear them."""
    return tuple(
        fingerprint(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps)))
        for steps in record["extended_from"]
    )


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON-ready nested dict."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(record: Any, where: str = "config") -> RunConfig:
    """The inverse of :func:`to_json`; a record of an earlier version may lack :data:`LATER` settings.

    Raises:
        RunError: a setting is missing, unknown, of a wrong type or out of range: a config of another version.
    """
    try:
        config = msgspec.convert(record, RunConfig)
    except msgspec.ValidationError as problem:
        text = str(problem).replace("$.", "").replace("`", "")
        raise RunError(f"{where}: {text}; expected a config written by this version of medvdm") from None
    # A dataclass has a default for what a record lacks, and does not notice what it has too much.
    written, read = _names(record), _names(to_json(config))
    later = {name for name in read if name.split(".")[-1] in LATER}
    for what, names in {"missing": read - written - later, "unknown": written - read}.items():
        if names:
            listed = ", ".join(sorted(names))
            raise RunError(f"{where}: settings {what}: {listed}; expected a config written by this version of medvdm")
    return config


def _names(record: dict[str, Any], prefix: str = "") -> set[str]:
    """The names of a nested record's values, joined by dots."""
    names: set[str] = set()
    for name, value in record.items():
        names |= _names(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
    return names
