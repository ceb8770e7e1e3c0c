"""A run's folder belongs to one training at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medvdm.errors import RunError
from medvdm.runs.store import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from medvdm.runs.store import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_once_and_then_free_again(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(RunError, match="another process is training into this folder") as caught:
            with locked(tmp_path):
                raise AssertionError("held twice")
        assert str(tmp_path) in str(caught.value)
        with pytest.raises(RunError, match="another process"):  # the refusal has not freed it
            with locked(tmp_path):
                pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_a_failure_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_nobody_holds_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with locked(tmp_path):
        pass


def test_a_lock_that_was_removed_while_waiting_for_it_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ends between our opening of the file and our lock: what we hold is then no file of the folder."""
    real, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK).exists()
        monkeypatch.undo()
        with pytest.raises(RunError, match="another process"), locked(tmp_path):
            pass


def test_a_disk_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        pass
    assert "has no locks" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_process_gives_the_folder_back(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
