"""The settings of a run, the presets, and their JSON form.

A run is described by :class:`RunConfig` and nothing else. ``config.json`` in the run's folder is its JSON form, and a
run is only ever resumed or evaluated from that file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from medvdm.data import DataConfig
from medvdm.errors import InputError, RunError
from medvdm.models.vdm import VDMConfig
from medvdm.training.step import TrainConfig, check


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """What a run keeps and how often it looks up. None of this changes the run's numbers."""

    evaluate_every: int = 0
    """Steps between held-out evaluations (on validation patients); 0 is ten times a run."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 is ten times a run, but at least every 1,000 steps. The last step always saves."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""

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


#: Settings that may differ when a run is resumed: where the images lie now, and what the run keeps.
FREE_ON_RESUME = ("data_dir", "evaluate_every", "checkpoint_every", "keep_checkpoints")


#: Settings that came after runs had been kept, with the value that stands for a record without them. Where they have
#: it they leave no trace in the fingerprint, so those runs and their checkpoints stay good.
LATER = {
    **{"learn_ends": False, "schedule_objective": "bound", "schedule_rate": 1.0},
    **{"architecture": "residual", "basis_copies": 0},
    **{"augment_shift": 0.0, "augment_size": 0.0, "augment_exposure": 0.0},
}


def fingerprint(config: RunConfig) -> str:
    """A short hash of all settings that define the run's numbers; each checkpoint carries it."""
    fixed = {
        name: value
        for name, value in flat(config).items()
        if name not in FREE_ON_RESUME and (name not in LATER or value != LATER[name])
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as JSON-ready nested dict."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(record: dict[str, Any], where: str = "config") -> RunConfig:
    """The inverse of :func:`to_json`.

    Raises:
        RunError: a setting is missing, unknown, or of a wrong type: a config of another version.
    """
    try:
        return _build(RunConfig, record)
    except (TypeError, KeyError, InputError) as problem:
        raise RunError(f"{where}: {problem}; expected a config written by this version of medvdm") from None


def _build(kind: type, record: Any) -> Any:
    if not isinstance(record, dict):
        raise TypeError(f"{kind.__name__}: {record!r} is not an object")
    hints = typing.get_type_hints(kind)
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in record and f.name not in LATER]
    unknown = [name for name in record if name not in hints]
    if missing or unknown:
        raise TypeError(f"settings missing: {missing}, unknown: {unknown}")
    return kind(**{name: _value(hints[name], value, name) for name, value in record.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value)
    origin = typing.get_origin(hint)
    if origin is tuple:  # JSON has lists only
        if not isinstance(value, list) or [type(v) for v in value] != list(typing.get_args(hint)):
            raise TypeError(f"{name}: {value!r} is not {hint}")
        return tuple(value)
    if origin is typing.Literal:
        return value
    allowed = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in allowed:
        raise TypeError(f"{name}: {value!r} is not {hint}")
    return value
