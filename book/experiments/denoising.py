r"""Noise removed by a model and by classical filters, and what either invents: book/results/denoising.json.

    python book/experiments/denoising.py RUN [RUN ...] --data-dir DIR [--phantom-run RUN] [--num N] [--keep FILE]

RUN are diffusions on the pixels of NIH images. Noise is added to images without clipping: normal noise of deviation
0.05, 0.1 and 0.2 of the gray scale, or *low dose*, Poisson noise whose deviation at mid-gray is 0.1, with electronic
noise of 0.01. The model and the filters get the same noisy image and the same noise level; of low dose, the same
Anscombe transform. No method is told that gray values are whole numbers. Strengths of filters are chosen by PSNR on
validation images, for each noise. BM3D and wavelets take part where their packages are installed
(`pip install bm3d PyWavelets`).

* `runs`: what each run was trained on, for how long, and its bound on validation images.
* `strengths`: what was chosen, and whether the grid ends there.
* `fidelity`: on test images, one per patient: means of PSNR (dB), SSIM, gradient correlation and edge displacement
  (pixels) with standard errors.
* `seconds`: of each method, for one image of 256 x 256 at noise 0.1; the median of five, measured one after the other.
* `paired`: for each RUN, its measures minus those of each method, image by image.
* `phantom`, `phantom-paired`: the same on phantoms drawn without noise, whose truth is exact, and edge displacement at
  bones and in a window around each costophrenic angle. Phantoms have another seed than any run was trained on. The
  `--phantom-run` was trained on phantoms; for the RUNs they are another anatomy than they know.
* `invented`: pairs of phantoms that differ in one opacity, d = x1 - x0, with the same noise S. An observer who knows x0
  and d does best, by the lemma of Neyman and Pearson, with <y - x0, d>, which is normal with deviation S |d| and mean 0
  or |d|^2: d' = |d| / S. A denoised image f(y) tells no more than y does; its template <f(y) - x0, d> has

      u0 = <f(y0) - x0, d> / |d|^2   (right: 0; above 0, an opacity was invented),
      u1 = <f(y1) - x0, d> / |d|^2   (right: 1; below, it was removed),
      c  = u1 - u0, the contrast that is left,     d' = c |d| / S / deviation of u |d| / S over draws of the noise,

  and efficiency, d' over that of y from the same draws, is at most 1 but for chance. Strengths of opacities are such
  that |d| / S is 2 or 6 at each radius. `auc`: with against without, from different noise.

`denoising.png`, a figure of one phantom at noise 0.1, is written too. With `--keep FILE` every measured number is kept
in that file, and not measured again by the next call, whose seconds alone the record has.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import medvdm
import numpy as np
from medvdm.data import ImageData, phantom
from medvdm.errors import MissingPackageError
from medvdm.evaluation import fidelity
from medvdm.evaluation.filters import FILTERS, Filter
from medvdm.evaluation.statistics import auc, clustered_stderr
from medvdm.runs.run import Run, load, load_data
from medvdm.runs.store import EVALUATIONS, METRICS, read_lines, read_record
from medvdm.theory.anscombe import stabilised, unstabilised
from scipy.ndimage import binary_dilation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

SEED = 0
PHANTOM_SEED = 1  #: runs are trained on seed 0
MEASURES = ("psnr", "ssim", "gradient_correlation", "edge_displacement")
BONE = 0.02  #: gray values that bone adds where there is any
ANGLE = 0.06  #: of the side: half of the window around a costophrenic angle
RADII = (0.01, 0.02, 0.04, 0.1)  #: of opacities, of the side
VISIBLE = (2.0, 6.0)  #: |d| / S
#: Methods that take seconds per image, and how many images they are measured on, spread over the others.
SLOW = {"bm3d": 16}
CROP = 128  #: pixels around an opacity
INVENTED_NOISE = 0.1
REPEATS = 5  #: of each timing
SHOWN = 4  #: the phantom of the figure
IN_FIGURE = ("noisy", "perona-malik", "non-local means", "bm3d")  #: and the runs
Kept = record.Kept
Rows = list[dict[str, Any]]
Method = Callable[[np.ndarray], np.ndarray]  #: of a noisy image (h, w)


# --- Noise --------------------------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """Normal noise of a deviation; with a gain in gray values per photon, low dose."""

    name: str
    deviation: float
    gain: float = 0.0

    def added(self, x: np.ndarray, number: int) -> np.ndarray:
        """y, for image ``number``; noise of another level has other draws."""
        rng = np.random.default_rng([SEED, zlib.crc32(self.name.encode()), number])
        counted = self.gain * rng.poisson(x / self.gain) if self.gain else x
        return counted + rng.normal(0.0, self.deviation, x.shape)

    def removed(self, one: Filter, strength: float, y: np.ndarray) -> np.ndarray:
        """By a filter; of low dose, where black is 0 and white 1 after the transform."""
        if not self.gain:
            return one(y, self.deviation, strength)
        low, high = stabilised(np.array([0.0, 1.0]), self.gain, self.deviation)
        u = one((stabilised(y, self.gain, self.deviation) - low) / (high - low), 1 / (high - low), strength)
        return np.clip(unstabilised(low + (high - low) * u, self.gain, self.deviation), 0.0, 1.0)


NOISES = (
    Noise("0.05", 0.05),
    Noise("0.1", 0.1),
    Noise("0.2", 0.2),
    Noise("low dose", 0.01, gain=2 * (0.1**2 - 0.01**2)),
)


# --- Methods ------------------------------------------------------------------------------------------------------


def installed() -> dict[str, Filter]:
    found = {}
    for name, one in FILTERS.items():
        try:
            one(np.zeros((16, 16)), 0.1, one.strengths[0])
            found[name] = one
        except MissingPackageError as error:
            record.say("left out:", error)
    return found


def best_strength(kept: Kept, where: str, noise: Noise, name: str, truths: np.ndarray) -> tuple[float, bool]:
    """The strength with the highest PSNR on images (n, h, w), uphill from the middle; whether the grid ends there."""
    one = FILTERS[name]
    truths = truths[: 2 if name in SLOW else len(truths)]

    def score(i: int) -> float:
        def measured() -> float:
            y = [noise.removed(one, one.strengths[i], noise.added(x, 1_000_000 + k)) for k, x in enumerate(truths)]
            return float(fidelity.psnr(np.stack(y)[..., None], truths[..., None]).mean())

        return kept.of(("strength", where, len(truths), noise.name, name, one.strengths[i]), measured)

    i, last = len(one.strengths) // 2, len(one.strengths) - 1
    while True:
        best = max({max(i - 1, 0), i, min(i + 1, last)}, key=score)
        if best == i:
            return one.strengths[i], i in (0, last)
        i = best


def model_method(run: Run, noise: Noise) -> Method:
    def removed(y: np.ndarray) -> np.ndarray:
        images = y[None, ..., None].astype(np.float32)
        return medvdm.denoise(run, images, noise=noise.deviation, gain=noise.gain).mean[0, ..., 0]

    return removed


def methods_of(
    kept: Kept, where: str, noise: Noise, tuning: np.ndarray, runs: dict[str, Run]
) -> tuple[dict[str, Method], Rows]:
    """The methods by name, and what strengths were chosen for the filters on the images ``tuning``, (n, h, w)."""
    methods: dict[str, Method] = {"noisy": lambda y: y}
    rows = []
    for name, one in installed().items():
        strength, at_end = best_strength(kept, where, noise, name, tuning)
        rows.append({"images": where, "noise": noise.name, "method": name, "strength": strength, "grid_ends": at_end})
        record.say(rows[-1])
        methods[name] = lambda y, one=one, strength=strength: noise.removed(one, strength, y)
    return methods | {name: model_method(run, noise) for name, run in runs.items()}, rows


# --- Fidelity -----------------------------------------------------------------------------------------------------


def measured(
    kept: Kept,
    where: str,
    noise: Noise,
    methods: dict[str, Method],
    truths: np.ndarray,
    numbers: np.ndarray,
    masks: dict[str, np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
    """Of each method, each measure of each image; NaN where a slow method was spared an image.

    Args:
        truths, numbers: (n, h, w), and the images' numbers in their set.
        masks: (n, h, w) by name, for edges.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for name, method in methods.items():
        spared = np.arange(len(truths)) % math.ceil(len(truths) / SLOW.get(name, len(truths))) > 0
        for k, x in enumerate(truths):
            if spared[k]:
                found[name].append({})
                continue

            def one(k: int = k, x: np.ndarray = x, name: str = name, method: Method = method) -> dict[str, float]:
                restored, truth = method(noise.added(x, int(numbers[k])))[None, ..., None], x[None, ..., None]
                values = {measure: float(getattr(fidelity, measure)(restored, truth)[0]) for measure in MEASURES}
                for mask, inside in masks.items():
                    moved = fidelity.edge_displacement(restored, truth, inside[k : k + 1])[0]
                    values[f"edge_displacement_{mask}"] = float(moved)
                return values

            found[name].append(kept.of(("measured", where, noise.name, name, int(numbers[k])), one))
        record.say(where, noise.name, name, *(f"{m} {np.mean([v[m] for v in found[name] if v]):.4f}" for m in MEASURES))
    return {name: {m: np.array([v.get(m, np.nan) for v in vs]) for m in vs[0]} for name, vs in found.items()}


