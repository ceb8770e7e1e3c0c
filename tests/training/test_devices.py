"""Devices and processes: what cannot be had is said in one line."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import jax
import pytest
import tiny

from medvdm.errors import InputError
from medvdm.training import devices


@pytest.mark.parametrize(
    "problem",
    [
        AssertionError(),
        RuntimeError("Unable to initialize backend 'tpu': INTERNAL: no libtpu.so (set JAX_PLATFORMS='')"),
    ],
)
def test_a_platform_that_is_not_here_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def none() -> None:
        raise problem

    monkeypatch.setattr(jax, "devices", none)
    asked = jax.config.jax_platforms or "the default"
    for use in (devices.available, devices.describe, lambda: devices.Layout(1)):
        with pytest.raises(InputError, match=f"^JAX_PLATFORMS: '{asked}' cannot be used here.*; expected a platform"):
            use()


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "gpu", "tpu", "nonsense"])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_the_command_line_refuses_a_platform_that_is_not_here(platform, command, trained, tmp_path) -> None:
    arguments = {
        "train": ("train", "--out", tmp_path / "new", *tiny.options()),
        "sample": ("sample", trained.path, "--num", "1", "--out", tmp_path / "s.png"),
    }[command]
    process = tiny.start(*arguments, JAX_PLATFORMS=platform)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip(f"this machine has {platform}")
    assert process.returncode == 2 and err.splitlines()[-1].startswith(f"medvdm: JAX_PLATFORMS: '{platform}'"), err
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("JAX_ENABLE_X64", "maybe"), ("JAX_NUM_CPU_DEVICES", "two")])
def test_a_setting_that_jax_does_not_take_is_refused_in_one_line(name: str, value: str, tmp_path) -> None:
    process = tiny.start("train", "--out", tmp_path / "new", **{name: value})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("medvdm: environment: ") and value in err


@pytest.mark.slow
def test_a_first_process_that_waits_in_vain_ends_with_one_line() -> None:
    """JAX itself would abort with a stack trace from C++."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"from medvdm.training.devices import start_processes; start_processes({address!r}, 2, 0, timeout=3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "not all processes joined within 3 s" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("nohost", 2, 0), "coordinator: 'nohost'; expected HOST:PORT"),
        ((":80", 2, 0), "coordinator: ':80'; expected HOST:PORT"),
        (("host:0", 2, 0), "expected HOST:PORT"),
        (("host:x", 2, 0), "expected HOST:PORT"),
        (("host:70000", 2, 0), "expected HOST:PORT"),
        (("host:80", 2, 2), "process_id: 2; expected 0 to 1"),
        (("host:80", 2, -1), "process_id: -1; expected 0 to 1"),
        ((None, 2, 0), "coordinator: missing, for process 0 of 2"),
        ((None, 1, 1), "coordinator: missing, for process 1 of 1"),
    ],
)
def test_processes_that_cannot_be_are_refused(arguments: tuple, found: str) -> None:
    with pytest.raises(InputError, match=found):
        devices.start_processes(*arguments)


def test_a_coordinator_that_does_not_answer_is_given_up_in_time() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InputError, match=f"coordinator: {address} did not answer within 1 s .*refused"):
            devices.start_processes(address, 2, 1, timeout=1)
        assert time.monotonic() - began < 10


def test_one_process_joins_nothing() -> None:
    devices.start_processes(None, 1, 0)
    assert jax.process_count() == 1 and devices.first_said(True) is True and devices.first_said(False) is False
