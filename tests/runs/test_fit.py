"""The training loop: exact resume, kills, several devices and processes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny

import medvdm
from medvdm import data as data_
from medvdm import errors
from medvdm.cli.main import main
from medvdm.evaluation import held_out
from medvdm.runs import config as config_
from medvdm.runs import fit, journal
from medvdm.runs.config import RunConfig
from medvdm.runs.run import load
from medvdm.runs.store import BEST, CARD, CHECKPOINTS, CONFIG, EVALUATIONS, METRICS, locked, read_json, read_lines
from medvdm.training import loop
from medvdm.training import step as step_
from medvdm.training.batches import training_batches
from medvdm.training.checkpoints import Checkpoints
from medvdm.training.devices import Layout
from medvdm.training.step import make_step

LOSSES = ("reconstruction_bpd", "diffusion_bpd", "latent_bpd", "vlb_bpd", "loss")


def losses(run: Path) -> dict[int, tuple[float, ...]]:
    """The losses of each step; fails if a step stands there twice or a line is broken."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "metrics.jsonl must hold each step once"
    return {line["step"]: tuple(line[name] for name in LOSSES) for line in lines}


def arrays(n: int, labels: Any = None, **more: Any) -> data_.ImageData:
    """n random images of the sides and the number of classes of the others, so that they are trained by one program."""
    images = np.random.default_rng(0).uniform(size=(n, 16, 16)).astype(np.float32)
    return medvdm.from_arrays(images, np.arange(n) % 2 if labels is None else labels, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing interrupted, on one device."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = tiny.medvdm_command("train", "--out", out, *tiny.options())
    assert done.returncode == 0, done.stderr
    return out


def wait_for_step(process: Any, run: Path, step: int) -> None:
    """Wait until a checkpoint of at least ``step`` is complete."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        steps = [int(p.name) for p in (run / CHECKPOINTS).glob("*") if p.name.isdigit()]
        if steps and max(steps) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} in time")


def test_a_run_reports_every_step_with_finite_terms_that_add_up(whole: Path) -> None:
    found = losses(whole)
    assert list(found) == list(range(1, 13))
    for reconstruction, diffusion, latent, total, _ in found.values():
        assert all(map(math.isfinite, (reconstruction, diffusion, latent)))
        assert total == pytest.approx(reconstruction + diffusion + latent, rel=1e-5)
    line = read_lines(whole / METRICS)[-1]
    assert {"step", "seconds", "steps_per_second"} <= set(line)
    assert [r["step"] for r in read_lines(whole / EVALUATIONS)][-1] == 12


def test_training_in_the_same_process_gives_the_same_losses(whole: Path, tmp_path: Path) -> None:
    medvdm.fit(tiny.config(), tmp_path / "again", progress=False)
    assert losses(tmp_path / "again") == losses(whole)


def test_another_seed_gives_other_losses(whole: Path, tmp_path: Path) -> None:
    medvdm.fit(tiny.config(seed=1), tmp_path / "other", progress=False)
    assert losses(tmp_path / "other")[1] != losses(whole)[1]


@pytest.mark.slow
def test_resume_after_kill_9_is_exact_also_on_another_number_of_devices(tmp_path: Path) -> None:
    """Killed again and again at whatever point, a run ends with the losses of one that never was."""
    many = tiny.options(steps=400, checkpoint_every=20)
    whole_run, killed = tmp_path / "whole", tmp_path / "killed"
    assert tiny.medvdm_command("train", "--out", whole_run, *many).returncode == 0
    process = tiny.start("train", "--out", killed, *many)
    wait_for_step(process, killed, 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps_seen = len(read_lines(killed / METRICS))
    assert 0 < steps_seen < 400
    losses(killed)  # each step once, also before the resume
    resumed = tiny.medvdm_command("train", "--out", killed, "--resume", *many)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(killed) == losses(whole_run)
    seconds = [r["seconds"] for r in read_lines(killed / METRICS)]
    assert seconds == sorted(seconds)
    a, b = load(whole_run), load(killed)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.mark.slow
def test_sigterm_saves_and_exits_and_the_run_continues_on_fewer_devices(tmp_path: Path) -> None:
    many = tiny.options(steps=300, checkpoint_every=20)
    out = tmp_path / "run"
    process = tiny.start("train", "--out", out, *many, devices=2)
    wait_for_step(process, out, 20)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    message = err.strip().splitlines()[-1]
    assert message.startswith("medvdm: SIGTERM: saved step") and "--resume" in message
    saved = int(message.split("saved step ")[1].split()[0])
    assert load(out).step == saved == len(losses(out))  # nothing lost: the newest step is on disk
    before = losses(out)
    done = tiny.medvdm_command("train", "--out", out, "--resume", devices=1)  # settings come from the run
    assert done.returncode == 0, done.stderr
    after = losses(out)
    assert list(after) == list(range(1, 301)) and all(after[k] == before[k] for k in before)
    medvdm.fit(tiny.config(steps=300), tmp_path / "one", progress=False)
    one = losses(tmp_path / "one")
    # Two devices add up in another order, and 300 large steps amplify the rounding: to 5e-5 when measured, against
    # 1e-2 between two steps of one run.
    np.testing.assert_allclose([after[k] for k in after], [one[k] for k in after], rtol=0, atol=5e-4)


@pytest.mark.slow
def test_eight_fake_devices_equal_one(whole: Path, tmp_path: Path) -> None:
    done = tiny.medvdm_command("train", "--out", tmp_path / "run", *tiny.options(), devices=8)
    assert done.returncode == 0, done.stderr
    record = read_json(tmp_path / "run" / CONFIG)
    assert record["environment"]["devices"].startswith("8 x")
    np.testing.assert_allclose(
        list(losses(tmp_path / "run").values()), list(losses(whole).values()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_two_processes_on_loopback_equal_one(whole: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    both = [
        tiny.start(
            "train", "--out", out, *tiny.options(),
            "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(i),
            devices=2,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert read_json(out / CONFIG)["environment"]["devices"].startswith("4 x")
    np.testing.assert_allclose(list(losses(out).values()), list(losses(whole).values()), rtol=1e-4, atol=1e-6)
    assert load(out).step == 12  # written by two processes, read by one


def test_a_nan_stops_with_one_line_and_the_last_good_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make_step

    def poisoned(*args: Any) -> Any:
        step = real(*args)

        def with_nan(*arguments: Any) -> Any:
            state, metrics = step(*arguments)
            bad = state.step == 8
            params = jax.tree.map(lambda p: jax.numpy.where(bad, jax.numpy.nan, p), state.params)
            return state._replace(params=params), metrics

        return with_nan

    monkeypatch.setattr(step_, "make_step", poisoned)
    monkeypatch.setattr(step_, "_program", step_._program.__wrapped__)  # neither found nor kept among the compiled
    with pytest.raises(errors.DivergedError, match=r"step 8: a weight is not finite \(last good checkpoint: 6"):
        medvdm.fit(tiny.config(checkpoint_every=2), tmp_path / "a", progress=False)
    assert load(tmp_path / "a").step == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load(tmp_path / "a").params))
    # The same, noticed by the loss of the next step.
    with pytest.raises(errors.DivergedError, match=r"step 9: the loss is nan.*last good checkpoint: 5"):
        medvdm.fit(tiny.config(checkpoint_every=5), tmp_path / "b", progress=False)
    assert max(losses(tmp_path / "b")) == 8  # no NaN in the record
    assert errors.DivergedError.exit_code == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 11}, "steps"),
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"gamma_max": 4.0}, "gamma_max"),
        ({"data_seed": 3}, "data_seed"),
        ({"seed": 5}, "seed"),
    ],
)
def test_resume_with_settings_that_would_change_the_run_is_refused(
    whole: Path, changes: dict[str, Any], named: str
) -> None:
    before = (whole / METRICS).read_bytes()
    with pytest.raises(errors.RunError, match=f"^{named}: "):
        medvdm.fit(tiny.config(**changes), whole, resume=True, progress=False)
    assert (whole / METRICS).read_bytes() == before


def test_resume_with_other_images_is_refused(tmp_path: Path) -> None:
    config, one = tiny.config(steps=2), arrays(60)
    medvdm.fit(config, tmp_path / "run", data=one, progress=False)
    other = medvdm.from_arrays(one.read(np.arange(60)) / 2, one.labels)
    with pytest.raises(errors.RunError, match="not the images"):
        medvdm.fit(config, tmp_path / "run", data=other, resume=True, progress=False)


def test_what_a_run_keeps_may_change_on_resume_and_a_finished_run_stays_as_it_is(whole: Path) -> None:
    before = losses(whole)
    run = medvdm.fit(tiny.config(keep_checkpoints=1), whole, resume=True, progress=False)
    assert run.step == 12 and losses(whole) == before


def test_a_folder_with_a_run_is_not_overwritten_and_nothing_to_resume_is_said(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.RunError, match="holds a run already"):
        medvdm.fit(tiny.config(), whole, progress=False)
    with pytest.raises(errors.RunError, match="no run to resume"):
        medvdm.fit(tiny.config(), tmp_path / "none", resume=True, progress=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.InputError, match="is a file"):
        medvdm.fit(tiny.config(), tmp_path / "file", progress=False)


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_step_0(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    medvdm.fit(tiny.config(), out, progress=False)
    for path in sorted((out / CHECKPOINTS).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with (out / METRICS).open("a") as file:
        file.write('{"step": 13, "sec')  # a line that a kill cut off
    medvdm.fit(tiny.config(), out, resume=True, progress=False)
    assert losses(out) == losses(whole)


def test_a_failure_before_training_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        medvdm.fit(tiny.config(), tmp_path / "a" / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(errors.RunError, match="MB free; expected"):
        medvdm.fit(tiny.config(), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_larger_than_the_training_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="number of training images"):
        medvdm.fit(tiny.config(batch_size=60), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_unconditional_and_learned_schedule_and_gradient_term_train(tmp_path: Path) -> None:
    settings = {"schedule": "monotonic", "gradient_difference_weight": 0.5, "dtype": "bfloat16", "ema_decay": 0.0}
    config = tiny.config(conditional=False, encoder_layers=0, decoder_layers=0, **settings)
    run = medvdm.fit(config, tmp_path / "run", progress=False)
    assert run.config.model.classes == 0 and "table" not in run.params["labels"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(run.params))
    last = run.metrics()[-1]
    assert last["loss"] > last["vlb_bpd"]  # the extra term is in the loss and not in the bound
    with pytest.raises(errors.RunError, match="no moving average"):
        load(tmp_path / "run", ema=True)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_stop_requests_leave_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with loop.stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# --- What is refused before the first step, and what is said -------------------------------------------------------


@pytest.mark.parametrize("name", ["[1]", "a*b", "run?", "back\\slash", "**"])
def test_a_folder_that_would_lose_the_weights_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InputError, match=r"^out: .* in its path, which the checkpoint library reads as a pat"):
        medvdm.fit(tiny.config(), tmp_path / name / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "~no-such-user/run", "a\nb"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.InputError, match="^out: "):
        medvdm.fit(tiny.config(), out, progress=False)
    with pytest.raises(errors.InputError, match="^run: "):
        load(out)
    assert list(tmp_path.iterdir()) == []


def test_unusual_folders_hold_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder, the current one, a link, a slash at the end, and names with spaces and beyond ASCII."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = tiny.config(steps=1)
    for out, place in (
        ("~/Lunge ü 肺", tmp_path / "Lunge ü 肺"),
        (".", tmp_path / "here"),
        (f"{tmp_path}/link/", tmp_path / "real"),
    ):
        medvdm.fit(config, out, progress=False)
        assert load(out).step == load(place).step == 1
    assert not (tmp_path / "here" / "~").exists()
    (tmp_path / "nothing").symlink_to(tmp_path / "not there")
    with pytest.raises(errors.InputError, match="a link to nothing"):
        medvdm.fit(config, tmp_path / "nothing", progress=False)
    with pytest.raises(errors.InputError, match="config.json is a file"):
        medvdm.fit(config, tmp_path / "real" / CONFIG / "run", progress=False)


def test_a_run_without_its_record_is_not_trained_over(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / CONFIG).unlink()
    with pytest.raises(errors.RunError, match=r"holds checkpoints of a run without its config\.json"):
        medvdm.fit(tiny.config(), tmp_path / "run", progress=False)


def test_two_trainings_into_one_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        with pytest.raises(errors.RunError, match="another process is training into this folder"):
            medvdm.fit(tiny.config(), tmp_path / "run", progress=False)
    assert list((tmp_path / "run").iterdir()) == []
    medvdm.fit(tiny.config(steps=1), tmp_path / "run", progress=False)
    with locked(tmp_path / "run"), pytest.raises(errors.RunError, match="another process"):
        medvdm.fit(tiny.config(steps=1), tmp_path / "run", resume=True, progress=False)


@pytest.mark.slow
def test_of_two_processes_that_start_together_one_trains(tmp_path: Path) -> None:
    options = ("train", "--out", tmp_path / "run", *tiny.options(steps=600, checkpoint_every=600))
    both = [tiny.start(*options) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (refusal,) = [err for process, err in zip(both, said, strict=True) if process.returncode]
    assert "another process is training" in refusal.splitlines()[-1] and "Traceback" not in refusal
    assert list(losses(tmp_path / "run")) == list(range(1, 601))


def test_a_checkpoint_that_does_not_read_back_is_an_error_and_not_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A disk that takes everything and gives back something else."""
    real = Checkpoints.wait

    def spoiling(checkpoints: Checkpoints) -> None:
        real(checkpoints)
        for path in (checkpoints.folder / "12" / "params").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[:-100] + bytes(100))

    monkeypatch.setattr(Checkpoints, "wait", spoiling)
    code = main(["train", "--out", str(tmp_path / "run"), *tiny.options()])
    out, err = capfd.readouterr()
    assert code == 1 and out == ""
    assert "medvdm: step 12 was saved, but does not read back: " in err.splitlines()[-1]