def tables(
    noise: Noise, found: dict[str, dict[str, np.ndarray]], runs: Sequence[str], patients: np.ndarray
) -> tuple[Rows, Rows]:
    """Means of each method, and differences of each run to each other method."""

    def of(values: dict[str, np.ndarray]) -> dict[str, float]:
        row = {}
        for measure, v in values.items():
            there = np.isfinite(v)
            row |= {measure: float(v[there].mean()), f"{measure}_se": clustered_stderr(v[there], patients[there])}
        return row

    means, pairs = [], []
    for name, values in found.items():
        count = int(np.isfinite(values["psnr"]).sum())
        means.append({"noise": noise.name, "method": name, "num_images": count} | of(values))
    for run in runs:
        for name in (name for name in found if name != run):
            differences = {measure: v - found[name][measure] for measure, v in found[run].items()}
            pairs.append({"noise": noise.name, "run": run, "method": name} | of(differences))
    return means, pairs


def seconds_of(method: Method, y: np.ndarray) -> float:
    """For one image, after a first call, which compiles."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        method(y)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def fidelity_tables(kept: Kept, runs: dict[str, Run], data: ImageData, options: argparse.Namespace) -> dict[str, Rows]:
    tuning = data.levels(record.one_per_patient(data, "val", options.val))[..., 0] / 255.0
    chosen = record.one_per_patient(data, options.split, options.num)
    truths = data.levels(chosen)[..., 0] / 255.0
    rows: dict[str, Rows] = {"strengths": [], "seconds": [], "fidelity": [], "paired": []}
    for noise in NOISES:
        methods, strengths = methods_of(kept, "nih", noise, tuning, runs)
        found = measured(kept, f"nih {options.split}", noise, methods, truths, chosen, {})
        means, pairs = tables(noise, found, list(runs), data.patients[chosen])
        for name, part in (("strengths", strengths), ("fidelity", means), ("paired", pairs)):
            rows[name] += part
        if noise.name == "0.1":
            y = noise.added(truths[0], int(chosen[0]))
            rows["seconds"] = [{"method": name, "seconds": seconds_of(one, y)} for name, one in methods.items()]
    return rows


# --- Phantoms -----------------------------------------------------------------------------------------------------


def drawn(indices: np.ndarray, size: int, **changes: np.ndarray) -> tuple[np.ndarray, phantom.PhantomFactors]:
    """Phantoms (n, h, w) without noise and collimator."""
    n = len(indices)
    clean = {"noise": np.zeros(n), "collimation": np.zeros((n, 4))}
    images, factors = phantom.render(indices, size=size, seed=PHANTOM_SEED, changes=clean | changes)
    return images[..., 0].astype(np.float64), factors


def regions(indices: np.ndarray, truths: np.ndarray, factors: phantom.PhantomFactors) -> dict[str, np.ndarray]:
    """Masks (n, h, w): where bone changes the picture, and around the costophrenic angles."""
    n, size, _ = truths.shape
    boneless, _ = drawn(indices, size, bone_density=np.zeros(n))
    bones = np.stack([binary_dilation(b, iterations=2) for b in np.abs(truths - boneless) > BONE])
    centres = (np.arange(size) + 0.5) / size
    at = phantom.costophrenic_angles(factors)[..., None]
    near = np.abs(centres - at) < ANGLE  # (n, lung, x or y, size)
    angles = (near[:, :, 1, :, None] & near[:, :, 0, None, :]).any(axis=1)
    return {"bones": bones, "angles": angles}


def phantom_tables(
    kept: Kept, runs: dict[str, Run], size: int, options: argparse.Namespace
) -> tuple[dict[str, Rows], dict[str, Method]]:
    """The tables, and the methods for the noise of :func:`invented`."""
    tuning, _ = drawn(20_000 + 2 * np.arange(options.val), size)
    indices = 2 * np.arange(options.phantoms)  # one visit of each patient
    truths, factors = drawn(indices, size)
    masks = regions(indices, truths, factors)
    rows: dict[str, Rows] = {"strengths": [], "phantom": [], "phantom-paired": []}
    for noise in NOISES[1:2] if options.quick else NOISES[:2]:
        methods, strengths = methods_of(kept, f"phantom {size}", noise, tuning, runs)
        found = measured(kept, f"phantom {size}", noise, methods, truths, indices, masks)
        means, pairs = tables(noise, found, list(runs), indices)
        for name, part in (("strengths", strengths), ("phantom", means), ("phantom-paired", pairs)):
            rows[name] += part
        if noise.deviation == INVENTED_NOISE:
            kept_methods = methods
    return rows, kept_methods


def with_opacity(
    indices: np.ndarray, size: int, radius: float, visible: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs x0, x1 (n, CROP, CROP) without and with one opacity of this radius, |d| = visible S; and |d| and the
    opacities' strengths."""
    n = len(indices)
    none = {"num_opacities": np.zeros(n, int)}
    x0, _ = drawn(indices, size, **none)
    _, own = drawn(indices, 8)
    zeros = np.zeros((n, phantom.MAX_OPACITIES - 1))

    def column(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:, None], zeros], axis=1)

    centre = {"opacity_x": column(own.opacity_x[:, 0]), "opacity_y": column(own.opacity_y[:, 0])}
    strength = np.full(n, 0.2)
    for _ in range(4):  # |d| is nearly in proportion to the strength
        x1, _ = drawn(
            indices,
            size,
            num_opacities=np.ones(n, int),
            opacity_radius=column(np.full(n, radius)),
            opacity_strength=column(strength),
            **centre,
        )
        norm = np.linalg.norm((x1 - x0).reshape(n, -1), axis=1)
        strength = np.clip(strength * visible * INVENTED_NOISE / norm, 0.0, 1.0)
    crop = min(CROP, size)
    corners = np.stack([own.opacity_y[:, 0], own.opacity_x[:, 0]], axis=1) * size - crop / 2
    corners = np.clip(corners.astype(int), 0, size - crop)
    cut = [np.s_[i, a : a + crop, b : b + crop] for i, (a, b) in enumerate(corners.tolist())]
    x0, x1 = (np.stack([x[c] for c in cut]) for x in (x0, x1))
    return x0, x1, np.linalg.norm((x1 - x0).reshape(n, -1), axis=1), strength


