"""Turn the folder of a finished run into a small record that chapters read: book/results/NAME.json.

    python book/_tools/record.py RUN NAME [--commit HASH]

A record holds the one command that repeats the run, its whole configuration, where and with what it ran, its losses
(means over bins of steps, at most 200 of them) and all its evaluations. It holds no image and no path of a machine.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from medvdm import config as config_
from medvdm import runs
from medvdm.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"
TERMS = ("reconstruction_bpd", "diffusion_bpd", "latent_bpd", "vlb_bpd")
BINS = 200


def command(config: RunConfig) -> str:
    """The line that repeats a run: its preset and each setting that differs from it."""
    preset = config_.flat(config_.preset(config.preset))
    words = ["medvdm", "train", "--preset", config.preset]
    for name, value in config_.flat(config).items():
        if name in ("preset", "data_dir", "image_shape", "classes", *config_.FREE_ON_RESUME) or value == preset[name]:
            continue
        option = name.replace("_", "-")
        words += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    words += ["--data-dir", "DIR"] if config.data.data_dir else []
    return shlex.join([*words, "--out", "RUN"])


def make(run: Path, name: str, commit: str) -> dict[str, Any]:
    """The record of the run in a folder."""
    start, config = runs.read_record(run)
    steps = runs.read_lines(run / runs.METRICS)
    evaluations = [runs.read_json(path) for path in sorted((run / runs.RESULTS).glob("*.json"))]
    return {
        "name": name,
        "command": command(config),
        "version": start["version"],
        "commit": commit,
        "environment": start["environment"],
        "seed": config.training.seed,
        "seconds": round(sum(1 / line["steps_per_second"] for line in steps)),
        "config": config_.to_json(config_.change(config, data_dir=None)),
        "data": start["data"],
        "metrics": _binned(steps),
        "validation": runs.read_lines(run / runs.EVALUATIONS),
        "evaluations": sorted(({**e, "run": name} for e in evaluations), key=lambda e: (e["split"], e["step"])),
    }


def _binned(steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Means over equal bins, each at its last step; the first step alone, so that the start is seen."""
    size = math.ceil(len(steps) / BINS)
    parts = [steps[:1]] + [steps[i : i + size] for i in range(1, len(steps), size)]
    return [
        {"step": part[-1]["step"]} | {t: float(f"{sum(s[t] for s in part) / len(part):.6g}") for t in TERMS}
        for part in parts
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--commit", help="of the code that made the run; the one checked out by default")
    options = parser.parse_args(arguments)
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    path = RESULTS / f"{options.name}.json"
    runs.write_text(path, json.dumps(make(options.run, options.name, commit), indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
