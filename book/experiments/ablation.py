"""What makes the bound better, one change at a time: same images, same number of steps, three seeds.

    python book/experiments/ablation.py --data-dir DIR

NIH images at 64 x 64. Two starting points, small networks of the paper's kind and the linear-start model, and changes
of one setting each. Everything is judged on validation patients; the test patients are looked at once, for a few rows
named in advance. Without --data-dir the images are phantoms.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402
from medvdm import baselines, config, data, evaluation, vdm  # noqa: E402
from medvdm.config import RunConfig  # noqa: E402

STEPS, SEEDS = 200, (0, 1, 2)
AUGMENT = {"augment_shift": 0.03, "augment_size": 0.05}
SIZES = (
    "latent embedding_dim encoder_width decoder_width inner_width encoder_layers decoder_layers score_layers".split()
)
SMALL = {name: config.flat(config.preset("demo"))[name] for name in SIZES}  # the paper's kind of networks, small
RESIDUAL: dict[str, dict[str, Any]] = {
    "residual networks": {},
    "latent 128": {"latent": 128},
    "ends learned by the bound": {"schedule": "learned-linear"},
    "learning rate / 4": {"learning_rate": 2e-4},
    "weight decay 0.1": {"weight_decay": 0.1},
    "moving average 0.98": {"ema_decay": 0.98},
    "augmentation": AUGMENT,
    "gradient difference, weight 1": {"gradient_difference_weight": 1.0},
}
PLAIN = {"augment_shift": 0.0, "augment_size": 0.0, "basis_copies": 0}
LINEAR: dict[str, dict[str, Any]] = {
    "linear start, no augmentation": PLAIN,
    "linear start": {},
    "linear start, not trained": {"steps": 1, "learning_rate": 0.0},
}
FINAL = ("residual networks", "augmentation", "linear start")


def settings(name: str, seed: int, folder: str | None) -> RunConfig:
    """The config of a row of the table."""
    where = {"data": "nih", "data_dir": folder} if folder else {"num_images": 800}
    common = {
        "image_size": 64,
        "batch_size": 16,
        "steps": STEPS,
        "seed": seed,
        "warmup_steps": 50,
        **where,
    }
    if name in LINEAR:
        return config.preset("linear-start", **{**common, "latent": 96, **LINEAR[name]})
    return config.preset("paper", **{**common, **SMALL, **RESIDUAL[name]})


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    return parser


def main() -> None:
    folder, start = parser().parse_args().data_dir, time.perf_counter()
    images = data.load(settings(FINAL[0], 0, folder).data)
    fitted = baselines.fit(images.read(images.indices("train")), images.read(images.indices("val")))
    rows, final = [], []
    for name in [*RESIDUAL, *LINEAR]:
        found = []
        for seed in SEEDS:
            asked = settings(name, seed, folder)
            begin = time.perf_counter()
            asked, state, _ = record.train(asked, images)
            seconds = time.perf_counter() - begin
            graph, params = (
                vdm.graph_of(asked.model),
                state.params if state.ema is None else state.ema,
            )
            for split in ("val", "test") if name in FINAL else ("val",):
                result = evaluation.evaluate_weights(graph, params, images, split, baselines=fitted, draws=4)
                kept = {k: v for k, v in result.items() if isinstance(v, float)}
                (found if split == "val" else final).append({"name": name, **kept, "seed": seed, "train_s": seconds})
        excess = np.array([f["excess_bpd"] for f in found])
        rows.append(
            {
                "name": name,
                "excess": float(excess.mean()),
                "excess_sd": float(excess.std(ddof=1)),
                "over_lingauss": float(np.mean([f["over_lingauss_bpd"] for f in found])),
                "over_lingauss_se": float(np.mean([f["over_lingauss_bpd_stderr"] for f in found])),
                "rate": float(np.mean([f["rate_bits_per_image"] for f in found])),
                "psnr": float(np.mean([f["psnr_db"] for f in found])),
                "ssim": float(np.mean([f["ssim"] for f in found])),
                "seconds": float(np.mean([f["train_s"] for f in found])),
            }
        )
        print(
            f"{time.perf_counter() - start:6.0f} s  {name}: {excess.round(5)}",
            file=sys.stderr,
            flush=True,
        )
    kept = (
        "name",
        "seed",
        "excess_bpd",
        "over_lingauss_bpd",
        "over_lingauss_bpd_stderr",
        "rate_bits_per_image",
    )
    record.experiment(
        "ablation",
        config=settings("linear start", 0, None),
        seconds=time.perf_counter() - start,
        results={
            "data": images.name,
            "steps": STEPS,
            "validation": rows,
            "test": [{k: f[k] for k in kept} for f in final],
        },
    )


if __name__ == "__main__":
    main()