def invented_table(kept: Kept, methods: dict[str, Method], size: int, options: argparse.Namespace) -> Rows:
    """One row for each radius, visibility and method."""
    every = 2 * np.arange(500, 700)
    ill = every[phantom.render(every, size=8, seed=PHANTOM_SEED)[1].num_opacities > 0][: options.pairs]
    rows = []
    for radius in RADII:
        for visible in VISIBLE:
            x0, x1, norm, strength = with_opacity(ill, size, radius, visible)
            u = {}
            for name, method in methods.items():
                key = ("invented", size, radius, visible, name)
                both = [templates(kept, (*key, i), method, x, x0, x1 - x0, options) for i, x in enumerate((x0, x1))]
                u[name] = np.array(both)
                rows.append(
                    {
                        "radius": radius,
                        "visible": visible,
                        "method": name,
                        "num_pairs": len(ill),
                        "num_draws": options.draws,
                    }
                    | {"strength": float(strength.mean()), "ideal": float((norm / INVENTED_NOISE).mean())}
                    | observed(u[name], u["noisy"], norm / INVENTED_NOISE)
                )
                record.say(rows[-1])
    return rows


def templates(
    kept: Kept,
    key: tuple[object, ...],
    method: Method,
    x: np.ndarray,
    x0: np.ndarray,
    d: np.ndarray,
    options: argparse.Namespace,
) -> list[list[float]]:
    """<f(y) - x0, d> / |d|^2 of images x (n, h, w), for each image and draw of the noise."""

    def one(b: int, draw: int) -> float:
        y = NOISES[1].added(x[b], 2_000_000 + 1000 * b + draw)  # the same noise with and without the opacity
        return float(np.sum((method(y) - x0[b]) * d[b]) / np.sum(d[b] ** 2))

    return [
        [kept.of((*key, b, draw), lambda b=b, draw=draw: one(b, draw)) for draw in range(options.draws)]
        for b in range(len(x))
    ]


