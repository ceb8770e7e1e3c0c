"""The training loop: exact resume, kills, several devices and processes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

import medvdm
from medvdm import errors
from medvdm.runs import fit
from medvdm.runs.run import load
from medvdm.runs.store import CHECKPOINTS, CONFIG, EVALUATIONS, METRICS, read_json, read_lines
from medvdm.training import step as step_
from medvdm.training.step import make_step

LOSSES = ("reconstruction_bpd", "diffusion_bpd", "latent_bpd", "vlb_bpd", "loss")


def losses(run: Path) -> dict[int, tuple[float, ...]]:
    """The losses of each step; fails if a step stands there twice or a line is broken."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "metrics.jsonl must hold each step once"
    return {line["step"]: tuple(line[name] for name in LOSSES) for line in lines}


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
    images = np.random.default_rng(0).uniform(size=(40, 8, 8)).astype(np.float32)
    config = tiny.config(steps=2, batch_size=4)
    medvdm.fit(config, tmp_path / "run", data=medvdm.from_arrays(images), progress=False)
    with pytest.raises(errors.RunError, match="not the images"):
        medvdm.fit(config, tmp_path / "run", data=medvdm.from_arrays(images / 2), resume=True, progress=False)


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
    run = medvdm.fit(
        tiny.config(
            conditional=False, ema_decay=0.0, schedule="monotonic", gradient_difference_weight=0.5, dtype="bfloat16"
        ),
        tmp_path / "run",
        progress=False,
    )
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
