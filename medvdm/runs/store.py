"""A run on disk: where its files are, how they are written, and how they are read back.

=====================  ===================================================================================
``config.json``        version, settings, data and environment: the record that everything else is made from
``baselines.npz``      the baselines, fitted on the training images
``gaussian.npz``       the Gaussian of gray values fitted on them, for a model of gray values with validation images
``checkpoints/``       Orbax checkpoints, the newest ones
``best/``              the weights with the least validation bound (``keep_best``)
``metrics.jsonl``      one line per training step
``evaluations.jsonl``  one line per held-out evaluation during training
``results/``           one JSON per ``evaluate`` call
``audits/``            one JSON per ``audit`` call
``held_out/``          what ``score`` has measured on validation images, one JSON per setting
``MODEL_CARD.md``      the model card, made from the files above
``.lock``              there while a process trains into the folder
=====================  ===================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medvdm.errors import InputError, MissingFileError, RunError
from medvdm.runs import config
from medvdm.runs.config import RunConfig


def check_place(path: Path) -> None:
    """Refuse a path whose folder is not there, or that is a folder itself."""
    if not path.parent.is_dir():
        raise MissingFileError(f"{path}: the folder {path.parent} is not there; expected an existing one")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` when all of it is on disk, and never before.

    If anything fails inside, also Ctrl-C or a full disk, nothing is left behind and an older file stays as it was.

    Raises:
        MissingFileError: the folder of ``path`` is not there.
        InputError: ``path`` is a folder.
    """
    path = Path(path)
    check_place(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


CONFIG, BASELINES, GAUSSIAN = "config.json", "baselines.npz", "gaussian.npz"
CHECKPOINTS, BEST = "checkpoints", "best"
METRICS, EVALUATIONS, RESULTS, CARD = "metrics.jsonl", "evaluations.jsonl", "results", "MODEL_CARD.md"
AUDITS, HELD_OUT, PRIVACY, LOCK = "audits", "held_out", "privacy", ".lock"


def check_writable(folder: Path) -> None:
    """Raise RunError unless files can be written into a folder of a run, which need not be there yet."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; expected a folder, or nothing")
    place = folder if folder.exists() else folder.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{place}: cannot be written to; expected a folder that can, or save=False from Python")


def safe_name(text: str) -> str:
    """A text as a part of a file's name: nothing that leads elsewhere, hides the file or makes its name too long."""
    name = urllib.parse.quote(text, safe="")
    if len(name) > 80:
        name = f"{name[:60]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    return "%2E" + name[1:] if name.startswith(".") else name


def write_text(path: Path, text: str) -> None:
    """Write a file all at once: a reader, or a kill, never sees half of it."""
    with atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, record: Any) -> None:
    """:func:`write_text` of a JSON value; NaN is refused rather than written."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises MissingFileError or RunError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: not found; expected the folder of a run") from None
    except (OSError, ValueError) as problem:
        raise RunError(f"{path}: {problem}; expected JSON written by medvdm") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (path / CONFIG).exists()


def read_record(path: Path) -> tuple[dict[str, Any], RunConfig]:
    """The record of a run and the settings in it; raises MissingFileError or RunError."""
    record = read_json(path / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise RunError(f"{path / CONFIG}: has no 'config'; expected the record of a run")
    return record, config.from_json(record["config"], where=str(path / CONFIG))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one training at a time, also against processes of other machines that share the disk.

    The system gives the lock back when its process ends, however that happens, so a killed run blocks nobody. On a
    disk without locks (some network file systems) a line on stderr says that nothing guards the folder.

    Raises:
        RunError: another process is training into it.
    """
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(file)
            if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunError(
                    f"out: {folder}: another process is training into this folder; expected one at a time"
                ) from None
            path.unlink(missing_ok=True)
            print(
                f"medvdm: {folder}: this disk has no locks ({problem.strerror}); start no second training into it",
                file=sys.stderr,
            )
            yield
            return
        if _same_file(path, file):
            break
        os.close(file)  # whoever held it has removed it meanwhile: what is locked is no longer in the folder
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
