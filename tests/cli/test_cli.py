"""The command line: the spellings that the README promises, what goes where, and the exit codes."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from helpers import STEPS, Trained, refused, said, tree
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import medvdm
from medvdm import errors
from medvdm.cli import options
from medvdm.cli.main import main
from medvdm.cli.parsing import parse
from medvdm.data import DataConfig
from medvdm.evaluation.privacy import registration
from medvdm.models.vdm import VDMConfig
from medvdm.runs import config as config_
from medvdm.runs import fit, privacy
from medvdm.runs.config import KeepConfig, RunConfig
from medvdm.runs.presets import PRESETS, preset
from medvdm.runs.store import read_record
from medvdm.training.step import TrainConfig

CONTRACT_KEYS = {
    "evaluate": "num_images reconstruction_bpd diffusion_bpd latent_bpd vlb_bpd vlb_bpd_stderr floor_bpd excess_bpd "
    "rate_bits_per_image pca64_bpd mean_image_bpd lingauss_bpd likelihood gaussian_bpd png_bpd webp_bpd jpegls_bpd "
    "jxl_bpd".split(),
    "metrics": "step seconds steps_per_second reconstruction_bpd diffusion_bpd latent_bpd vlb_bpd".split(),
}
FROM_DATA = {"image_shape", "classes"}  # settings of the model that no option sets


# The whole job in processes of their own


def test_train_prints_the_result_and_writes_the_run(trained: Trained) -> None:
    assert trained.process.returncode == 0, trained.process.stderr
    lines = trained.process.stdout.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"step {STEPS}"] * 2
    assert lines[-1] == f"run: {trained.path}"
    expected = {"config.json", "baselines.npz", "metrics.jsonl", "evaluations.jsonl", "MODEL_CARD.md", "checkpoints"}
    assert {p.name for p in trained.path.iterdir()} == expected


def test_progress_goes_to_stderr_only(trained: Trained) -> None:
    """With the bound, its three terms and the time left."""
    process = trained.process
    assert f"{STEPS}/{STEPS}" in process.stderr
    last = process.stderr.replace("\r", "\n").split("\n")[-2]
    assert re.search(r"\d\d:\d\d left, total [\d.e-]+ recon [\d.e-]+ diff [\d.e-]+ prior [\d.e-]+$", last)
    assert "Warning" not in process.stderr
    assert "recon " not in process.stdout and "%" not in process.stdout


def test_train_without_data_uses_the_phantom(trained: Trained) -> None:
    assert "--data" not in trained.process.args
    record = json.loads((trained.path / "config.json").read_text())
    assert record["config"]["data"]["data"] == record["data"]["name"] == "phantom"


def test_metrics_hold_each_step_once_with_the_promised_keys(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert set(CONTRACT_KEYS["metrics"]) <= set(line)
        assert line["steps_per_second"] > 0
        terms = line["reconstruction_bpd"] + line["diffusion_bpd"] + line["latent_bpd"]
        assert line["vlb_bpd"] == pytest.approx(terms, rel=1e-5)
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(lines, lines[1:], strict=False))


@pytest.mark.slow
def test_the_contract_end_to_end(trained: Trained, run: Path, tmp_path: Path) -> None:
    """Refuse a second training, resume, evaluate, sample: every command in a process of its own."""
    before = tree(run)

    again = ["train", "--data", "phantom", "--preset", "demo", "--seed", "0", "--out", run, *tiny.options()]
    second = tiny.medvdm_command(*again)
    assert second.returncode == 2 and "--resume" in second.stderr and str(run) in second.stderr
    assert second.stdout == "" and len(second.stderr.splitlines()) == 1
    assert tree(run) == before

    resumed = tiny.medvdm_command(*again, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == trained.process.stdout.replace(str(trained.path), str(run))
    after = tree(run)
    assert {p for p in after if after[p] != before.get(p)} <= {"MODEL_CARD.md"} and set(before) == set(after)

    evaluated = tiny.medvdm_command("evaluate", run, "--data", "phantom", "--split", "test", "--ema", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stderr == ""
    assert evaluated.stdout.count("\n") == 1
    result = json.loads(evaluated.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(CONTRACT_KEYS["evaluate"]) <= set(result)
    assert result["weights"] == "ema"

    file = tmp_path / "samples.npz"
    options = ["--num", "5", "--steps", "3", "--label", "Pneumonia", "--guidance", "1.5", "--seed", "4"]
    sampled = tiny.medvdm_command("sample", run, *options, "--out", file)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stderr == "" and str(file) in sampled.stdout
    with np.load(file) as archive:
        assert archive["images"].shape == (5, 16, 16, 1) and archive["images"].dtype == np.float32
        assert archive["images"].min() >= 0 and archive["images"].max() <= 1
        assert list(archive["class_names"][archive["labels"]]) == ["Pneumonia"] * 5
        provenance = json.loads(str(archive["provenance"]))
    wanted = {"run": run.name, "version": medvdm.__version__, "seed": 4, "steps": 3, "guidance": 1.5, "weights": "raw"}
    assert {name: provenance[name] for name in wanted} == wanted


# Options


def test_every_setting_has_an_option_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for kind in (DataConfig, VDMConfig, TrainConfig, KeepConfig):
        for field in dataclasses.fields(kind):
            shown = re.search(rf"--{field.name.replace('_', '-')}(?![\w-])", text) is not None
            assert shown == (field.name not in FROM_DATA), field.name
    for name in ("preset", "out", "resume", "conditional"):
        assert re.search(rf"--{name}(?![\w-])", text), name


#: For every setting, a value that no preset has.
OTHER_VALUES: dict[str, Any] = {
    "data": "folder",
    "data_dir": "somewhere",
    "image_size": 48,
    "fit": "crop",
    "num_images": 77,
    "data_seed": 5,
    "patient_pattern": "(p[0-9]+)",
    "window": "-1000,400",
    "visits": 3,
    "withhold": 2,
    "canaries": 5,
    "canary_copies": "1,3",
    "timesteps": 11,
    "gamma_min": -7.5,
    "gamma_max": 6.5,
    "schedule": "monotonic",
    "architecture": "linear-start",
    "latent": 3,
    "embedding_dim": 6,
    "encoder_width": 7,
    "decoder_width": 9,
    "inner_width": 13,
    "encoder_layers": 3,
    "decoder_layers": 5,
    "score_layers": 8,
    "width": 12,
    "scales": 1,
    "blocks": 4,
    "patch": 8,
    "base_scales": 5,
    "details": "fourier",
    "dtype": "bfloat16",
    "steps": 17,
    "batch_size": 3,
    "seed": 21,
    "learning_rate": 0.0123,
    "warmup_steps": 19,
    "final_fraction": 0.25,
    "b1": 0.81,
    "b2": 0.82,
    "adam_eps": 1e-7,
    "weight_decay": 0.031,
    "clip_norm": 3.5,
    "dp_clip": 0.25,
    "ema_decay": 0.77,
    "label_dropout": 0.33,
    "gradient_difference_weight": 0.125,
    "augment_shift": 0.04,
    "augment_size": 0.06,
    "augment_exposure": 0.07,
    "basis_copies": 2,
    "schedule_rate": 3.0,
    "evaluate_every": 4,
    "checkpoint_every": 6,
    "keep_checkpoints": 9,
}


class Caught(Exception):
    """Stops a command where training would start."""


def caught_config(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[RunConfig, dict[str, Any]]:
    """The config that ``train`` would train with, and the other arguments of ``fit``."""
    seen: list[Any] = []

    def stop(config: RunConfig, out: str, **rest: Any) -> None:
        seen.append((config, {"out": out, **rest}))
        raise Caught

    monkeypatch.setattr(fit, "fit", stop)
    with pytest.raises(Caught):
        main(["train", *arguments])
    return seen[0]


def test_every_option_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (DataConfig, VDMConfig, TrainConfig, KeepConfig)
    every = {f.name for kind in parts for f in dataclasses.fields(kind)} - FROM_DATA
    assert every == {
        *OTHER_VALUES,
        *(
            "stratified_times",
            "learn_ends",
            "schedule_objective",
            "keep_best",
            "attention",
            "rounding",
            "crop",
            "reduce",
            "stages",
            "noise_weight",
            "dp_noise",
        ),
    }
    words = [text for name, value in OTHER_VALUES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    config, rest = caught_config(
        monkeypatch,
        "--preset",
        "paper",
        *words,
        "--no-stratified-times",
        "--learn-ends",
        "--attention",
        "--no-rounding",
        "--keep-best",
        "--conditional",
        "--out",
        "there",
    )
    found = config_.flat(config)
    assert {name: found[name] for name in OTHER_VALUES} == OTHER_VALUES
    assert (
        found["stratified_times"] is False
        and found["learn_ends"] is True
        and found["attention"] is True
        and found["rounding"] is False
        and found["keep_best"] is True
        and found["conditional"] is True
        and found["preset"] == "paper"
    )
    assert rest == {"out": "there", "resume": False, "progress": True}


def test_crop_and_cascade_reach_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--preset", "pixel", "--crop", "40", "--reduce", "8", "--stages", "3", "--noise-weight", "2", "--out", "x")
    config, _ = caught_config(monkeypatch, *words)
    assert (config.training.crop, config.training.noise_weight) == (40, 2.0)
    assert (config.model.reduce, config.model.stages) == (8, 3)


def test_noise_on_gradients_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught_config(monkeypatch, "--dp-noise", "1.5", "--out", "x")[0].training.dp_noise == 1.5


def test_the_objective_of_the_schedule_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--schedule", "monotonic", "--schedule-objective", "variance", "--out", "x")
    assert caught_config(monkeypatch, *words)[0].training.schedule_objective == "variance"


@pytest.mark.parametrize("name", PRESETS)
def test_train_takes_a_preset_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = caught_config(monkeypatch, "--preset", name, "--out", "x")
    assert config == preset(name)


def test_train_without_a_preset_takes_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rest = caught_config(monkeypatch, "--out=x", "--no-progress", "--seed=3")
    assert config == preset("demo", seed=3)
    assert rest["progress"] is False


def test_resume_keeps_what_is_not_said_again(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rest = caught_config(monkeypatch, "--out", str(trained.path), "--resume", "--checkpoint-every", "5")
    assert rest["resume"] is True
    old = config_.flat(read_record(trained.path)[1])
    new = config_.flat(config)
    assert {name for name in new if new[name] != old[name]} - FROM_DATA == {"checkpoint_every"}


def test_resume_finds_the_run_in_the_home_folder(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained.path.parent))
    config, _ = caught_config(monkeypatch, "--out", f"~/{trained.path.name}", "--resume")
    assert config.model.latent == read_record(trained.path)[1].model.latent == tiny.SETTINGS["latent"]


# Names that mean something to a parser

NAMES = [
    "None",
    "none",
    "True",
    "False",
    "1",
    "-1",
    "nan",
    "null",
    "[]",
    "{}",
    "a b",
    "胸部",
    "--",
    "-x",
    "--out",
    "a=b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_text(name: str) -> None:
    """Whatever a folder, a class or a pattern is called."""
    drawn = parse(options.Sample, [f"--label={name}", f"--out={name}", "--", name], "sample")
    assert (drawn.run, drawn.out, drawn.drawing.label) == (name, name, (name,))
    evaluated = parse(options.Evaluate, [f"--data={name}", f"--data-dir={name}", "--", name], "evaluate")
    assert (evaluated.run, evaluated.data, evaluated.data_dir) == (name, name, name)
    given = [f"--{option}={name}" for option in ("out", "data", "data-dir", "patient-pattern", "coordinator")]
    trained = parse(options.Train, given, "train", options.train_defaults(preset("demo")))
    found = (
        trained.out,
        trained.data.data,
        trained.data.data_dir,
        trained.data.patient_pattern,
        trained.processes.coordinator,
    )
    assert found == (name,) * 5
    start, _ = parse(options.Start, given, "train", add_help=False, return_unknown_args=True)
    assert start.out == name


@pytest.mark.parametrize("name", [n for n in NAMES if not (n.startswith("-") and not n[1:].isdigit())])
def test_a_name_needs_no_equals_sign_unless_it_looks_like_an_option(name: str) -> None:
    drawn = parse(options.Sample, [name, "--label", name, "--label", "Mass", "--out", name], "sample")
    assert (drawn.run, drawn.out, drawn.drawing.label) == (name, name, (name, "Mass"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train --out x --resume=True", "--resume: 'True'; expected no value after --resume (see medvdm train --help)"),
        ("train", "--out: missing; expected the folder of the run (see medvdm train --help)"),
        ("train --out=", "--out: ''; expected the folder of the run"),
        ("train --out x --fit squash", "--fit: 'squash'; (choices: pad, crop, stretch)"),
        ("train --out x --dtype floot32", "--dtype: 'floot32'; did you mean 'float32'?"),
        ("train --out x --steps ten", "--steps: 'ten'; expected a whole number (see medvdm train --help)"),
        ("train --out x --b1 much", "--b1: 'much'; expected a number (see medvdm train --help)"),
        ("train --out x --lerning-rate 1", "--lerning-rate, 1: unknown; did you mean '--learning-rate'?"),
        ("train --out x --tyro-print-completion no", "unknown"),
        ("train --tyro-print-completion no", "--tyro-print-completion: unknown"),
        (
            "sample r --out a.png --label -x",
            "--label: no value; expected one (one that begins with '-' is written --lab",
        ),
        ("sample r", "--out: missing; expected the file to write"),
        ("sample --out a.png", "RUN: neither; expected the folder of a run, or --pretrained"),
        (
            "sample r --pretrained phantom --out a.png",
            "RUN: 'r' and --pretrained phantom; expected the folder of a run",
        ),
        ("sample --pretrained phantom --ema --out a.png", "--pretrained: has the moving average of its last step only"),
        ("sample --pretrained fantom --out a.png", "--pretrained: 'fantom'; did you mean 'phantom'?"),
        ("evaluate -r", "RUN: missing; expected one (one that begins with '-' comes after '--')"),
        ("evaluate r s", "s: unknown"),
        ("evaluate r --step bst", "--step: 'bst'; expected None or a whole number or best (see medvdm"),
        ("evaluate r --image-size 2.5", "--image-size: '2.5'; expected None or a whole number (see medvdm"),
        ("evaluate r --draws", "--draws: no value; expected one"),
    ],
)
def test_what_the_parser_refuses_is_said_in_one_plain_line(
    argv: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(capfd, *argv.split(), names=[line])


def test_a_long_name_is_not_broken(capfd: pytest.CaptureFixture[str]) -> None:
    name = "--" + "a-name-that-is-longer-than-a-terminal-is-wide" * 4
    refused(capfd, "evaluate", "r", name, names=[f"medvdm: {name}: unknown"])


WORDS = st.one_of(
    st.sampled_from(["train", "evaluate", "sample", "audit", "benchmark", "--help", "-h", "--version", "--", "-", ""]),
    st.sampled_from(
        "out preset resume no-resume steps seed label data data-dir image-size split num guidance json ema step "
        "coordinator num-processes gamma-min dtype fit image-shape classes drawing.num tyro-print-completion".split()
    ).flatmap(lambda name: st.sampled_from([f"--{name}", f"--{name.replace('-', '_')}", f"--{name}="])),
    st.sampled_from(
        ["3", "-3", "1e400", "nan", "0x10", "9" * 5000, "None", "paper", "demo", "a.png", "b", "=", "--=x"]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=8),
    st.text(st.characters(exclude_characters="\0"), max_size=4).map(lambda text: f"--{text}"),
)


COMMANDS = ["train", "evaluate", "sample", "inpaint", "audit", "denoise", "score", "benchmark"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(COMMANDS),
    words=st.lists(WORDS, max_size=6),
)
@example(command="train", words=["--out", "x", "--seed", "9" * 5000])
@example(command="sample", words=["r", "--label", "\udcff", "--out", "\udcff.jpg"])
def test_random_arguments_never_give_a_traceback(
    command: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The work itself is cut off; whatever is said is help on stdout, or one line on stderr."""

    def cut_off(*_: Any, **__: Any) -> None:
        raise errors.InputError("cut off")

    for place in ("runs.fit.fit", "runs.run.load", "cost.benchmark.run", "training.devices.start_processes"):
        monkeypatch.setattr(f"medvdm.{place}", cut_off)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    try:
        code = main([command, *words])
    except SystemExit as stop:  # the help of a command
        code = stop.code
    out, err = sys.stdout.getvalue(), sys.stderr.getvalue()
    if code == 0:
        assert "usage: medvdm" in out and not err
    else:
        assert code == 2 and not out
        assert len(err.splitlines()) == 1 and err.startswith("medvdm: "), err