def test_training_images_are_read_once_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines and components of 'linear-start' are measured on the same images."""

    class Begun(Exception):
        pass

    def begin(*_: Any, **__: Any) -> None:
        raise Begun

    images = np.random.default_rng(0).uniform(size=(60, 8, 8)).astype(np.float32)
    data = medvdm.from_arrays(images)
    data.check_splits()  # looks at each image, once, whatever the model
    reads: list[int] = []
    inner = data.reader
    object.__setattr__(data, "reader", lambda i: (reads.append(len(i)), inner(i))[1])
    config = medvdm.preset("linear-start", steps=1, batch_size=4, latent=4, inner_width=8, decoder_width=8)
    monkeypatch.setattr(loop, "train", begin)
    with pytest.raises(Begun):
        medvdm.fit(config, tmp_path / "run", data=data, progress=False)
    assert reads.count(len(data.indices("train"))) == 1


def test_the_log_begins_with_what_is_trained_on_what(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny.config(steps=1)
    run = medvdm.fit(config, tmp_path / "run", progress=True)
    err = capfd.readouterr().err
    first = err.splitlines()[0]
    counts = run.record["data"]["counts"]
    patients = sum(of["patients"] for of in counts.values())
    weights = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert first == (
        f"phantom: 60 images ({counts['train']['images']} train, {counts['val']['images']} val, "
        f"{counts['test']['images']} test) of {patients} patients, 16 x 16 x 1, {len(run.class_names)} classes; "
        f"{weights:,} parameters; {run.record['environment']['devices']}"
    )
    note = "the 1 steps end inside the warm-up of 2: the learning rate comes to 0 of the 0.01 asked for"
    assert f"note: {note}" in err and "1/1 00:00 left, total " in err
    assert run.record["notes"] == [note] and note in (tmp_path / "run" / CARD).read_text()
    medvdm.fit(config, tmp_path / "quiet", progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"steps": 1}, "the 1 steps end inside the warm-up of 2: the learning rate comes to 0 of the 0.01 asked for"),
        ({"steps": 1, "label_dropout": 0.0}, "label_dropout is 0: the null"),
        ({"steps": 1, "label_dropout": 1.0}, "label_dropout is 1: no label is trained"),
    ],
)
def test_what_is_odd_about_a_run_is_noted(changes: dict[str, Any], note: str) -> None:
    data = medvdm.data.load(tiny.config().data)
    notes = fit._notes(fit.fill_in(tiny.config(**changes), data), data)
    assert [one.startswith(note) for one in notes].count(True) == 1
    assert not fit._notes(fit.fill_in(tiny.config(), data), data)


def test_a_split_without_held_out_images_is_said_in_log_and_card(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = arrays(20, patients=["61"] * 20)
    medvdm.fit(tiny.config(steps=1), tmp_path / "run", data=data, progress=True)
    err, card = capfd.readouterr().err, (tmp_path / "run" / CARD).read_text()
    for text in ("the split 'val' has no images", "the split 'test' has no images", "of one patient"):
        assert text in err and text in card
    with pytest.raises(errors.InputError, match="keep_best: arrays has no validation images"):
        medvdm.fit(tiny.config(steps=1, keep_best=True), tmp_path / "b", data=data, progress=False)


def test_what_was_never_trained_cannot_be_used(tmp_path: Path) -> None:
    labels = np.zeros((60, 2), np.uint8)
    labels[:40, 0] = 1  # no image carries the second class
    data = arrays(60, labels, class_names=["a", "b"])

    both = medvdm.fit(tiny.config(steps=1), tmp_path / "run", data=data, progress=False)
    no_null, no_labels = (
        replace(both, config=config_.change(both.config, label_dropout=dropout)) for dropout in (0.0, 1.0)
    )
    draw = {"num": 1, "steps": 2}
    for use in (
        lambda: medvdm.sample(no_null, **draw),
        lambda: medvdm.sample(no_null, **draw, label=("a",), guidance=1.0),
        lambda: medvdm.evaluate(no_null, data, null=True, draws=2),
    ):
        with pytest.raises(errors.RunError, match="null .* was not trained"):
            use()
    for use in (
        lambda: medvdm.sample(no_labels, **draw, label=("a",)),
        lambda: medvdm.evaluate(no_labels, data, draws=2),
    ):
        with pytest.raises(errors.RunError, match="labels were not trained"):
            use()
    with pytest.raises(errors.RunError, match="no training image carried 'b'"):
        medvdm.sample(both, **draw, label=("b",))
    assert any("no training image carries b" in note for note in both.record["notes"])
    # What was trained can be used.
    assert np.isfinite(medvdm.sample(no_null, **draw, label=("a",)).images).all()
    assert np.isfinite(medvdm.sample(no_labels, **draw).images).all()
    assert np.isfinite(medvdm.evaluate(no_labels, data, null=True, draws=2)["vlb_bpd"])


def test_looks_at_a_model_without_labels_use_its_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, labelled = medvdm.data.load(tiny.config().data), []

    def quick(*_: Any, labelled: bool, seen: list[bool] = labelled, **__: Any) -> dict[str, float]:
        seen.append(labelled)
        return {"vlb_bpd": 1.0}

    monkeypatch.setattr(held_out, "quick", quick)
    state = SimpleNamespace(params={}, ema=None)
    for dropout in (0.0, 0.5, 1.0):
        config = fit.fill_in(tiny.config(label_dropout=dropout), data)
        journal.Looks(tmp_path, config, data, data.indices("val"), 0).write(1, state)  # type: ignore[arg-type]
    assert labelled == [True, True, False]


# --- Keeping the best, and extending ---------------------------------------------------------------------------------


def scripted_looks(monkeypatch: pytest.MonkeyPatch, ema: list[float]) -> None:
    """Let the looks find these bounds with averaged weights, and ever better ones with raw weights."""
    values = iter([x for number, value in enumerate(ema) for x in (-float(number), value)])
    terms = dict.fromkeys(held_out.TERMS, 0.0)
    monkeypatch.setattr(held_out, "quick", lambda *_, **__: {**terms, "vlb_bpd": next(values)})


def test_the_best_weights_by_validation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the look with the least bound of the averaged weights, here the third of six."""
    scripted_looks(monkeypatch, [3.0, 4.0, 2.0, 2.5, 2.0, 5.0])
    config = tiny.config(evaluate_every=2, checkpoint_every=2, keep_checkpoints=9, keep_best=True)
    medvdm.fit(config, tmp_path / "run", progress=False)
    for ema in (False, True):
        best, then = load(tmp_path / "run", step="best", ema=ema), load(tmp_path / "run", step=6, ema=ema)
        assert best.step == 6 and best.provenance()["step"] == 6
        jax.tree.map(np.testing.assert_array_equal, best.params, then.params)
    assert load(tmp_path / "run").step == 12
    assert [p.name for p in (tmp_path / "run" / BEST).iterdir() if p.name.isdigit()] == ["6"]