def observed(u: np.ndarray, of_noisy: np.ndarray, ideal: np.ndarray) -> dict[str, float]:
    """What an observer of u (without or with, backgrounds, draws) finds.

    Args:
        u, of_noisy: of a method, and of the noisy image with the same noise.
        ideal: |d| / S of each background.
    """
    n, draws = u.shape[1:]
    backgrounds = np.arange(n)

    def mean(values: np.ndarray, name: str) -> dict[str, float]:
        return {name: float(values.mean()), f"{name}_se": clustered_stderr(values.mean(axis=1), backgrounds)}

    def visibility(u: np.ndarray, ideal: np.ndarray) -> float:
        """d'; the deviation is over draws of the noise, within a background."""
        v = u * ideal[:, None]
        return float((v[1] - v[0]).mean() / math.sqrt(v.var(axis=2, ddof=1).mean()))

    def efficiency(which: np.ndarray) -> float:
        return visibility(u[:, which], ideal[which]) / visibility(of_noisy[:, which], ideal[which])

    left_out = np.array([efficiency(np.delete(backgrounds, b)) for b in backgrounds])
    jackknife = math.sqrt((n - 1) / n * float(np.sum((left_out - left_out.mean()) ** 2)))
    # Different draws for with and without, so that the two are independent.
    half = draws // 2
    v = u * ideal[:, None]
    scores = np.concatenate([v[0, :, :half].ravel(), v[1, :, half:].ravel()])
    labels = np.repeat([0, 1], [n * half, n * (draws - half)])
    groups = np.concatenate([np.repeat(backgrounds, half), np.repeat(backgrounds, draws - half)])
    area = auc(scores, labels, groups)
    # The means of y's own are 0 and 1: to subtract what they were by chance leaves less chance.
    return (
        mean(u[0] - of_noisy[0], "invented")
        | mean(u[1] - of_noisy[1] + 1, "kept")
        | mean(u[1] - u[0], "contrast")
        | {"efficiency": efficiency(backgrounds), "efficiency_se": jackknife, "auc": area.value, "auc_se": area.stderr}
    )