# What the README and the manual promise, held against the parser

ROOT = Path(__file__).parents[2]
PARSED = {
    "train": options.Train,
    "evaluate": options.Evaluate,
    "sample": options.Sample,
    "inpaint": options.Inpaint,
    "audit": options.Audit,
    "denoise": options.Denoise,
    "score": options.Score,
    "verify": options.Verify,
    "export": options.Export,
    "benchmark": options.Benchmark,
}


POSITIONAL = {"run": "RUN", "file": "FILE", "files": "FILE"}


def settings_of(kind: Any, default: Any) -> dict[str, Any]:
    """Every option of a command with its default, through the dataclasses that it is composed of."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            found |= settings_of(value, value)
        elif field.name not in FROM_DATA:
            found[POSITIONAL.get(field.name, f"--{field.name.replace('_', '-')}")] = value
    return found


def options_of(command: str, chosen: str = "demo") -> dict[str, Any]:
    if command == "train":
        return settings_of(options.Train, options.train_defaults(preset(chosen)))
    required = {f.name: None for f in dataclasses.fields(PARSED[command]) if f.name in ("run", "file", "mask", "out")}
    return settings_of(PARSED[command], PARSED[command](**required))


def readable(command: str, words: list[str]) -> Any:
    """What the parser makes of a documented line; a preset's own defaults where one is named."""
    if command != "train":
        return parse(PARSED[command], words, command)
    chosen = words[words.index("--preset") + 1] if "--preset" in words else "demo"
    return parse(options.Train, words, command, options.train_defaults(preset(chosen)))