def test_the_best_is_kept_over_a_resume_and_may_be_asked_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_looks(monkeypatch, [3.0, 2.0, 1.0, 1.5])
    config = tiny.config(steps=2, evaluate_every=1, checkpoint_every=1)
    out = tmp_path / "run"
    medvdm.fit(config, out, progress=False)  # looks 3 and 2: the last one is the best
    with pytest.raises(errors.MissingFileError, match="keep-best"):
        load(out, step="best")
    keeping = tiny.config(steps=2, evaluate_every=1, checkpoint_every=1, keep_best=True)
    medvdm.fit(keeping, out, resume=True, progress=False)
    assert load(out, step="best").step == 2
    longer = tiny.config(steps=4, evaluate_every=1, checkpoint_every=1, keep_best=True)
    medvdm.fit(longer, out, resume=True, progress=False)  # looks 1 and 1.5
    assert load(out, step="best").step == 3 and load(out).step == 4
    scripted_looks(monkeypatch, [0.5])
    shutil.rmtree(out / CHECKPOINTS / "4")  # killed before the last checkpoint was whole
    medvdm.fit(longer, out, resume=True, progress=False)
    assert load(out, step="best").step == 4


def test_a_finished_run_is_extended_along_the_longer_cosine(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    medvdm.fit(tiny.config(steps=18), out, resume=True, progress=False)
    assert list(losses(out)) == list(range(1, 19))
    assert {k: v for k, v in losses(out).items() if k <= 12} == losses(whole)
    # The same by hand: the state at step 12, and steps whose cosine has 18.
    config = fit.fill_in(tiny.config(steps=18), medvdm.data.load(tiny.config().data))
    data, layout = medvdm.data.load(config.data), Layout(config.training.batch_size)
    with Checkpoints(whole / CHECKPOINTS, settings=config_.fingerprint(load(whole).config), create=False) as saved:
        state = saved.restore(fit._like(config, layout))
    batches = training_batches(data, batch_size=8, seed=config.training.seed, start=12)
    step_fn = step_.jit_step(config.model, config.training)
    for number in range(13, 19):
        images, labels = next(batches)
        state, metrics = step_fn(state, layout.put(images), layout.put(labels))
        assert losses(out)[number] == pytest.approx([float(getattr(metrics, name)) for name in LOSSES], rel=1e-6)
    record = read_json(out / CONFIG)
    assert record["extended_from"] == [12] and record["config"]["training"]["steps"] == 18
    (note,) = [n for n in record["notes"] if n.startswith("extended from 12 to 18 steps")]
    rates = [float(step_.learning_rate(tiny.config(steps=n).training)(12)) for n in (12, 18)]
    assert f"{rates[0]:.2g}" in note and f"{rates[1]:.2g}" in note and rates[1] > 10 * rates[0]
    assert "extended from 12 to 18 steps" in (out / CARD).read_text()
    assert load(out).step == 18
    with pytest.raises(errors.RunError, match="^steps: 17; expected 18"):
        medvdm.fit(tiny.config(steps=17), out, resume=True, progress=False)


def test_an_extension_that_was_killed_before_its_first_checkpoint_goes_on(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    config = fit.fill_in(tiny.config(steps=14), medvdm.data.load(tiny.config().data))
    fit._extend(out, config, "note", None)
    assert load(out).step == 12
    medvdm.fit(tiny.config(steps=14), out, resume=True, progress=False)
    assert load(out).step == 14
    medvdm.fit(tiny.config(steps=15), out, resume=True, progress=False)  # and once more
    assert read_json(out / CONFIG)["extended_from"] == [12, 14] and load(out).step == 15


def stopped_at_5(config: RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a SIGTERM in step 5."""
    real = loop.train

    def signalled(*arguments: Any, hooks: loop.Hooks, **more: Any) -> Any:
        def stop(number: int) -> bool:
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return hooks.stop(number)

        return real(*arguments, hooks=replace(hooks, stop=stop), **more)

    monkeypatch.setattr(loop, "train", signalled)
    with pytest.raises(errors.StoppedError, match="SIGTERM: saved step 5"):
        medvdm.fit(config, out, progress=False)
    monkeypatch.undo()


def test_a_run_that_is_not_finished_is_not_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at_5(tiny.config(), tmp_path / "run", monkeypatch)
    with pytest.raises(errors.RunError, match=r"^steps: 24; expected 12, .* \(it is at step 5\)"):
        medvdm.fit(tiny.config(steps=24), tmp_path / "run", resume=True, progress=False)
    assert load(tmp_path / "run").config.training.steps == 12


def test_by_default_a_short_run_saves_its_last_step_only(whole: Path, tmp_path: Path) -> None:
    assert [p.name for p in (whole / CHECKPOINTS).iterdir() if p.name.isdigit()] == ["12"]
    medvdm.fit(tiny.config(checkpoint_every=5, keep_checkpoints=9), tmp_path / "exact", progress=False)
    names = {p.name for p in (tmp_path / "exact" / CHECKPOINTS).iterdir() if p.name.isdigit()}
    assert names == {"5", "10", "12"}


# A diffusion on pixels


def test_a_run_on_pixels_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    trained_pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same shifts, crops, labels left out, and averaged weights."""
    config = tiny.pixels(**tiny.CROPS)
    stopped_at_5(config, tmp_path / "run", monkeypatch)
    run = medvdm.fit(config, tmp_path / "run", resume=True, progress=False)
    assert losses(tmp_path / "run") == losses(trained_pixels)
    for ema in (False, True):
        one, other = (load(folder, ema=ema).params for folder in (tmp_path / "run", trained_pixels))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert run.config.training.crop == 12 and run.config.model.image_shape == (16, 16, 1)
    first, *_, last = losses(trained_pixels).values()
    assert all(np.isfinite(first)) and last[-1] < first[-1]


@pytest.mark.slow
def test_eight_fake_devices_equal_one_on_pixels(trained_pixels: Path, tmp_path: Path) -> None:
    settings = {**tiny.PIXELS, **tiny.CROPS}
    del settings["conditional"]
    words = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = tiny.medvdm_command(
        "train", "--preset", "pixel", "--conditional", "--out", tmp_path / "run", *words, devices=8
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        list(losses(tmp_path / "run").values()), list(losses(trained_pixels).values()), rtol=1e-3, atol=1e-4
    )


def test_colour_images_that_are_not_square_train_on_pixels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 9, 14, 3), np.uint8)
    data = medvdm.from_arrays(images)
    config = tiny.pixels(steps=3, batch_size=4, crop=8, scales=2, evaluate_every=3)
    run = medvdm.fit(config, tmp_path / "run", data=data, progress=False)
    assert run.config.model.image_shape == (9, 14, 3)
    drawn = medvdm.sample(run, 2, steps=2)
    assert drawn.images.shape == (2, 9, 14, 3)
    np.testing.assert_allclose(255 * drawn.images, np.rint(255 * drawn.images), atol=1e-4)
    found = medvdm.bound(run, images[:3], draws=2)
    assert found.nats.shape == (3,) and np.isfinite(found.nats).all()
    assert read_lines(tmp_path / "run" / EVALUATIONS)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("shape", "changes", "says"),
    [
        ((12, 20), {"crop": 13}, "crop: 13; expected at most 12, the images' side"),
        ((3, 20), {"scales": 2}, r"image_shape: \(3, 20, 1\); expected sides of at least 4 for a U-Net of 2 scales"),
        ((12, 20), {"scales": 4}, r"image_shape: \(12, 20, 1\); expected sides of at least 16 "),
    ],
)
def test_images_that_are_too_small_for_the_crops_or_the_network_are_refused(
    shape: tuple[int, int], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    data = medvdm.from_arrays(np.random.default_rng(0).integers(0, 256, (40, *shape), np.uint8))
    with pytest.raises(errors.InputError, match=f"^{says}") as no:
        medvdm.fit(tiny.pixels(**changes), tmp_path / "run", data=data, progress=False)
    assert "\n" not in str(no.value) and not list(tmp_path.iterdir())