def trained(path: Path) -> dict[str, Any]:
    """A run in one row."""
    start, config = read_record(path)
    looks = [look for look in read_lines(path / EVALUATIONS) if look["weights"] == "ema"]
    return {
        "run": path.name,
        "command": record.train_command(config),
        "devices": start["environment"]["devices"],
        "minutes": record.training_seconds(read_lines(path / METRICS)) / 60,
        "val_bpd": looks[-1]["vlb_bpd"],
    }


# --- The figure ---------------------------------------------------------------------------------------------------


def figure(methods: dict[str, Method], size: int, path: Path) -> None:
    """A phantom, with noise, and what methods make of it; below, its costophrenic angle on the left, larger."""
    from medvdm.plotting import subplots

    (truth,), factors = drawn(np.array([SHOWN]), size)
    y = NOISES[1].added(truth, SHOWN)
    shown = {"truth": truth} | {name: method(y) for name, method in methods.items()}
    column, row = (size * phantom.costophrenic_angles(factors)[0, 0]).astype(int)
    half = size // 8
    top, left = (int(np.clip(v - half, 0, size - 2 * half)) for v in (row - half // 2, column + half // 2))
    inset = np.s_[top : top + 2 * half, left : left + 2 * half]
    fig, axes = subplots(2, len(shown), width=1.4 * len(shown), height=3.2)
    for (name, image), (upper, lower) in zip(shown.items(), axes.T, strict=True):
        for ax, part in ((upper, image), (lower, image[inset])):
            ax.imshow(part, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
        upper.set_title(name)
    fig.savefig(path)


# --- All ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="the folder of the NIH images")
    parser.add_argument("--phantom-run", type=Path, help="a run on phantoms; its size is that of the phantoms")
    parser.add_argument("--num", type=int, default=32, help="test images, one per patient")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="val is for developing")
    parser.add_argument("--val", type=int, default=4, help="validation images, on which strengths are chosen")
    parser.add_argument("--phantoms", type=int, default=12, help="of other patients than any run's")
    parser.add_argument("--pairs", type=int, default=6, help="backgrounds of opacities")
    parser.add_argument("--draws", type=int, default=4, help="of noise for each")
    parser.add_argument("--quick", action="store_true", help="phantoms with one noise level only")
    parser.add_argument("--skip", nargs="*", default=[], choices=["fidelity", "phantom"])
    parser.add_argument("--keep", type=Path, help="a file that the numbers of calls with the same options are kept in")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    kept = Kept(options.keep)
    runs = {path.name: load(path, ema=True) for path in options.runs}
    all_runs = [*options.runs, *([options.phantom_run] if options.phantom_run else [])]
    results: dict[str, Rows] = {"runs": [trained(path) for path in all_runs], "strengths": []}
    data = load_data(next(iter(runs.values())), data_dir=options.data_dir)
    if "fidelity" not in options.skip:
        results |= fidelity_tables(kept, runs, data, options)
    if "phantom" not in options.skip:
        both = runs | ({options.phantom_run.name: load(options.phantom_run, ema=True)} if options.phantom_run else {})
        size = list(both.values())[-1].config.model.image_shape[0]
        found, methods = phantom_tables(kept, both, size, options)
        results["strengths"] += found.pop("strengths")
        results |= found | {"invented": invented_table(kept, methods, size, options)}
        shown = {name: one for name, one in methods.items() if name in {*IN_FIGURE, *both}}
        figure(shown, size, record.RESULTS / "denoising.png")
    config = next(iter(runs.values())).config
    record.experiment("denoising", config=config, seconds=time.perf_counter() - start, results=results)


if __name__ == "__main__":
    main()