def test_the_contract_of_the_readme_is_what_the_parser_takes() -> None:
    """Word by word: each option with each of the values that it lists, with and without what is optional."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("The full contract:\n\n```\n")[1].split("\n```")[0].splitlines()
    listed = [line.split()[1] for line in lines]
    assert listed == list(PARSED)
    examples = {
        **{"N": "3", "T": "5", "W": "1.5", "DIR": "there", "RUN": "runs/x", "NAME": "Mass", "SPLIT": "val"},
        **{"<medmnist flag>": "pneumoniamnist", "FILE.{npz|png|dcm}": "s.png", "FILE...": "a.png", "FILE": "s.png"},
        **{"MASK": "m.png", "K": "2", "G": "0.01", "S": "0.1"},
    }
    for line in lines:
        _, command, rest = line.split(maxsplit=2)
        known = options_of(command)
        for optional in (True, False):
            wanted = rest.replace("[", "").replace("]", "") if optional else re.sub(r"\[[^]]*\]", "", rest)
            words, chosen = [], {}
            for part in re.findall(r"FILE\.\{[^}]*\}|\{[^}]*\}|\S+", wanted):
                if part.startswith("--"):
                    assert part in known, (command, part)
                    words.append(part)
                elif part.startswith("{"):
                    chosen[words[-1]] = part.strip("{}").split("|")
                    words.append(examples.get(chosen[words[-1]][0], chosen[words[-1]][0]))
                elif part == "RUN" and not words:
                    words.append(examples[part])
                elif part == "NAME" and words[-1] == "--preset":
                    words.append("paper")
                else:
                    words.append(examples[part])
            readable(command, words)
            for option, values in chosen.items():
                for value in values:
                    place = words.index(option) + 1
                    readable(command, [*words[:place], examples.get(value, value), *words[place + 1 :]])
            if "--preset" in chosen:
                assert tuple(chosen["--preset"]) == PRESETS


def helped(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The help of a command, without its boxes and line breaks."""
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    return " ".join("".join(" " if "\u2500" <= c <= "\u259f" else c for c in capsys.readouterr().out).split())


