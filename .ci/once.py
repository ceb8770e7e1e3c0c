"""Run a command unless it has passed on exactly this tree: ``once.py NAME [--needs FILE] -- COMMAND ...``.

The tree is the content of every file that git tracks or would track, the installed versions, the Python, the machine,
and the settings that tests read from the environment. What passed is remembered in ``.pytest_cache/passed``. A tree
that was edited while the command ran is not remembered. Without git nothing is skipped; ``FRESH=1`` runs everything.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / ".pytest_cache" / "passed"
SETTINGS = ("JAX_", "XLA_", "MEDVDM_", "PYTHON", "PYTEST_")


def tree() -> str | None:
    """A hash of all that the outcome depends on, or None where git cannot list the files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode or not listed.stdout:
        return None
    content = hashlib.sha256()
    for name in sorted(set(listed.stdout.split(b"\0")) - {b""}):
        path = ROOT / os.fsdecode(name)
        content.update(name + b"\0" + (hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"gone"))
    versions = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(SETTINGS))
    content.update("\0".join([*versions, *settings, sys.version, platform.platform()]).encode())
    return content.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="what is proven, for the message")
    parser.add_argument("--needs", type=Path, help="a file that the command makes; without it the command runs")
    cut = sys.argv.index("--")
    told, command = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    record = PASSED / told.name
    before = tree()
    needed = told.needs is None or told.needs.exists()
    if before and needed and not os.environ.get("FRESH") and record.is_file():
        key, when = record.read_text("utf8").split(maxsplit=1)
        if key == before:
            print(f"Unchanged since {told.name} passed, {when.strip()}; 'make test FRESH=1' runs it again", flush=True)
            return 0
    record.unlink(missing_ok=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code == 0 and before and tree() == before:
        PASSED.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{before} {datetime.datetime.now():%Y-%m-%d %H:%M}\n", "utf8")
    return code if code >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
