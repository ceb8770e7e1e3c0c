"""Class-conditional models and what a classifier says of their samples: book/results/conditional.json.

    python book/experiments/conditional.py --data-dir DIR [--work FOLDER]

Trains the `demo` preset at 64x64 pixels for 2,000 steps: on NIH images with and without labels, and on phantoms with
labels (a finished run in FOLDER is used as it is). Then, with a logistic regression on principal components of the
real training images:

* `classifiers`: it is fitted on real training images and asked about held-out ones, raw and decoded (through the
  model's encoder and decoder, so with what a latent can keep); k is chosen on validation patients, test is looked at
  once for each model;
* `brightness`: the AUC of "the darker image is the one labelled pneumonia", from the mean gray value alone;
* `samples`: asked about samples of each class and guidance weight; the MS-SSIM of pairs of one class beside it;
* `transfer`: fitted on samples of both classes, asked about real test images;
* `null`: guidance 0 against the conditional model, the null against the unconditional model.

It also writes conditional-nih.png: synthetic samples, eight rows (weights 0, 1, 3, 7; in each 'No Finding', then
'Pneumonia').
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import medvdm
import numpy as np
from medvdm.evaluation import held_out, statistics
from medvdm.evaluation.audit import pca_features, spectrum_features
from medvdm.evaluation.components import exact_components
from medvdm.evaluation.measures import pair_similarity
from medvdm.evaluation.statistics import Estimate, clustered_stderr, logistic, two_sample
from medvdm.runs import provenance as provenance_
from medvdm.runs.run import Run, load, load_data
from medvdm.runs.sample import sample
from medvdm.runs.store import holds_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record

STEPS, T, NUM = 2000, 250, 256
WEIGHTS = (0.0, 1.0, 3.0, 7.0)
COMPONENTS = (8, 16, 32, 64, 128)


def trained(folder: Path, **settings: object) -> Run:
    """The run in a folder, trained first if it is not there."""
    config = medvdm.preset("demo", steps=STEPS, image_size=64, **settings)
    if holds_run(folder):
        run = load(folder)
        assert run.step == STEPS, f"{folder} is not finished"
        assert record.train_command(run.config) == record.train_command(config), f"{folder} holds another run"
        return run
    return medvdm.fit(config, folder)


class Task:
    """A conditional model with the real images of its data as flat rows, labels (1 is pneumonia) and patients."""

    def __init__(self, run: Run):
        self.run, self.data = run, load_data(run)
        self.at = {split: self.data.indices(split) for split in ("train", "val", "test")}
        self.x = {split: self.data.read(i) for split, i in self.at.items()}
        self.y = {split: self.data.labels[i, 1] for split, i in self.at.items()}
        self.patients = {split: self.data.patients[i] for split, i in self.at.items()}
        self.space = exact_components(flat(self.x["train"]), max(COMPONENTS))
        self.k = max(
            COMPONENTS,
            key=lambda k: self.ask(self.classifier(self.x["train"], self.y["train"], k), "val", k),
        )
        record.say(self.data.name, "k =", self.k)

    def scores(self, x: np.ndarray, k: int | None = None) -> np.ndarray:
        """Scores on the first k principal components, without the squares."""
        return pca_features(x, *self.space, k or self.k)[:, : k or self.k]

    def classifier(self, x: np.ndarray, y: np.ndarray, k: int | None = None):
        return logistic(self.scores(x, k), y)

    def ask(self, classifier, split: str, k: int | None = None) -> Estimate:
        return statistics.auc(
            classifier(self.scores(self.x[split], k)),
            self.y[split],
            self.patients[split],
        )

    def decoded(self, split: str) -> np.ndarray:
        return np.asarray(held_out.reconstruct(self.run.params, self.x[split], jax.random.key(0), graph=self.run.graph))


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def probability(log_odds: np.ndarray) -> float:
    """Mean probability of pneumonia."""
    return float(np.mean(1 / (1 + np.exp(-log_odds))))


def classifiers(task: Task) -> list[dict[str, object]]:
    """AUC of classifiers fitted on real training images, by number of components and kind of image."""
    rows, name = [], task.data.name
    for k in COMPONENTS:
        fitted = task.classifier(task.x["train"], task.y["train"], k)
        for split in ("val", "test"):
            rows.append(
                {
                    "data": name,
                    "k": k,
                    "chosen": k == task.k,
                    "images": split,
                    **told(task.ask(fitted, split, k)),
                }
            )
    x, y, patients = task.decoded("test"), task.y["test"], task.patients["test"]
    fitted = task.classifier(task.x["train"], task.y["train"])
    rows.append(
        {
            "data": name,
            "k": task.k,
            "chosen": True,
            "images": "test, decoded",
            **told(statistics.auc(fitted(task.scores(x)), y, patients)),
        }
    )
    return rows


def brightness(task: Task) -> list[dict[str, object]]:
    """How far one number goes: the mean gray value, the darker the sicker."""
    return [
        {"data": task.data.name, "images": split}
        | told(statistics.auc(-task.x[split].mean(axis=(1, 2, 3)), task.y[split], task.patients[split]))
        for split in ("train", "test")
    ]


def told(estimate: Estimate) -> dict[str, float]:
    return {"auc": estimate.value, "stderr": estimate.stderr}


def conditional(
    task: Task,
) -> tuple[list[dict[str, object]], list[dict[str, object]], np.ndarray]:
    """Samples of both classes at each weight: what the real-trained classifier says, and what it learns from them."""
    names, fitted = (
        task.run.class_names,
        task.classifier(task.x["train"], task.y["train"]),
    )
    samples, transfer, shown = [], [], []
    for c, name in enumerate(names):
        own = task.y["test"] == c
        likeness = pair_similarity(task.x["test"][own], task.patients["test"][own])
        samples.append(
            {"data": task.data.name, "images": "test", "label": name, "guidance": None}
            | {
                "probability": probability(fitted(task.scores(task.x["test"][own]))),
                "auc": None,
                "stderr": None,
            }
            | {"ms_ssim": likeness[0], "ms_ssim_stderr": likeness[1]}
        )
    transfer.append(
        {
            "data": task.data.name,
            "fitted_on": "train",
            "num": len(task.y["train"]),
            "guidance": None,
        }
        | told(task.ask(fitted, "test"))
    )
    few = np.random.default_rng(0).permutation(len(task.y["train"]))[: 2 * NUM]
    transfer.append(
        {
            "data": task.data.name,
            "fitted_on": "part of train",
            "num": len(few),
            "guidance": None,
        }
        | told(task.ask(task.classifier(task.x["train"][few], task.y["train"][few]), "test"))
    )
    for w in WEIGHTS:
        drawn = [sample(task.run, NUM, steps=T, label=n, guidance=w, seed=c).images for c, n in enumerate(names)]
        both, y = np.concatenate(drawn), np.repeat([0, 1], NUM)
        auc = statistics.auc(fitted(task.scores(both)), y)
        for name, x in zip(names, drawn, strict=True):
            likeness = pair_similarity(x)
            samples.append(
                {
                    "data": task.data.name,
                    "images": "samples",
                    "label": name,
                    "guidance": w,
                }
                | {"probability": probability(fitted(task.scores(x))), **told(auc)}
                | {"ms_ssim": likeness[0], "ms_ssim_stderr": likeness[1]}
            )
        own = task.classifier(both, y)
        transfer.append(
            {
                "data": task.data.name,
                "fitted_on": "samples",
                "num": len(y),
                "guidance": w,
            }
            | told(task.ask(own, "test"))
        )
        shown += [sample(task.run, 8, steps=T, label=n, guidance=w, seed=0).images for n in names]
        record.say(task.data.name, "weight", w, told(auc), transfer[-1])
    return samples, transfer, np.concatenate(shown)


def null_checks(task: Task, free: Run) -> list[dict[str, object]]:
    """The model at weight 0, and its null against an unconditional model with the same settings."""
    run, x, patients = task.run, task.x["test"], task.patients["test"]
    dims, key = x[0].size * np.log(2), jax.random.key(0)
    plain = sample(run, 32, steps=T, label="Pneumonia", seed=5).images
    nearly = sample(run, 32, steps=T, label="Pneumonia", guidance=1e-12, seed=5).images
    rows = [
        {
            "what": "largest change of a gray value, guidance 1e-12 against 0",
            "value": float(np.abs(plain - nearly).max()),
            "stderr": None,
        }
    ]

    labels = task.data.labels[task.at["test"]].astype(np.float32)
    bound = {
        "labels": held_out.bound_terms(run.graph, run.params, x, labels, draws=8, key=key),
        "null": held_out.bound_terms(run.graph, run.params, x, None, draws=8, key=key),
        "unconditional": held_out.bound_terms(free.graph, free.params, x, None, draws=8, key=key),
    }
    bpd = {name: terms.total.mean(axis=0) / dims for name, terms in bound.items()}
    for name, values in bpd.items():
        rows.append(
            {
                "what": f"bound, {name}",
                "value": float(values.mean()),
                "stderr": clustered_stderr(values, patients),
            }
        )
    for a, b in (("null", "unconditional"), ("null", "labels")):
        gap = bpd[a] - bpd[b]
        rows.append(
            {
                "what": f"bound, {a} minus {b}",
                "value": float(gap.mean()),
                "stderr": clustered_stderr(gap, patients),
            }
        )
    drawn = {
        "null": sample(run, NUM, steps=T, seed=11).images,
        "unconditional": sample(free, NUM, steps=T, seed=12).images,
        "unconditional, again": sample(free, NUM, steps=T, seed=13).images,
    }
    for name in ("null", "unconditional, again"):
        for space, features in (
            ("8 PCA scores", lambda v: pca_features(v, *task.space, 8)),
            ("spectrum", spectrum_features),
        ):
            found = two_sample(features(drawn[name]), features(drawn["unconditional"]))
            rows.append(
                {
                    "what": f"classifier's AUC ({space}), samples: {name} against unconditional",
                    "value": found.value,
                    "stderr": found.stderr,
                }
            )
    return rows


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="the folder of the NIH images")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder of the three runs")
    return parser


def main() -> None:
    options = parser().parse_args()
    nih = {"data": "nih", "data_dir": options.data_dir}
    start = time.perf_counter()
    free = trained(options.work / "nih-unconditional", conditional=False, **nih)
    tasks = [
        Task(trained(options.work / "nih-conditional", **nih)),
        Task(trained(options.work / "phantom-conditional")),
    ]
    training = sum(record.training_seconds(run.metrics()) for run in (free, *(t.run for t in tasks)))
    start = time.perf_counter()
    tables: dict[str, list[dict[str, object]]] = {
        "classifiers": [],
        "brightness": [],
        "samples": [],
        "transfer": [],
    }
    for task in tasks:
        tables["classifiers"] += classifiers(task)
        tables["brightness"] += brightness(task)
        samples, transfer, shown = conditional(task)
        tables["samples"] += samples
        tables["transfer"] += transfer
        if task.data.name == "nih":
            provenance = task.run.provenance(
                steps=T,
                guidance=list(WEIGHTS),
                label=list(task.run.class_names),
                seed=0,
            )
            findings = np.eye(2, dtype=np.uint8)[np.tile(np.repeat([0, 1], 8), len(WEIGHTS))]
            path = record.RESULTS / "conditional-nih.png"
            provenance_.write_samples(
                path,
                images=shown,
                findings=findings,
                class_names=task.run.class_names,
                provenance=provenance,
            )
    tables["null"] = null_checks(tasks[0], free)
    seconds = training + time.perf_counter() - start
    record.experiment("conditional", config=tasks[0].run.config, seconds=seconds, results=tables)


if __name__ == "__main__":
    main()