@pytest.mark.parametrize("name", PRESETS)
def test_the_help_of_train_shows_the_defaults_of_the_preset(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")  # one box below the other
    text = helped(capsys, "train", "--preset", name)
    assert f"those of the preset {name}." in text
    parts = re.split(r"\((?:default: ([^)]*)|required)\)", text.split("and exit", 1)[1])
    shown = {}
    for words, default in zip(parts[::2], parts[1::2], strict=False):
        if found := re.search(r"--[a-z][\w-]*", words):
            shown.setdefault(found[0], default)
    assert shown.pop("--out") is None, "required"
    for option, value in options_of("train", name).items():
        assert option == "--out" or shown[option] in (str(value), "none"), option


def test_the_help_says_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"--out FOLDER Folder of the run\. \(required\)", helped(capsys, "train"))
    assert re.search(r"--out FILE File to write, (\([^()]*\)|[^()])* \(required\)", helped(capsys, "sample"))
    assert "RUN Folder of the run. (default: none)" in helped(capsys, "sample")
    text = helped(capsys, "evaluate")
    assert "RUN Folder of the run. (required)" in text and text.split("Folder")[0].count("STR") == 0
    assert "usage: medvdm evaluate [-h] [OPTIONS] RUN" in text
    assert "RUN Folder of the run. (default: none)" in helped(capsys, "audit")  # folders may stand in for it


