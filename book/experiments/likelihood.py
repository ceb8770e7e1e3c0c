"""The bound, importance-weighted bounds and the flow's likelihood of the same images: book/results/likelihood.json.

    python book/experiments/likelihood.py RUN [RUN ...] [--data-dir DIR] [--split SPLIT] [--num N] [--steps T]

Averaged weights where a run has them. The images are of different patients, the first one of each, spread evenly over
the split. For each run `likelihoods` has one row per method, with means over these images in bits per dimension:

* `bound`: in continuous time, 64 draws of time and noise per image;
* `flow`: by the model's own dequantisation, and `flow uniform` for models of gray values; two draws of z_0;
* `chain 1`, `chain 4`, `chain 16`: importance-weighted bounds with K paths of T steps at a time, of 16 per image.

`stderr` is that of the mean by the draws alone; the images are the same for all. `above_bound` is the mean difference
from the bound, image by image, and `above_bound_stderr` its standard error over the images, which holds the draws too.
`divergence` says how that of the flow is taken, and `dimensions` how many numbers z has. `evaluations` of the network
are those that an image took in all, but for the products with probes or columns.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import medvdm
import numpy as np
from medvdm.runs.run import load, load_data
from medvdm.runs.store import read_record
from medvdm.theory.flow import FlowConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

BOUND_DRAWS, PATHS, FLOW_DRAWS = 64, 16, 2


def rows_of(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run's rows: a mean over the same images for each method, with its errors."""
    _, config = read_record(path)
    run = load(path, ema=bool(config.training.ema_decay))
    data = load_data(run, data_dir=options.data_dir if run.config.data.data == "nih" else None)
    chosen = record.one_per_patient(data, options.split, options.num)
    x = data.levels(chosen) if run.eight_bit else data.read(chosen)
    latent = run.config.model.image_shape if run.eight_bit else (run.config.model.latent,)
    divergence = FlowConfig().kind(math.prod(latent))
    head = {"run": path.name, "step": run.step, "data": run.config.data.data, "split": options.split}
    head |= {"images": len(x), "dimensions": math.prod(latent)}
    rows: list[dict[str, Any]] = []
    found: dict[str, np.ndarray] = {}

    def add(method: str, bits: np.ndarray, stderr: np.ndarray, evaluations: float, **more: Any) -> None:
        found[method] = bits
        above = bits - found["bound"]
        known = not np.isnan(stderr).any()  # where all paths make one group, they do not tell their error
        rows.append(
            {**head, "method": method, "bpd": float(bits.mean())}
            | {"stderr": float(np.linalg.norm(stderr) / len(stderr)) if known else None}
            | {"above_bound": float(above.mean())}
            | {"above_bound_stderr": float(above.std(ddof=1) / math.sqrt(len(above)))}
            | {"evaluations": evaluations, "seconds": time.perf_counter() - began, **more}
        )
        record.say(rows[-1])

    began = time.perf_counter()
    bound = medvdm.bound(run, x, draws=BOUND_DRAWS)
    add("bound", bound.bits_per_dim, bound.bits_per_dim_stderr, BOUND_DRAWS)
    for dequantisation in ("encoder", "uniform") if run.eight_bit else ("encoder",):
        began = time.perf_counter()
        flow = medvdm.flow_likelihood(run, x, draws=FLOW_DRAWS, probes=options.probes, dequantisation=dequantisation)
        name = "flow" if dequantisation == "encoder" else "flow uniform"
        evaluations = FLOW_DRAWS * float(flow.evaluations.mean())
        add(name, flow.bits_per_dim, flow.bits_per_dim_stderr, evaluations, divergence=divergence)
    began = time.perf_counter()
    chain = medvdm.importance_bound(run, x, draws=PATHS, steps=options.steps)
    for k in (1, 4, 16):
        add(f"chain {k}", chain.bits_per_dim(k), chain.bits_per_dim_stderr(k), PATHS * options.steps)
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="at least one; the record has the settings of the last one")
    parser.add_argument(
        "--data-dir", help="the folder of the NIH images; other images are read from where a run was trained on them"
    )
    parser.add_argument("--split", default="val")
    parser.add_argument("--num", type=int, default=16, help="images of each run, of as many patients")
    parser.add_argument("--steps", type=int, default=250, help="T of the paths")
    parser.add_argument("--probes", type=int, default=2, help="of the flow's divergence, where it is not exact")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    rows = [row for path in options.runs for row in rows_of(path, options)]
    _, config = read_record(options.runs[-1])
    record.experiment("likelihood", config=config, seconds=time.perf_counter() - start, results={"likelihoods": rows})


if __name__ == "__main__":
    main()
