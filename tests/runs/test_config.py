"""Settings: the presets say what the paper says, the JSON form loses nothing, and unknown names are refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from typing import Any

import pytest

from medvdm.errors import InputError, RunError
from medvdm.models.vdm import VDMConfig
from medvdm.runs import config as config_
from medvdm.runs.config import KeepConfig, RunConfig
from medvdm.runs.presets import PRESETS, preset
from medvdm.training.step import TrainConfig

PAPER = {
    "conditional": False,
    "image_size": 256,
    "image_shape": (256, 256, 1),
    "classes": 0,
    "gamma_min": -5.0,
    "gamma_max": 1.0,
    "timesteps": 0,
    "schedule": "fixed-linear",
    "encoder_layers": 6,
    "decoder_layers": 6,
    "score_layers": 10,
    "encoder_width": 256,
    "decoder_width": 512,
    "embedding_dim": 128,
    "inner_width": 1024,
    "latent": 64,
    "learning_rate": 8e-4,
    "b1": 0.9,
    "b2": 0.99,
    "adam_eps": 1e-8,
    "weight_decay": 1e-4,
    "warmup_steps": 250,
    "final_fraction": 1e-5,
    "clip_norm": 0.0,
    "ema_decay": 0.0,
    "gradient_difference_weight": 0.0,
    "stratified_times": True,
    "dtype": "float32",
}


def test_the_presets_are_those_of_the_command_line() -> None:
    assert PRESETS == ("demo", "paper", "paper-literal", "pixel", "pixel-large", "linear-start")
    assert all(preset(name).preset == name for name in PRESETS)


def test_paper_is_what_the_paper_says() -> None:
    found = config_.flat(preset("paper"))
    assert {name: found[name] for name in PAPER} == PAPER


def test_paper_literal_differs_in_the_schedule_only() -> None:
    paper, literal = (config_.flat(preset(name)) for name in ("paper", "paper-literal"))
    different = {name: literal[name] for name in paper if literal[name] != paper[name]}
    assert different == {"preset": "paper-literal", "gamma_min": 0.1, "timesteps": 5}
    assert literal["gamma_max"] == 1.0


def test_demo_is_conditional_with_an_average_on_generated_images() -> None:
    found = config_.flat(preset("demo"))
    assert found["conditional"] is True and found["label_dropout"] > 0
    assert 0.9 < found["ema_decay"] < 1
    assert found["data"] == "phantom"


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_back_the_same_config(name: str) -> None:
    config = preset(name, data_dir="über/ort", image_size=28, timesteps=7, learning_rate=1 / 3)
    text = json.dumps(config_.to_json(config), allow_nan=False)
    assert config_.from_json(json.loads(text)) == config


def test_json_gives_back_the_types() -> None:
    found = config_.from_json(json.loads(json.dumps(config_.to_json(preset("paper")))))
    assert isinstance(found.model.image_shape, tuple)
    record = config_.to_json(found)
    record["model"]["gamma_max"] = 1  # JSON written by other programs drops the '.0'
    assert type(config_.from_json(record).model.gamma_max) is float


Path = tuple[str, ...]


def edited(path: Path, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(config_.to_json(preset("demo")))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("speed",), 1, "speed"),
        (("model", "lattent"), 4, "lattent"),
        (("training", "data"), "nih", "data"),
        (("model", "latent"), 4.0, "latent"),
        (("model", "latent"), "4", "latent"),
        (("model", "latent"), True, "latent"),
        (("model", "latent"), None, "latent"),
        (("model", "latent"), -4, "latent"),
        (("model", "schedule"), "cosine", "schedule"),
        (("model", "dtype"), "int8", "dtype"),
        (("model", "gamma_min"), 6.0, "gamma_min"),
        (("training", "learning_rate"), "fast", "learning_rate"),
        (("training", "learning_rate"), True, "learning_rate"),
        (("training", "learning_rate"), float("nan"), "learning_rate"),
        (("training", "stratified_times"), 1, "stratified_times"),
        (("data", "image_size"), 64.5, "image_size"),
        (("keep", "keep_checkpoints"), 0, "keep_checkpoints"),
        (("preset",), 3, "preset"),
        (("conditional",), "yes", "conditional"),
        (("model", "image_shape"), [16, 16], "image_shape"),
        (("model", "image_shape"), ["a", "b", "c"], "image_shape"),
        (("model", "image_shape"), [16, 16, 1.0], "image_shape"),
        (("model", "image_shape"), 16, "image_shape"),
        (("model",), 3, "model"),
        (("model",), None, "model"),
    ],
)
def test_a_record_of_another_version_or_with_a_wrong_type_is_refused(path: Path, value: Any, named: str) -> None:
    with pytest.raises(RunError) as caught:
        config_.from_json(edited(path, value), where="some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and named in str(caught.value)


@pytest.mark.parametrize("path", [("preset",), ("model",), ("model", "latent"), ("training", "b1"), ("data", "fit")])
def test_a_missing_setting_is_refused(path: Path) -> None:
    record = config_.to_json(preset("demo"))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(RunError, match=path[-1]):
        config_.from_json(record)


@pytest.mark.parametrize("name", ["demo", "linear-start", "pixel"])
def test_a_setting_that_an_earlier_version_did_not_have_has_its_default_and_no_part_in_the_fingerprint(
    name: str,
) -> None:
    defaults = dataclasses.asdict(VDMConfig()) | dataclasses.asdict(TrainConfig())
    config = preset(name, **{setting: defaults[setting] for setting in config_.LATER if setting != "crop"})
    record = config_.to_json(config)
    for setting in config_.LATER:
        del record["training" if setting in ("crop", "noise_weight", "dp_noise", "dp_clip") else "model"][setting]
    assert config_.from_json(record) == config
    numbers = config_.flat(config)
    for setting in config_.LATER + config_.FREE_ON_RESUME:
        del numbers[setting]
    of_earlier = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]
    assert config_.fingerprint(config) == of_earlier


@pytest.mark.parametrize(("name", "of_0_2_0"), [("demo", "298d9b5215fccbff"), ("linear-start", "2928d4ce65f212d7")])
def test_checkpoints_of_version_0_2_0_can_be_resumed(name: str, of_0_2_0: str) -> None:
    assert config_.fingerprint(preset(name)) == of_0_2_0


def test_a_later_setting_that_differs_from_its_default_counts() -> None:
    config = preset("pixel")
    changed = [config_.change(config, **{name: value}) for name, value in {"width": 40, "crop": 16}.items()]
    assert len({config_.fingerprint(one) for one in [config, *changed]}) == 3


@pytest.mark.parametrize("record", [None, [], "demo", 3])
def test_a_record_that_is_no_object_is_refused(record: Any) -> None:
    with pytest.raises(RunError):
        config_.from_json(record)


def test_change_finds_a_setting_in_any_part() -> None:
    config = preset("demo", image_size=32, latent=5, seed=9, keep_checkpoints=4, conditional=False)
    assert (config.data.image_size, config.model.latent, config.training.seed) == (32, 5, 9)
    assert config.keep.keep_checkpoints == 4 and config.conditional is False
    again = config_.change(config, latent=6)
    assert dataclasses.replace(config, model=dataclasses.replace(config.model, latent=6)) == again
    assert config.model.latent == 5
    assert preset("demo") == preset("demo"), "a preset is not changed by what is made from it"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lerning_rate", "learning_rate"), ("batchsize", "batch_size"), ("latents", "latent"), ("gama_max", "gamma_max")],
)
def test_an_unknown_setting_suggests_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"'{word}'.*did you mean '{meant}'"):
        preset("demo", **{word: 1})


def test_an_unknown_setting_like_no_other_is_named() -> None:
    with pytest.raises(InputError, match="setting: 'xyzzy' is unknown$"):
        preset("demo", xyzzy=1)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="'papers'.*did you mean 'paper'"):
        preset("papers")


def test_names_of_settings_are_unique_over_the_parts() -> None:
    """Every setting is an option under its own name, so two parts must not share one."""
    parts = [preset("demo").data, VDMConfig(), preset("demo").training, KeepConfig()]
    names = [f.name for part in parts for f in dataclasses.fields(part)]
    names += [f.name for f in dataclasses.fields(RunConfig) if f.name not in ("data", "model", "training", "keep")]
    assert len(names) == len(set(names))
    assert set(config_.flat(preset("demo"))) == set(names)


@pytest.mark.parametrize(
    ("what", "steps", "chosen", "interval"),
    [
        ("checkpoint", 3000, 0, 300),
        ("checkpoint", 20_000, 0, 1000),
        ("evaluate", 20_000, 0, 2000),
        ("checkpoint", 3, 0, 1),
        ("evaluate", 3, 0, 1),
        ("checkpoint", 3000, 7, 7),
        ("evaluate", 3000, 5000, 5000),
    ],
)
def test_intervals(what: Any, steps: int, chosen: int, interval: int) -> None:
    keep = KeepConfig(**{f"{what}_every": chosen})
    assert keep.every(what, steps) == interval


@pytest.mark.parametrize("setting", [{"evaluate_every": -1}, {"checkpoint_every": -5}, {"keep_checkpoints": 0}])
def test_intervals_that_cannot_be_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        KeepConfig(**setting)
