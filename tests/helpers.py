"""What tests of the command line and of runs on disk share: one small trained run, and what a refusal looks like."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

from medvdm.cli.main import main

STEPS = 12
KEEP = {"checkpoint_every": STEPS, "evaluate_every": STEPS, "keep_checkpoints": 1}


class Trained(NamedTuple):
    """A finished run and the process that made it."""

    path: Path
    process: subprocess.CompletedProcess[str]


def train(out: Path) -> Trained:
    """``medvdm train`` in a process of its own, without --data."""
    return Trained(out, tiny.medvdm_command("train", "--preset", "demo", "--out", out, *tiny.options(**KEEP)))


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder with a hash of its content: equal before and after means nothing was written."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(code: int, out: str, err: str, names: Iterable[str]) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that names what is wrong."""
    assert code == 2, (code, err)
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    assert err.startswith("medvdm: "), err
    assert "Traceback" not in err
    assert out == ""
    for name in names:
        assert name in err, f"{name!r} is not in {err!r}"


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path, names: Iterable[str] = ()) -> str:
    """Run a command in this process, check that it is refused, and return its line."""
    capfd.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    assert_refused(code, out, err, names)
    return err


def said(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, str]:
    """Run a command in this process, check that it succeeds, and return its stdout and stderr."""
    capfd.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out, err
