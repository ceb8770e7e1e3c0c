"""What bits say about unusual images, and what they do not: book/results/unusual.json.

    python book/experiments/unusual.py RUN [RUN ...] --data-dir DIR [--draws D] [--images N]

For each run of a model of gray values, groups of images against its own test images, by tests that were fixed before:

* of a run on NIH: the same test images inverted, turned by 90 and by 180 degrees, brighter (gamma 0.5), darker (gamma
  2), blurred (deviation of 1/64 of the side) and with noise of deviation 0.05; one black image; and phantoms;
* of a run on PneumoniaMNIST: its images with pneumonia against those without.

Other anatomy is left out: only chest X-rays are at hand.

* `tests`: for each group and test the area under the ROC curve with its standard error by patient, 0.5 is chance, and
  the share of the group that is flagged where 5 % of validation images may be;
* `groups`: the mean of each statistic over each group and over validation and test images.

A test is a statistic, high or far from the validation images' median on either side. Statistics: bits of the bound,
bits above the Gaussian of the training images, bits above a JPEG XL file; and without a model: bits of a PNG file and
the mean gray value. Medians come from validation images. Nothing is chosen here, and no image is written.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from medvdm.data import phantom
from medvdm.evaluation import codecs, typicality
from medvdm.evaluation.statistics import auc
from medvdm.images import to_levels
from medvdm.runs.run import Run, load, load_data
from medvdm.theory.bound import bits_per_dim
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

SEED, SHARE = 0, 0.05
NOISE = 0.05  #: of white
Rows = list[dict[str, Any]]
Group = tuple[np.ndarray, np.ndarray]  #: gray values (n, h, w, 1), and the patients


def changed(levels: np.ndarray) -> dict[str, np.ndarray]:
    """The same images, each changed in one way."""
    unit = levels / 255.0
    side = levels.shape[1]
    noise = np.random.default_rng(SEED).normal(0.0, NOISE, levels.shape)
    return {
        "inverted": 255 - levels,
        "turned 90": np.rot90(levels, 1, (1, 2)).copy(),
        "turned 180": np.rot90(levels, 2, (1, 2)).copy(),
        "gamma 0.5": to_levels(unit**0.5),
        "gamma 2": to_levels(unit**2),
        "blurred": to_levels(np.clip(gaussian_filter(unit, (0, side / 64, side / 64, 0)), 0, 1)),
        "noise 0.05": to_levels(np.clip(unit + noise, 0, 1)),
    }


def groups_of(run: Run, data_dir: str | None, most: int) -> dict[str, Group]:
    """``val`` and ``test``, which is what the others are held against, and the groups."""
    nih = run.config.data.data == "nih"
    data = load_data(run, data_dir=data_dir if nih else None)

    def some(indices: np.ndarray) -> Group:
        chosen = indices[np.rint(np.linspace(0, len(indices) - 1, min(most, len(indices)))).astype(int)]
        return data.levels(chosen), data.patients[chosen]

    test = data.indices("test")
    if not nih:
        (column,) = [i for i, name in enumerate(data.class_names) if name.casefold() == "pneumonia"]
        ill = data.labels[test][:, column] == 1
        healthy = data.indices("val")[data.labels[data.indices("val")][:, column] == 0]
        return {"val": some(healthy), "test": some(test[~ill]), "pneumonia": some(test[ill])}
    val, (levels, patients) = some(data.indices("val")), some(test)
    side = levels.shape[1]
    drawn = phantom.load(num_images=len(levels), image_size=side, seed=SEED)
    whose = np.array([f"phantom {name}" for name in drawn.patients])
    return {
        "val": val,
        "test": (levels, patients),
        **{name: (images, patients) for name, images in changed(levels).items()},
        "black": (np.zeros((1, *levels.shape[1:]), np.uint8), np.array(["black"])),
        "phantoms": (drawn.levels(drawn.indices("all")), whose),
    }


def statistics_of(run: Run, levels: np.ndarray, draws: int) -> dict[str, np.ndarray]:
    """(n,) by name: bits per dimension, and the mean gray value of white."""
    shape = run.config.model.image_shape
    found = typicality.costs(run.graph, run.params, levels, draws=draws, batch_size=32, seed=SEED)
    bits = bits_per_dim(found.totals.mean(axis=0), shape)
    files = {name: size * 8 / math.prod(shape) for name, size in codecs.file_bytes(levels, ("png", "jxl")).items()}
    return {
        "bits": bits,
        "over Gaussian": bits - bits_per_dim(run.gaussian.nats(levels), shape),
        "over JPEG XL": bits - files["jxl"],
        "PNG": files["png"],
        "mean gray": levels.mean(axis=(1, 2, 3)) / 255.0,
    }


def tests_of(
    name: str, group: str, values: dict[str, np.ndarray], patients: np.ndarray, known: dict[str, Any], val: dict
) -> Rows:
    """One row for each statistic, high and on either side: how well it tells a group from the test images."""
    test, whose = known["values"], np.concatenate([known["patients"], patients])
    labels = np.repeat([0, 1], [len(known["patients"]), len(patients)])
    rows = []
    for statistic, here in values.items():
        one = typicality.placed(here, val[statistic])
        both = np.concatenate([test[statistic], here])
        for side, scores, flagged in (
            ("high", both, one.high(SHARE)),
            ("either", np.abs(both - one.median), one.atypical(SHARE)),
        ):
            area = auc(scores, labels, whose)
            rows.append(
                {"run": name, "group": group, "num_images": len(here), "statistic": statistic, "side": side}
                | {"auc": area.value, "auc_se": area.stderr, "flagged": float(flagged.mean())}
            )
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir", help="the folder of the NIH images")
    parser.add_argument("--draws", type=int, default=16, help="of time and noise per image")
    parser.add_argument("--images", type=int, default=10**6, help="of each group, at most")
    return parser


def main() -> None:
    options = parser().parse_args()
    start = time.perf_counter()
    tests: Rows = []
    means: Rows = []
    for path in options.runs:
        run = load(path, ema=True)
        groups = groups_of(run, options.data_dir, options.images)
        found = {}
        for group, (levels, _) in groups.items():
            found[group] = statistics_of(run, levels, options.draws)
            means.append(
                {"run": path.name, "step": run.step, "group": group, "num_images": len(levels)}
                | {statistic: float(values.mean()) for statistic, values in found[group].items()}
            )
            record.say(means[-1])
        known = {"values": found["test"], "patients": groups["test"][1]}
        for group, values in found.items():
            if group == "test":  # of which 5 % are to be flagged, with no group to tell them from
                for statistic, here in values.items():
                    one = typicality.placed(here, found["val"][statistic])
                    for side, flagged in (("high", one.high(SHARE)), ("either", one.atypical(SHARE))):
                        row = {"run": path.name, "group": group, "num_images": len(here), "statistic": statistic}
                        tests.append(row | {"side": side, "flagged": float(flagged.mean())})
            elif group != "val":
                tests += tests_of(path.name, group, values, groups[group][1], known, found["val"])
    results = {"tests": tests, "groups": means}
    record.experiment("unusual", config=run.config, seconds=time.perf_counter() - start, results=results)


if __name__ == "__main__":
    main()
