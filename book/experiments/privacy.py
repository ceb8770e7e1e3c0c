"""What models have kept of their training images: book/results/privacy.json.

    python book/experiments/privacy.py [RUN ...] --data-dir DIR [--canary-runs RUN ...] [--keep FILE] [--only PART ...]

Runs are trained on NIH with `--withhold 60`; canary runs with `--canaries 24 --canary-copies 1,4,16`. Everything is
by the headline attacks and the one rule of `medvdm audit --privacy`, which were fixed before; nothing is chosen here,
and no image is written.

* `runs`: of each run, copies among its samples, and the AUC of membership of images and of persons with intervals;
* `attacks`: the same for each attack of :mod:`medvdm.evaluation.privacy.membership`;
* `nobody`: the headline attack on halves of the held-out patients, where there is nothing to find;
* `published`: what mean and components of the runs' folders give away;
* `canaries`: exposure against copies;
* `clean`: audits in which nothing is copied: fresh phantoms against phantoms, unseen X-rays against X-rays, and
  samples of a linear-Gaussian model of other patients. Alarms are false;
* `controls`: of each control the share found, over seeds, on phantoms and X-rays;
* `defences`: a small latent model on phantoms with visits and canaries, trained in different ways: its excess on test
  patients, and what the attacks still see;
* `memoriser`: the same network on 20 images;
* `shadows`: attacks with 2 to 8 shadow models beside those that need none;
* `growth`: minutes and memory of the search for 1,000 samples against ever more training images, and by a line through
  them against the 112,120 of ChestX-ray14.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from medvdm.data import DataConfig, ImageData, phantom, planted
from medvdm.data import load as load_images
from medvdm.evaluation import baselines
from medvdm.evaluation.held_out import entropy
from medvdm.evaluation.privacy import controls, membership
from medvdm.evaluation.privacy.copies import audit_copies
from medvdm.evaluation.privacy.search import Shelf, measure, now, reduced
from medvdm.evaluation.privacy.verdict import headlines
from medvdm.runs import privacy
from medvdm.runs.config import PrivacyConfig, RunConfig
from medvdm.runs.evaluate import evaluate
from medvdm.runs.fit import fit
from medvdm.runs.presets import preset
from medvdm.runs.privacy import audit_privacy
from medvdm.runs.run import Run, as_seen, load, load_data
from medvdm.training import privacy_accounting
from medvdm.training.batches import training_patients

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402

SIZE = 64  #: pixels of the clean audits, the controls, the growth and the samples of it
GROWN = (2_000, 4_000, 8_000)  #: training images; by a line, all of ChestX-ray14
ALL = 112_120
Rows = list[dict[str, Any]]
Kept = record.Kept
#: The small model of the defences, as in the chapter; more steps, so that there is something to defend against.
SMALL = {
    "conditional": False,
    "image_size": 32,
    "num_images": 600,
    "withhold": 60,
    "canaries": 20,
    "canary_copies": "1,16",
    "steps": 3000,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "score_layers": 2,
    "ema_decay": 0.0,
}
DP = {"clip_norm": 0.0, "batch_size": 128, "steps": 500}
TINY = {
    "latent": 8,
    "embedding_dim": 16,
    "inner_width": 16,
    "encoder_width": 16,
    "decoder_width": 16,
    "score_layers": 1,
}
MANY = 6000  #: phantoms, ten times as many
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "a tenth of the steps": {"steps": 300},
    "a third of the steps": {"steps": 1000},
    "three times the steps": {"steps": 9000},
    "shifted and zoomed images": {"augment_shift": 0.05, "augment_size": 0.05},
    "a latent of 8 for 32": {"latent": 8},
    "one image of each patient": {"visits": 1, "withhold": 0},
    "ten times the images": {"num_images": MANY},
    "epsilon 8, the same images": {**DP, "epsilon": 8.0},
    "epsilon 8, ten times the images": {**DP, "num_images": MANY, "epsilon": 8.0},
    "epsilon 1, ten times the images": {**DP, "num_images": MANY, "epsilon": 1.0},
    "ten times the images, a tiny network": {**TINY, "num_images": MANY},
    "epsilon 8, ten times the images, a tiny network": {**DP, **TINY, "num_images": MANY, "epsilon": 8.0},
}
SPLITS = 40  #: of the held-out patients in two halves
MEMORISED = 20  #: images that the memoriser is trained on
SHADOWS = 8  #: models, each trained on a random half of the patients


def told(result: dict[str, Any]) -> dict[str, Any]:
    """The headline attacks as flat numbers."""
    out: dict[str, Any] = {}
    for name, one in headlines(result).items():
        low, high = one["auc_interval"]
        out |= {name: one["auc"], f"{name}_low": low, f"{name}_high": high, f"{name}_tpr1": one["tpr_at_1pct_fpr"]}
    return out


def exposed(result: dict[str, Any]) -> Rows:
    """The canaries of an audit, by their number of copies."""
    found = result["canaries"]
    if not found:
        return []
    most = {"most": found["exposure_most"], "chance": found["exposure_chance"]}
    return [{**most, **row} for row in found["by_copies"]]


def named(run: Run) -> dict[str, Any]:
    config = run.config
    return {"run": run.path.name, "preset": config.preset, "image_size": config.data.image_size, **steps_of(config)}


def steps_of(config: RunConfig) -> dict[str, int]:
    return {"steps": config.training.steps, "batch_size": config.training.batch_size}


def of_runs(kept: Kept, paths: list[Path], data_dir: str | None, samples: int) -> tuple[Rows, Rows, Rows]:
    """Audits of runs: copies and headlines, all attacks, what is published."""
    runs, attacks, published = [], [], []
    for path in paths:
        run = load(path)

        def audit(run: Run = run) -> dict[str, Any]:
            start = time.perf_counter()
            how = {"steps": 25, "sampler": "dpmpp"} if run.eight_bit else {"steps": 100}
            found = audit_privacy(run, num=samples, data_dir=data_dir, **how)
            record.say(f"{run.path.name}: {found['alarms']}")
            return {**found, "seconds": time.perf_counter() - start}

        found, name = kept.of(["run", path.name], audit), named(run)
        sizes = {key: found[key] for key in ("num_samples", "num_train", "num_held_out", "num_copies", "visits")}
        more = {"clusters": found["clusters"]["groups"], "false_alarms": found["false_alarm_rate"]}
        runs.append({**name, **sizes, **more, **told(found), "seconds": found["seconds"]})
        for question, every in found["membership"].items():
            if isinstance(every, dict) and "bound" in every:
                for attack, one in every.items():
                    if one is not None:
                        low, high = one["auc_interval"]
                        row = {**name, "question": question, "attack": attack, "auc": one["auc"]}
                        attacks.append({**row, "low": low, "high": high, "tpr1": one["tpr_at_1pct_fpr"]})
        for file, one in found["published"].items():
            low, high = one["attack"]["auc_interval"]
            row = {**name, "file": file, "components": one["components"], "auc": one["attack"]["auc"]}
            completion = {f"completion_{key}": one[f"completion_{key}"] for key in ("train", "held_out")}
            published.append({**row, "low": low, "high": high, **completion})
    return runs, attacks, published


def of_nobody(kept: Kept, paths: list[Path], data_dir: str | None) -> Rows:
    """The headline attack where there is nothing to find: one half of the held-out patients against the other half."""

    def splits(run: Run) -> dict[str, float]:
        data = as_seen(run, load_data(run, data_dir=data_dir))
        shelf = Shelf.from_data(data, np.flatnonzero(data.splits != "train"))
        rows, gammas = np.arange(len(shelf)), privacy._gammas(run, privacy.DEFAULTS)
        found = privacy._losses(run, shelf, rows, "nobody", gammas, privacy.DEFAULTS, now)
        people, rng, areas, wrong = np.unique(shelf.patients), np.random.default_rng(0), [], 0
        for _ in range(SPLITS):
            half = np.isin(shelf.patients, rng.permutation(people)[: len(people) // 2])
            told = membership.membership(
                found["levels"],
                found["bound"],
                np.where(half, "member", "held_out"),
                shelf.patients,
                gammas=gammas,
                yardstick=found["yardstick"],
            )
            areas.append(told["auc"])
            low, high = told["auc_interval"]
            wrong += not low <= 0.5 <= high
        return {"splits": SPLITS, "auc": float(np.mean(areas)), "sd": float(np.std(areas, ddof=1)), "wrong": wrong}

    rows = []
    for run in map(load, paths):
        rows.append({**named(run), **kept.of(["nobody", run.path.name], lambda run=run: splits(run))})
    record.say("nobody", rows)
    return rows


def of_canaries(kept: Kept, paths: list[Path]) -> Rows:
    """Exposure against copies; of an audit this part alone."""
    how, rows = PrivacyConfig(secrets=50), []
    for run in map(load, paths):
        found = kept.of(["canaries", run.path.name], lambda run=run: {"canaries": privacy._canaries(run, how, now)})
        rows += [{**named(run), **row} for row in exposed(found)]
    return rows


def clean(kept: Kept, data_dir: str | None, seeds: int) -> Rows:
    """Audits in which nothing is copied; ``num_copies`` are false alarms."""

    def audits() -> Iterator[tuple[str, int, Callable[[], tuple[Shelf, Shelf, Shelf]]]]:
        nih = None if data_dir is None else load_images(DataConfig(data="nih", data_dir=data_dir, image_size=SIZE))
        for seed in range(seeds):
            yield "phantoms", seed, lambda seed=seed: fresh_phantoms(seed)
            if nih is not None:
                yield "X-rays", seed, lambda seed=seed: thirds(nih, seed)
                yield "linear-Gaussian of other patients", seed, lambda seed=seed: drawn(*thirds(nih, seed), seed)

    def audit(sets: Callable[[], tuple[Shelf, Shelf, Shelf]], seed: int) -> dict[str, Any]:
        train, held_out, samples = sets()
        found = audit_copies(samples, train, held_out, seed=seed)
        return {k: found[k] for k in ("num_samples", "num_train", "num_held_out", "num_copies", "false_alarm_rate")}

    rows = []
    for name, seed, sets in audits():
        one = kept.of(["clean", name, seed], lambda sets=sets, seed=seed: audit(sets, seed))
        rows.append({"samples": name, "seed": seed, **one})
        record.say("clean", rows[-1])
    return rows


def fresh_phantoms(seed: int) -> tuple[Shelf, Shelf, Shelf]:
    """Training and held-out phantoms, and samples of the generator itself."""
    data = phantom.load(num_images=900, image_size=SIZE, seed=seed)
    fresh = phantom.load(num_images=200, image_size=SIZE, seed=1000 + seed)
    return *sides(data), Shelf.from_data(fresh, np.arange(200))


def drawn(train: Shelf, held_out: Shelf, others: Shelf, seed: int) -> tuple[Shelf, Shelf, Shelf]:
    """Samples of a linear-Gaussian model of other patients."""
    linear = baselines.fit(others.read(np.arange(len(others))), held_out.read(np.arange(64)))
    images = linear.sample(200, seed).reshape(200, SIZE, SIZE, 1)
    return train, held_out, Shelf.from_arrays(np.clip(images, 0, 1))


def sides(data: ImageData) -> tuple[Shelf, Shelf]:
    """Training and held-out images of a data set."""
    parts = (data.splits == "train", data.splits != "train")
    train, held_out = (Shelf.from_data(data, np.flatnonzero(part)) for part in parts)
    return train, held_out


def thirds(data: ImageData, seed: int) -> tuple[Shelf, Shelf, Shelf]:
    """Half of the patients as if trained on, a quarter held out, a quarter as samples; anew for each seed."""
    people = np.random.default_rng(seed).permutation(np.unique(data.patients))
    quarter = len(people) // 4
    parts = (people[2 * quarter :], people[:quarter], people[quarter : 2 * quarter])
    return tuple(Shelf.from_data(data, np.flatnonzero(np.isin(data.patients, part))) for part in parts)


def of_controls(kept: Kept, data_dir: str | None, seeds: int) -> Rows:
    """The share that is found of each control."""

    def run(name: str, seed: int) -> dict[str, Any]:
        if name == "phantoms":
            train, held_out = sides(phantom.load(num_images=900, image_size=SIZE, seed=seed))
        else:
            train, held_out, _ = thirds(load_images(DataConfig(data="nih", data_dir=data_dir, image_size=SIZE)), seed)
        return controls.run_controls(train, held_out, seed=seed)

    rows = []
    for seed in range(seeds):
        for name in ("phantoms", "X-rays") if data_dir is not None else ("phantoms",):
            found = kept.of(["controls", name, seed], lambda name=name, seed=seed: run(name, seed))
            rows += [{"images": name, "seed": seed, "control": control, **one} for control, one in found.items()]
        record.say("controls", seed)
    return rows


# --- Small models on phantoms ----------------------------------------------------------------------------------------


def small(*, epsilon: float = 0.0, **changes: Any) -> RunConfig:
    """The settings of :data:`SMALL` with changes, and noise for an epsilon."""
    config = preset("demo", **{**SMALL, **changes})
    if not epsilon:
        return config
    batch, steps = config.training.batch_size, config.training.steps
    patients = len(training_patients(load_images(config.data), batch))
    delta = privacy_accounting.usual_delta(patients)
    noise = privacy_accounting.noise_for(epsilon, batch=batch, patients=patients, steps=steps, delta=delta)
    return preset("demo", **{**SMALL, **changes, "dp_noise": round(noise, 4)})


def attacked(run: Run, data: ImageData | None = None) -> dict[str, Any]:
    """Membership and canaries of an audit, without its search for copies, which takes longest and finds none here."""
    how = PrivacyConfig(draws=16)
    groups = privacy._groups(run, load_data(run) if data is None else data, None, privacy.Folders())
    return {
        "membership": privacy._membership(run, *groups, how, now),
        "canaries": privacy._canaries(run, how, now),
    }


def defences(kept: Kept) -> Rows:
    """The small model, trained in different ways: what it costs, and what the attacks still see."""

    def train(changes: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            run = fit(small(**changes), Path(folder) / "run", progress=False)
            bound = evaluate(run, split="test", save=False)
            found = attacked(run)
        data, promise = run.record["data"], run.record.get("privacy") or {}
        row = {
            "train_images": data["counts"]["train"]["images"],
            "noise": promise.get("noise", 0.0),
            "epsilon": promise.get("epsilon"),
            **steps_of(run.config),
            "excess_bpd": bound["excess_bpd"],
            "excess_stderr": bound["vlb_bpd_stderr"],
            **told(found),
        }
        for one in exposed(found):
            number = one["copies"]
            row |= {f"canary_{number}": one["auc"], f"canary_{number}_stderr": one["auc_stderr"]}
            row |= {f"canary_{number}_exposure": one["exposure"], f"canary_{number}_tpr1": one["tpr"]}
        return row

    rows = [{"defence": "no network, the mean image", "excess_bpd": kept.of(["mean image"], of_mean_image)}]
    for name, changes in DEFENCES.items():
        row = kept.of(["defence", name], lambda changes=changes: train(changes))
        rows.append({"defence": name, **row})
        record.say("defences", rows[-1])
    return rows


def of_mean_image() -> float:
    """Excess of the mean training image on test patients, in bits per dimension: what a useful model stays below."""
    data = load_images(small().data)
    train, test = (data.read(np.flatnonzero(data.splits == split)) for split in ("train", "test"))
    mean = np.clip(train.mean(axis=0), 1 / 512, 1 - 1 / 512)
    nats = -(test * np.log(mean) + (1 - test) * np.log(1 - mean)).sum(axis=(1, 2, 3)) - entropy(test)
    return float(nats.mean() / np.log(2) / mean.size)


def memoriser(kept: Kept, seeds: int) -> Rows:
    """The small model trained on a few images for as long, and what the attack on membership finds."""

    def train(seed: int) -> dict[str, Any]:
        everything = phantom.load(num_images=400, image_size=32, visits=1, seed=seed)
        few = np.flatnonzero(everything.splits == "train")[:MEMORISED]
        data = planted.take(everything, np.concatenate([few, np.flatnonzero(everything.splits != "train")]))
        config = small(visits=1, withhold=0, canaries=0, num_images=400, data_seed=seed, batch_size=MEMORISED)
        with tempfile.TemporaryDirectory() as folder:
            run = fit(config, Path(folder) / "run", data=data, progress=False)
            found = attacked(run, data)
        return {"train_images": len(few), **steps_of(config), **told(found)}

    rows = [{"seed": seed, **kept.of(["memoriser", seed], lambda seed=seed: train(seed))} for seed in range(seeds)]
    record.say("memoriser", rows)
    return rows


def shadows(kept: Kept) -> Rows:
    """The likelihood ratio from shadow models of random halves, beside the attacks that need none."""
    pool = phantom.load(num_images=600, image_size=32, visits=1)
    images, rng = pool.read(np.arange(len(pool))), np.random.default_rng(0)
    halves = np.stack(
        [np.isin(np.arange(len(pool)), rng.permutation(len(pool))[: len(pool) // 2]) for _ in range(SHADOWS + 1)]
    )

    def train(number: int) -> dict[str, Any]:
        inside = halves[number]
        data = replace(pool, splits=np.where(inside, "train", np.where(np.arange(len(pool)) % 2, "val", "test")))
        config = small(visits=1, withhold=0, canaries=0, seed=number, steps=1500)
        with tempfile.TemporaryDirectory() as folder:
            run = fit(config, Path(folder) / "run", data=data, progress=False)
            how = {"draws": 16, "seed": 0, "batch_size": 64}
            gammas = np.linspace(*np.asarray(run.model.gamma(np.array([0.0, 1.0])), np.float64), 8)
            levels = membership.level_losses(run.graph, run.params, images, gammas=gammas, **how) if not number else []
            bound = membership.bounds(run.graph, run.params, images, **how)
        record.say("shadow", number)
        return {"bound": bound.tolist(), "levels": np.asarray(levels).tolist(), "gammas": gammas.tolist()}

    found = [kept.of(["shadow", number], lambda number=number: train(number)) for number in range(SHADOWS + 1)]
    bounds = -np.array([one["bound"] for one in found])
    rows = []
    for many in (2, 4, SHADOWS):
        ratio = membership.likelihood_ratio(bounds[0], bounds[1 : many + 1], halves[1 : many + 1])
        result = membership.membership(
            np.array(found[0]["levels"]),
            -bounds[0],
            np.where(halves[0], "member", "held_out"),
            pool.patients,
            gammas=found[0]["gammas"],
            yardstick=entropy(images),
            ratio=ratio,
        )["member_vs_held_out"]
        for attack in ("likelihood_ratio",) if many < SHADOWS else tuple(result):
            if (one := result[attack]) is not None:
                low, high = one["auc_interval"]
                number = many if attack == "likelihood_ratio" else 0
                row = {"attack": attack, "shadows": number, "auc": one["auc"], "low": low, "high": high}
                rows.append({**row, "tpr1": one["tpr_at_1pct_fpr"]})
    record.say("shadows", rows)
    return rows


# --- Growth ----------------------------------------------------------------------------------------------------------


def growth(kept: Kept) -> Rows:
    """Minutes and memory of the search for 1,000 samples against ever more training images, each in its own process."""

    def one(number: int) -> dict[str, Any]:
        words = [sys.executable, __file__, "--grow", str(number)]
        return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)

    rows = []
    for number in GROWN:
        rows.append(
            {"num_train": number, "measured": True, **kept.of(["growth", number], lambda number=number: one(number))}
        )
        record.say("growth", rows[-1])
    numbers = [row["num_train"] for row in rows]
    lines = {key: np.polyfit(numbers, [row[key] for row in rows], 1) for key in ("minutes", "of_reading", "peak_gib")}
    return [
        *rows,
        {"num_train": ALL, "measured": False, **{key: float(np.polyval(line, ALL)) for key, line in lines.items()}},
    ]


def grow(number: int) -> dict[str, Any]:
    """One search: 1,000 samples and as many held-out images; images are mixtures of two phantoms, made when read."""
    base = phantom.load(num_images=1000, image_size=SIZE, visits=1)
    images = base.read(np.arange(len(base)))

    def shelf(num: int, stream: int) -> Shelf:
        rng = np.random.default_rng([0, stream])
        pairs, weights = rng.integers(0, len(images), (num, 2)), rng.uniform(0, 1, num).astype(np.float32)

        def read(rows: np.ndarray) -> np.ndarray:
            w = weights[rows, None, None, None]
            return w * images[pairs[rows, 0]] + (1 - w) * images[pairs[rows, 1]]

        names = [f"{stream}-{i}" for i in range(num)]
        return Shelf(read, np.array(names), names)

    start = time.perf_counter()
    train, held_out, samples = shelf(number, 0), shelf(1000, 1), shelf(1000, 2)
    of_train = reduced(train, "train")
    read = time.perf_counter() - start
    measure(reduced(held_out, "held_out"), of_train)
    measure(reduced(samples, "samples"), of_train)
    minutes = (time.perf_counter() - start) / 60
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"minutes": minutes, "of_reading": read / 60, "peak_gib": memory}


PARTS = ("runs", "nobody", "canaries", "clean", "controls", "defences", "memoriser", "shadows", "growth")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="*", type=Path)
    options.add_argument("--data-dir")
    options.add_argument("--canary-runs", nargs="*", type=Path, default=[])
    options.add_argument("--seeds", type=int, default=7)
    options.add_argument("--samples", type=int, default=256)
    options.add_argument("--keep", type=Path, help="a file that the numbers of calls with the same options are kept in")
    options.add_argument("--only", choices=PARTS, nargs="*", help="do these parts, keep them, and write no record")
    options.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    return options


def main() -> None:
    asked = parser().parse_args()
    if asked.grow:
        print(json.dumps(grow(asked.grow)))
        return
    kept, start = Kept(asked.keep), time.perf_counter()
    parts: dict[str, Callable[[], Any]] = {
        "runs": lambda: of_runs(kept, asked.runs, asked.data_dir, asked.samples),
        "nobody": lambda: of_nobody(kept, asked.runs, asked.data_dir),
        "canaries": lambda: of_canaries(kept, asked.canary_runs),
        "clean": lambda: clean(kept, asked.data_dir, asked.seeds),
        "controls": lambda: of_controls(kept, asked.data_dir, min(3, asked.seeds)),
        "defences": lambda: defences(kept),
        "memoriser": lambda: memoriser(kept, min(2, asked.seeds)),
        "shadows": lambda: shadows(kept),
        "growth": lambda: growth(kept),
    }
    if asked.only:
        for name in asked.only:
            parts[name]()
        return
    results = {name: part() for name, part in parts.items()}
    runs, attacks, published = results.pop("runs")
    results = {"runs": runs, "attacks": attacks, "published": published, **results}
    record.experiment("privacy", config=small(), seconds=time.perf_counter() - start, results=results)


if __name__ == "__main__":
    main()