def test_the_help_of_a_resumed_run_shows_its_own_settings(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys, "train", "--out", str(trained.path), "--resume")
    assert "Dimensions of the latent. (default: 4)" in text


@pytest.mark.parametrize("page", ["README.md", "book/cli.md"])
def test_every_command_on_the_page_can_be_read(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n>", "").replace("\\\n", "")
    text = text.split("\n## Errors and exit codes\n")[0]  # the lines there are wrong on purpose
    lines = re.findall(rf"^(?:\$ )?(medvdm (?:{'|'.join(PARSED)}) [^\n]*)$", text, re.M)
    lines = [line for line in lines if not re.search(r"[\[{]", line)]  # the contract has a test of its own
    assert len(lines) >= 8
    for line in lines:
        _, command, *words = shlex.split(re.sub(r"\s*(&?>|\||#).*$", "", line))
        if "--resume" in words or "--help" in words:
            continue
        readable(command, words)


def documented(command: str) -> dict[str, list[str]]:
    """The rows of the manual's tables for a command: option, then the cells after its meaning."""
    text = (ROOT / "book" / "cli.md").read_text(encoding="utf-8")
    part = text.split(f"\n## {command.capitalize()}\n")[1].split("\n## ")[0]
    rows: dict[str, list[str]] = {}
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(--[a-z0-9-]+|RUN|FILE)[^`]*`", cells[0]) if line.startswith("| `") else []
        for name in names:
            assert name not in rows, name
            rows[name] = cells[2:]
    return rows


COMMANDS_WITH_TABLES = [command for command in PARSED if command != "benchmark"]
WORDS_OF_DEFAULTS = {"off": False, "on": True, "spread": True, "shown": True, "none": None}


@pytest.mark.parametrize("command", COMMANDS_WITH_TABLES)
def test_the_manual_lists_every_option_with_its_default(command: str) -> None:
    rows = documented(command)
    known = options_of(command)
    listed = {re.sub(r"^--no-", "--", name) if name not in known else name for name in rows}
    assert listed == set(known)
    for name, cells in rows.items():
        name = re.sub(r"^--no-", "--", name) if name not in known else name
        for column, cell in zip(("demo", "paper") if len(cells) == 2 else ("demo",), cells, strict=True):
            default = options_of(command, column)[name]
            shown = cell.strip("`")
            if isinstance(default, bool):
                assert WORDS_OF_DEFAULTS.get(shown.split()[0]) is default, (name, cell)
            elif isinstance(default, int | float):
                numbers = [float(n) for n in re.findall(r"-?\d[\d.e-]*", shown.replace(",", " "))]
                assert default in numbers or shown in ("the same", "one process"), (name, cell)
            elif isinstance(default, str):
                assert shown == default, (name, cell)


def test_the_manual_lists_the_options_of_benchmark() -> None:
    text = (ROOT / "book" / "cli.md").read_text(encoding="utf-8").split("\n## Benchmark\n")[1].split("\n## ")[0]
    for name, default in options_of("benchmark").items():
        assert f"`{name}`" in text, name
        if type(default) is int:
            assert f"`{name}` ({default})" in text, name


# Names that the terminal, or UTF-8, cannot hold


def ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str, str]]:
    """From now on there is a terminal that can show ASCII only; returns what tells what it showed."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def shown() -> tuple[str, str]:
        for stream in streams:
            stream.flush()
        return streams[0].buffer.getvalue().decode("ascii"), streams[1].buffer.getvalue().decode("ascii")

    return shown


@pytest.mark.parametrize("name", ["胸部", "caf\udce9"])  # the second is what Python makes of the bytes b"caf\xe9"
def test_a_name_that_cannot_be_shown_is_shown_as_its_code(
    name: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, run = name.encode("ascii", "backslashreplace").decode(), str(trained.path)
    shown = ascii_terminal(monkeypatch)
    for suffix in (".png", ".npz"):
        assert main(["sample", run, "--num", "1", "--steps", "2", "--out", f"{tmp_path / name}{suffix}"]) == 0
        assert (tmp_path / (name + suffix)).stat().st_size > 0
        assert shown()[0].endswith(f"1 synthetic images: {tmp_path}/{code}{suffix}\n")
    assert main(["sample", run, "--num", "1", "--label", name, "--out", str(tmp_path / "a.png")]) == 2
    assert f"label: '{code}'" in shown()[1]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", name, "--data-dir", name, "--help"])
    assert stop.value.code == 0 and "usage: medvdm train" in shown()[0]


def test_a_run_of_a_name_that_cannot_be_shown(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = run.rename(tmp_path / "胸部")
    shown = ascii_terminal(monkeypatch)
    assert main(["evaluate", str(named), "--split", "val", "--draws", "2"]) == 0
    assert shown()[0].startswith("\\u80f8\\u90e8 at step 12")
    assert main(["evaluate", str(named), "--split", "val", "--draws", "2", "--json"]) == 0
    assert json.loads(shown()[0].splitlines()[-1])["run"] == "胸部"


# What is printed, and the exit codes


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"medvdm {medvdm.__version__}\n", "")


def test_help_names_the_commands_and_nothing_else_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert main(argv) == code
        out, err = capsys.readouterr()
        assert all(command in out for command in COMMANDS) and not err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert f"medvdm {command}" in out and not err


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("eval", "evaluate"), ("Sample", "sample")])
def test_an_unknown_command_suggests_the_nearest(word: str, meant: str, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, word, names=[f"'{word}'", f"did you mean '{meant}'?"])


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (errors.InputError("wrong"), 2),
        (errors.RunError("wrong"), 2),
        (errors.DivergedError("wrong"), 1),
        (errors.StoppedError("wrong", signal.SIGTERM), 143),
        (errors.StoppedError("wrong", signal.SIGINT), 130),
        (OSError(errno.ENOSPC, "wrong", "/some/file"), 2),
        (PermissionError(errno.EACCES, "wrong", "/some/file"), 2),
    ],
)
def test_exit_codes(
    problem: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(fit, "fit", fail)
    assert main(["train", "--out", "x"]) == code
    out, err = capfd.readouterr()
    assert err.startswith("medvdm: ") and len(err.splitlines()) == 1 and "wrong" in err and not out
    if isinstance(problem, OSError) and problem.filename:
        assert "/some/file" in err


@pytest.mark.parametrize("words", [("--out", "x"), ("--out=x",)])
def test_a_full_disk_is_named_by_where_the_command_writes(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A write, unlike opening a file, does not say where."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fit, "fit", fail)
    assert main(["train", *words]) == 2
    line = "medvdm: x: No space left on device; expected a place that can be written\n"
    assert capfd.readouterr().err == line


def test_the_manual_has_every_exit_code() -> None:
    text = (ROOT / "book" / "cli.md").read_text(encoding="utf-8").split("\n## Errors and exit codes\n")[1]
    cells = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", text, re.M)
    listed = {int(code): meaning for codes, meaning in cells for code in codes.split(",")}
    assert set(listed) == {0, 1, 2, 130, 141, 143}
    kinds = [vars(errors)[name] for name in dir(errors) if name.endswith("Error") and name != "StoppedError"]
    assert len(kinds) > 5 and {kind.exit_code for kind in kinds} <= set(listed)
    assert "diverged" in listed[errors.DivergedError.exit_code]
    assert "does not read back" in listed[errors.NotSavedError.exit_code]


def test_ctrl_c_before_training_is_130(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", interrupt)
    assert main(["train", "--out", "x"]) == 130
    assert capfd.readouterr().err == "medvdm: interrupted\n"


@pytest.mark.parametrize("problem", [RuntimeError("a bug"), OSError(errno.EIO, "input/output error")])
def test_a_bug_is_not_hidden(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(fit, "fit", fail)
    with pytest.raises(type(problem)):
        main(["train", "--out", "x"])


def test_an_error_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise errors.DataError("a file\n  with a\tname\nof lines")

    monkeypatch.setattr(fit, "fit", fail)
    assert main(["train", "--out", "x"]) == 2
    assert capfd.readouterr().err == "medvdm: a file with a name of lines\n"


# Evaluate


def test_evaluate_for_people_shows_what_the_json_holds(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = json.loads(said(capfd, "evaluate", run, "--split", "val", "--draws", "2", "--json")[0])
    text, err = said(capfd, "evaluate", run, "--split", "val", "--draws", "2")
    assert err == ""
    for key in ("reconstruction_bpd", "vlb_bpd", "vlb_bpd_stderr", "floor_bpd", "excess_bpd", "mean_image_bpd"):
        assert f"{result[key]:.4f}" in text, key
    assert f"{result['rate_bits_per_image']:.1f} bits/image" in text
    assert "raw weights" in text and "true labels" in text and "split 'val'" in text
    assert result["pca64_bpd"] is None and "not fitted" in text
    assert "no labels (null)" in said(capfd, "evaluate", run, "--split", "val", "--draws", "2", "--null")[0]


def test_codecs_of_a_bernoulli_run_are_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "evaluate", run, "--codecs", names=["codecs: ", "Bernoulli", "preset pixel"])


def test_evaluate_options_reach_the_result(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def evaluate(*options: str) -> dict[str, Any]:
        out = said(capfd, "evaluate", run, "--split", "val", "--draws", "2", "--json", *options)[0]
        return json.loads(out)

    raw, ema, null, other = evaluate(), evaluate("--ema"), evaluate("--null"), evaluate("--seed", "1")
    assert (raw["weights"], raw["labels"], raw["draws"]) == ("raw", "true", 2)
    assert (ema["weights"], ema["labels"]) == ("ema", "true") and ema["vlb_bpd"] != raw["vlb_bpd"]
    assert (null["weights"], null["labels"]) == ("raw", "null") and null["diffusion_bpd"] != raw["diffusion_bpd"]
    assert other["diffusion_bpd"] != raw["diffusion_bpd"] and other["floor_bpd"] == raw["floor_bpd"]
    assert len(list((run / "results").glob("*.json"))) == 4, "each kind of evaluation has a file of its own"
    every = evaluate("--split", "all")
    counts = json.loads((run / "config.json").read_text())["data"]["counts"]
    assert raw["num_images"] == counts["val"]["images"]
    assert every["num_images"] == sum(side["images"] for side in counts.values()) == 60


# Sample


def draw(capfd: pytest.CaptureFixture[str], run: Path, folder: Path, *options: str | Path) -> dict[str, np.ndarray]:
    file = folder / "drawn.npz"
    said(capfd, "sample", run, "--steps", "4", "--out", file, *options)
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def test_sample_seed_label_guidance_and_ema(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def images(*options: str) -> np.ndarray:
        return draw(capfd, trained.path, tmp_path, *options)["images"]

    three = images("--num", "3", "--seed", "7")
    np.testing.assert_array_equal(images("--num", "3", "--seed", "7"), three)
    assert not np.allclose(images("--num", "3", "--seed", "8"), three, atol=1e-4)
    assert not np.allclose(three[0], three[1], atol=1e-4)
    assert not np.array_equal(images("--num", "3", "--seed", "7", "--ema"), three)

    sick = images("--num", "3", "--seed", "7", "--label", "Pneumonia")
    well = images("--num", "3", "--seed", "7", "--label", "No Finding")
    assert not np.array_equal(sick, three) and not np.array_equal(sick, well)
    np.testing.assert_array_equal(images("--num", "3", "--seed", "7", "--label", "Pneumonia", "--guidance", "0"), sick)
    guided = images("--num", "3", "--seed", "7", "--label", "Pneumonia", "--guidance", "5")
    assert np.abs(guided - three).mean() > np.abs(sick - three).mean(), "guidance moves away from the null"


def test_sample_labels(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = json.loads((trained.path / "config.json").read_text())["data"]["class_names"]
    assert draw(capfd, trained.path, tmp_path, "--num", "2")["labels"].tolist() == [-1, -1]
    for index, name in enumerate(names):
        drawn = draw(capfd, trained.path, tmp_path, "--num", "2", "--label", name)
        assert drawn["labels"].tolist() == [index, index] and list(drawn["class_names"]) == names
    refused(
        capfd,
        *("sample", trained.path, "--num", "1", "--out", tmp_path / "no.npz", "--label", "pneumonai"),
        names=["label", "'pneumonai'", "did you mean 'Pneumonia'?"],
    )
    assert not (tmp_path / "no.npz").exists()


def test_sample_of_several_findings(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The network is told of all of them; a file says which, and that no single label stands for them."""
    one = draw(capfd, trained.path, tmp_path, "--num", "2", "--label", "Pneumonia")
    both = draw(capfd, trained.path, tmp_path, "--num", "2", "--label", "Pneumonia", "--label", "No Finding")
    assert one["findings"].tolist() == [[0, 1]] * 2 and one["labels"].tolist() == [1, 1]
    assert both["findings"].tolist() == [[1, 1]] * 2 and both["labels"].tolist() == [-1, -1]
    assert json.loads(str(both["provenance"]))["label"] == ["Pneumonia", "No Finding"]
    assert not np.array_equal(one["images"], both["images"])
    run = medvdm.load(trained.path)
    names = ("No Finding", "Pneumonia")
    np.testing.assert_array_equal(medvdm.sample(run, 2, steps=4, label=names).images, both["images"])
    refused(capfd, "audit", trained.path, *(f"--label={n}" for n in names), names=["'No Finding and Pneumonia'"])


