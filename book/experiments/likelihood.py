"""The bound, importance-weighted bounds and the flow's likelihood of the same images: book/results/likelihood.json.

    python book/experiments/likelihood.py RUN [RUN ...] [--data-dir DIR] [--split SPLIT] [--num N] [--steps T]

Averaged weights where a run has them. For each run `likelihoods` has one row a method, with means over the same images
in bits per dimension:

* `bound`: in continuous time, 64 draws of time and noise an image;
* `chain 1`, `chain 4`, `chain 16`: importance-weighted bounds with K paths of T steps at a time, of 16 an image;
* `flow`: by the model's own dequantisation, and `flow uniform` for models of gray values; two draws of z_0.

`stderr` is that of the mean by the draws alone; the images are the same for all. `evaluations` of the network are those
that an image took in all, but for the products with probes or columns.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import medvdm
import numpy as np
from medvdm.runs.run import load, load_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

BOUND_DRAWS, PATHS, FLOW_DRAWS = 64, 16, 2


def add_row(
    rows: list[dict[str, Any]],
    run: str,
    method: str,
    bits: np.ndarray,
    stderr: np.ndarray,
    evaluations: float,
    began: float,
) -> None:
    """One method's mean over the images, with its error by the draws; said as well."""
    known = not np.isnan(stderr).any()  # where all paths make one group, nothing tells of the error
    rows.append(
        {
            "run": run,
            "method": method,
            "images": len(bits),
            "bpd": float(bits.mean()),
            "stderr": float(np.linalg.norm(stderr) / len(stderr)) if known else None,
            "evaluations": evaluations,
            "seconds": time.perf_counter() - began,
        }
    )
    print(time.strftime("%H:%M:%S"), rows[-1], file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="the images of runs on real ones")
    parser.add_argument("--split", default="val")
    parser.add_argument("--num", type=int, default=16, help="images of each run")
    parser.add_argument("--steps", type=int, default=250, help="T of the paths")
    parser.add_argument("--probes", type=int, default=2, help="of the flow's divergence, where it is not exact")
    options = parser.parse_args()
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for path in options.runs:
        run = load(path)
        run = load(path, ema=True) if run.config.training.ema_decay else run
        data = load_data(run, data_dir=None if run.config.data.data == "phantom" else options.data_dir)
        chosen = data.indices(options.split)[: options.num]
        x = data.levels(chosen) if run.eight_bit else data.read(chosen)

        began = time.perf_counter()
        bound = medvdm.bound(run, x, draws=BOUND_DRAWS)
        add = partial(add_row, rows, path.name)
        add("bound", bound.bits_per_dim, bound.bits_per_dim_stderr, BOUND_DRAWS, began)
        for dequantisation in ("encoder", "uniform") if run.eight_bit else ("encoder",):
            began = time.perf_counter()
            flow = medvdm.flow_likelihood(
                run, x, draws=FLOW_DRAWS, probes=options.probes, dequantisation=dequantisation
            )
            name = "flow" if dequantisation == "encoder" else "flow uniform"
            add(name, flow.bits_per_dim, flow.bits_per_dim_stderr, FLOW_DRAWS * float(flow.evaluations.mean()), began)
        began = time.perf_counter()
        chain = medvdm.importance_bound(run, x, draws=PATHS, steps=options.steps)
        for k in (1, 4, 16):
            add(f"chain {k}", chain.bits_per_dim(k), chain.bits_per_dim_stderr(k), PATHS * options.steps, began)
    record.experiment(
        "likelihood", config=run.config, seconds=time.perf_counter() - start, results={"likelihoods": rows}
    )


if __name__ == "__main__":
    main()
