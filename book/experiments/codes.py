"""Images to codes and back, and what lies between two: book/results/codes.json and codes-between.png.

    python book/experiments/codes.py RUN [RUN ...] --data-dir DIR [--num N]

Averaged weights where a run has them. For each run, on validation images:

* `round_trips`: up the flow and down again, for each solver and number of steps: root mean square error in gray levels
  of the picture that comes back (of a latent model: of the decoded picture), and the share of pixels that are exact;
* `codes`: mean square of the code's numbers, stage by stage, and the correlation of neighbours; of a normal z_1 these
  are 1 and 0;
* `between`: power at each scale of what lies between two images over that of the images themselves, for the great
  circle between their codes and for the mean of the pictures.

Of a run on phantoms a sheet is drawn as well. No image of a patient is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from medvdm.evaluation.measures import bands, power_spectrum
from medvdm.models import codes
from medvdm.models.generate import generate
from medvdm.runs.run import Run, load, load_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

STEPS = (10, 25, 50, 100, 250)
MANY = 250  #: steps of the codes that are looked at
Rows = list[dict[str, Any]]


def down(run: Run, code: list[np.ndarray], steps: int, solver: str) -> np.ndarray:
    """The pictures of a code."""
    drawn = generate(
        run.graph, run.params, num=len(code[0]), steps=steps, solver=solver, grid="gamma", z=code, batch_size=16
    )
    return drawn.images


def up(run: Run, x: np.ndarray, steps: int, solver: str) -> list[np.ndarray]:
    """The codes of images, sixteen at a time."""
    parts = [
        codes.encode(run.graph, run.params, x[i : i + 16], steps=steps, solver=solver) for i in range(0, len(x), 16)
    ]
    return [np.concatenate(stage) for stage in zip(*parts, strict=True)]


def of_codes(name: str, code: list[np.ndarray]) -> Rows:
    """What a code's numbers are like, at each stage."""
    rows = []
    for stage, z in enumerate(code):
        near = np.mean(z[:, 1:] * z[:, :-1]) / np.mean(z**2) if z.ndim == 4 else float("nan")
        rows.append({"run": name, "stage": stage, "mean_square": float(np.mean(z**2)), "neighbours": float(near)})
    return rows


def between(name: str, run: Run, x: np.ndarray, code: list[np.ndarray]) -> tuple[Rows, np.ndarray]:
    """Pictures a quarter, half and three quarters of the way from each image to the next, and their power."""
    turned = [np.roll(z, 1, axis=0) for z in code]
    shown = x if x.dtype != np.uint8 else x / np.float32(255)
    own = power_spectrum(shown).mean(axis=0)
    rows, sheets = [], []
    for share in (0.25, 0.5, 0.75):
        pictures = down(run, codes.between(code, turned, share), MANY, "heun")
        sheets.append(pictures)
        mean = (1 - share) * shown + share * np.roll(shown, 1, axis=0)
        for way, images in (("codes", pictures), ("pictures", mean)):
            power = power_spectrum(images).mean(axis=0)
            of_band = {
                f"power_{band}": float(power[s].mean() / own[s].mean())
                for band, s in zip(("low", "middle", "high"), bands(len(own)), strict=True)
            }
            rows.append({"run": name, "share": share, "way": way} | of_band)
    return rows, np.stack([shown, *sheets, np.roll(shown, 1, axis=0)])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="the folder of the images of runs on real ones")
    parser.add_argument("--num", type=int, default=16, help="images of each run")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    tables: dict[str, Rows] = {"round_trips": [], "codes": [], "between": []}
    for path in options.runs:
        run = load(path)
        run = load(path, ema=True) if run.config.training.ema_decay else run
        phantom = run.config.data.data == "phantom"
        data = load_data(run, data_dir=None if phantom else options.data_dir)
        rows = data.indices("val")[: options.num]
        x, model = data.levels(rows) if run.eight_bit else data.read(rows), run.model
        gray = x / np.float32(255) if run.eight_bit else np.asarray(model.picture(model.decode(model.encode(x))))
        for solver in codes.SOLVERS:
            for steps in STEPS:
                back = down(run, up(run, x, steps, solver), steps, solver)
                off = np.abs(back - gray)
                found = {"error": float(np.sqrt(np.mean(off**2))), "exact": float(np.mean(off < 0.5 / 255))}
                tables["round_trips"].append({"run": path.name, "solver": solver, "steps": steps} | found)
                record.say(tables["round_trips"][-1])
        code = up(run, x, MANY, "heun")
        tables["codes"] += of_codes(path.name, code)
        rows_between, sheet = between(path.name, run, x, code)
        tables["between"] += rows_between
        record.say(rows_between)
        if phantom:
            save_sheet(sheet[:, :4])
    record.experiment("codes", config=run.config, seconds=time.perf_counter() - start, results=tables)


def save_sheet(pictures: np.ndarray) -> None:
    """Four rows of five pictures: an image, three on the way, and the next image."""
    from medvdm import plotting

    columns, rows = pictures.shape[:2]
    figure = plotting.image_grid(
        np.clip(np.swapaxes(pictures, 0, 1).reshape(rows * columns, *pictures.shape[2:]), 0, 1),
        synthetic=True,
        columns=columns,
        titles=["phantom", "¼", "½", "¾", "phantom"] * rows,
    )
    figure.savefig(record.RESULTS / "codes-between.png")


if __name__ == "__main__":
    main()