def test_sample_png_is_a_marked_grid(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    file = tmp_path / "grid.PNG"
    out, err = said(capfd, "sample", trained.path, "--num", "4", "--steps", "4", "--seed", "2", "--out", file)
    assert str(file) in out and "synthetic" in out and err == ""
    images = draw(capfd, trained.path, tmp_path, "--num", "4", "--seed", "2")["images"]
    with Image.open(file) as picture:
        pixels = np.asarray(picture)
        assert "ynthetic" in picture.text["Comment"] and trained.path.name in picture.text["Source"]
    np.testing.assert_array_equal(pixels[:16, :16], np.rint(images[0, ..., 0] * 255))
    np.testing.assert_array_equal(pixels[-16:, -16:], np.rint(images[3, ..., 0] * 255))


# Benchmark


def test_benchmark_refuses_a_platform_that_is_not_here(monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    def none() -> None:
        raise RuntimeError("Backend 'metal' is not in the list of known backends")

    monkeypatch.setattr(jax, "devices", none)
    assert main(["benchmark", "--image-size", "16"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("medvdm: JAX_PLATFORMS: ") and err.count("\n") == 1


@pytest.mark.slow
def test_benchmark_json(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "demo", "--image-size", "16", "--batch-size", "4", "--repeats", "3", "--json"]
    with jax.numpy_rank_promotion("allow"):  # conftest.py forbids it; the plain step is as plain as people write it
        out, err = said(capfd, "benchmark", *options)
    assert err == "" and out.count("\n") == 1
    result = json.loads(out)
    assert result["preset"] == "demo" and result["image_shape"] == [16, 16, 1] and result["batch_size"] == 4
    for name in ("ratio", "loop_over_step", "step_ms", "plain_step_ms", "peak_memory_gib"):
        assert result[name] > 0, name
    assert result["first_loss_bpd"] == pytest.approx(result["plain_first_loss_bpd"], rel=1e-4)


def test_audit_of_privacy_by_folders(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a run: a planted copy is named, and the JSON is all there is on stdout."""
    monkeypatch.setattr(privacy.controls, "run_controls", lambda *_, **__: {})  # the same for all, and slow
    monkeypatch.setattr(registration, "BATCH", 10)
    phantoms = medvdm.data.load(DataConfig(num_images=54, image_size=16, visits=1))
    images = np.rint(255 * phantoms.read(np.arange(54))[..., 0]).astype(np.uint8)
    sides = {"train": range(30), "held": range(30, 50), "drawn": (7, 50, 51, 52, 53)}
    for name, rows in sides.items():
        (tmp_path / name).mkdir()
        for i in rows:
            Image.fromarray(images[i]).save(tmp_path / name / f"{i}.png")
    before = tree(tmp_path)
    options = [w for o, n in zip(("--train", "--held-out", "--samples"), sides, strict=True) for w in (o, tmp_path / n)]
    out, err = said(capfd, "audit", "--privacy", *options, "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert err == "" and out.count("\n") == 1
    assert {"num_samples", "num_copies", "copies", "false_alarm_rate"} <= set(result)
    assert (result["num_samples"], result["num_copies"]) == (5, 1)
    (found,) = result["copies"]
    assert (found["sample"], found["training_image"]) == ("7.png", "7.png") and found["score"] > found["threshold"]
    assert tree(tmp_path) == before
