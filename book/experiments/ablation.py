"""What makes the bound better, one change at a time: same images, same training time, three seeds.

    python book/experiments/ablation.py --data-dir DIR

NIH images at 64 x 64. Two starting points, small networks of the paper's kind and the linear-start model, and changes
of one setting each. Every row may train for as much processor time as the first one takes for STEPS steps: before its
turn, its step and the first row's are timed alternately, and what the measuring of components takes is taken off.
Everything is judged on validation patients, five times during training and at the end. The test patients are looked at
once, for a few rows named in advance. Without --data-dir the images are phantoms.

In `validation`, `change` is the difference to the first row on the same images, mean over seeds, and `change_se` its
standard error, with the variance between patients (clustered) and that between seeds added. `best_look` is the share of
the training time at which the bound on validation images was best: below 1, stopping early would have paid.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record  # noqa: E402
from medvdm import data
from medvdm.evaluation import baselines
from medvdm.evaluation import held_out as held_out_
from medvdm.evaluation.statistics import clustered_stderr
from medvdm.models import vdm
from medvdm.runs import config
from medvdm.runs.config import RunConfig  # noqa: E402
from medvdm.runs.fit import fill_in, first_state
from medvdm.runs.presets import preset
from medvdm.theory import bound, schedules  # noqa: E402
from medvdm.training import augmentation
from medvdm.training.devices import Layout  # noqa: E402
from medvdm.training.step import augmentations, gradient, optimiser

STEPS, CHUNK, LOOKS, DRAWS, SEEDS = 600, 20, 5, 4, (0, 1, 2)
SIZES = (
    "latent embedding_dim encoder_width decoder_width inner_width encoder_layers decoder_layers score_layers".split()
)
SMALL = {name: config.flat(preset("demo"))[name] for name in SIZES}  # the paper's kind of networks, small
AUGMENT = {"augment_shift": 0.03, "augment_size": 0.05}
FIRST = "residual networks"
COPIED = "components copied into the layers"
RESIDUAL: dict[str, dict[str, Any]] = {
    FIRST: {},
    "batch 4": {"batch_size": 4},
    "batch 64": {"batch_size": 64},
    "latent 8": {"latent": 8},
    "latent 128": {"latent": 128},
    "ends learned by the bound": {"schedule": "learned-linear"},
    "learning rate x 4": {"learning_rate": 3.2e-3},
    "learning rate / 4": {"learning_rate": 2e-4},
    "weight decay 0.1": {"weight_decay": 0.1},
    "moving average 0.99": {"ema_decay": 0.99},
    "augmentation": AUGMENT,
    "gradient difference, weight 1": {"gradient_difference_weight": 1.0},
    COPIED: {},
    f"{COPIED}, rate 6e-5, clipped": {"learning_rate": 6e-5, "clip_norm": 1.0},
}
PLAIN = {"augment_shift": 0.0, "augment_size": 0.0, "basis_copies": 0}
LINEAR: dict[str, dict[str, Any]] = {
    "linear start, no augmentation": PLAIN,
    "linear start": {},
    "linear start, not trained": {"learning_rate": 0.0},
}
KEPT = ("excess_bpd", "over_lingauss_bpd", "over_lingauss_bpd_stderr", "rate_bits_per_image", "psnr_db", "ssim")
FINAL = (FIRST, "augmentation", "linear start")


def settings(name: str, seed: int, folder: str | None) -> RunConfig:
    """The config of a row of the table."""
    where = {"data": "nih", "data_dir": folder} if folder else {"num_images": 800}
    common = {"image_size": 64, "batch_size": 16, "steps": STEPS, "seed": seed, "warmup_steps": 50, **where}
    if name in LINEAR:
        return preset("linear-start", **{**common, "latent": 96, **LINEAR[name]})
    return preset("paper", **{**common, **SMALL, **RESIDUAL[name]})


def copied(params: vdm.Params, asked: RunConfig, fitted: baselines.Baselines) -> vdm.Params:
    """The paper's kind of networks with the principal components copied into the first and last layers.

    The blocks start as the identity, so the encoding is the scores on the components, in a unit in which the noise at
    t = 0 is that of the preset `linear-start`; the logits are the mean image's and a linear change.
    """
    k, gamma_0 = asked.model.latent, preset("linear-start").model.gamma_min
    unit = math.exp(0.5 * (gamma_0 - asked.model.gamma_min))
    mean, components, variances = fitted.mean, fitted.components[:k], fitted.variances[:k]
    shrink = variances / (variances + math.exp(gamma_0))
    gray = np.clip(mean, 0.02, 0.98)
    encoder, decoder = (jax.tree.map(np.array, params[part]) for part in ("encoder", "decoder"))
    encoder["enter"]["kernel"][:, :k] = components.T / (2 * unit)  # the encoder sees 2 x - 1
    encoder["enter"]["bias"][:k] = components @ (0.5 - mean) / unit
    encoder["leave"]["kernel"][:] = np.eye(*encoder["leave"]["kernel"].shape)
    decoder["enter"]["kernel"][:] = np.eye(*decoder["enter"]["kernel"].shape)
    decoder["leave"]["kernel"][:] = 0.0
    decoder["leave"]["kernel"][:k] = unit * shrink[:, None] * components / (gray * (1 - gray))
    decoder["leave"]["bias"][:] = np.log(gray) - np.log1p(-gray)
    return params | jax.tree.map(jnp.asarray, {"encoder": encoder, "decoder": decoder})


def trainer(asked: RunConfig) -> Any:
    """CHUNK training steps as one compiled function of the state, all images and the keys of the steps."""
    return _trainer(config.change(asked, seed=0))  # the seed is in the keys only


@cache
def _trainer(asked: RunConfig) -> Any:
    model, train = asked.model, asked.training
    graph = vdm.graph_of(model)
    optimise = optimiser(train, learned_schedule=schedules.KINDS[model.schedule].learned)

    def step(carry: Any, key: jax.Array, images: jax.Array) -> Any:
        params, opt_state, ema = carry
        key_rows, key_augment, key_bound = jax.random.split(key, 3)
        rows = jax.random.choice(key_rows, len(images), (train.batch_size,), replace=False)
        x = augmentation.augment(key_augment, images[rows], **augmentations(train))
        trained, measured = vdm.partition(graph, params)
        grads, _ = gradient(graph, train, params, x, None, key_bound)
        updates, opt_state = optimise.update(grads, opt_state, trained)
        params = vdm.join(optax.apply_updates(trained, updates), measured)
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - train.ema_decay)
        return (params, opt_state, ema), None

    @jax.jit
    def chunk(state: Any, images: jax.Array, keys: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, key: step(carry, key, images), state, keys)[0]

    return chunk


def compare(pairs: list[tuple[RunConfig, Any]], images: jax.Array, repeats: int = 5) -> list[float]:
    """Median processor seconds of a step of each config, their chunks taking turns; the first, which compiles, is left
    out. Processor time, unlike the wall's, does not count what else the machine does."""
    keys, times = jax.random.split(jax.random.key(9), CHUNK), []
    for _ in range(repeats + 1):
        times.append([])
        for asked, state in pairs:
            begin = time.process_time()
            jax.block_until_ready(trainer(asked)(state, images, keys))
            times[-1].append((time.process_time() - begin) / CHUNK)
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def start(name: str, asked: RunConfig, images: data.ImageData, fitted: baselines.Baselines) -> tuple[Any, float]:
    """The state at step 0 (parameters, optimiser, average), and the seconds that measuring components took."""
    state, prepared = first_state(asked, images, Layout(1)), 0.0
    if name in LINEAR:
        begin = time.process_time()  # what was compiled above is there now
        state = jax.block_until_ready(first_state(asked, images, Layout(1)))
        prepared = time.process_time() - begin
    params = state.params
    if name.startswith(COPIED):
        params = copied(params, asked, fitted)
    return (params, state.opt_state, params if asked.training.ema_decay else None), prepared


def train(
    name: str, asked: RunConfig, first: Any, images: jax.Array, held_out: data.ImageData
) -> tuple[vdm.Params, list[float]]:
    """Train for the config's steps; the weights to be judged, and the bound on validation images at each look."""
    key, chunks, looks = jax.random.key(asked.training.seed), asked.training.steps // CHUNK, []
    at = {round(chunks * (i + 1) / LOOKS) for i in range(LOOKS)}
    state, graph, rows = first, vdm.graph_of(asked.model), held_out.indices("val")
    for number in range(chunks):
        state = trainer(asked)(state, images, jax.random.split(jax.random.fold_in(key, number), CHUNK))
        if number + 1 in at:
            params = state[0] if state[2] is None else state[2]
            looks.append(held_out_.quick(graph, params, held_out, rows, batch_size=32, labelled=False)["vlb_bpd"])
    return params, looks


def totals(asked: RunConfig, params: vdm.Params, x: np.ndarray) -> np.ndarray:
    """The bound of each image in bits per dimension, the mean of the same draws in every row."""
    draws = held_out_.bound_terms(vdm.graph_of(asked.model), params, x, None, draws=DRAWS, key=jax.random.key(5))
    return bound.bits_per_dim(draws.total.mean(axis=0), asked.model.image_shape)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    return parser


def main() -> None:
    folder, begin = parser().parse_args().data_dir, time.perf_counter()
    images = data.load(settings(FIRST, 0, folder).data)
    x_train, x_val = (images.read(images.indices(split)) for split in ("train", "val"))
    patients = np.asarray(images.patients)[images.indices("val")]
    fitted = baselines.fit(x_train, x_val)
    on_device = jnp.asarray(x_train)

    def filled(name: str, seed: int, **changes: Any) -> RunConfig:
        return fill_in(config.change(settings(name, seed, folder), **changes), images)

    base = filled(FIRST, 0)
    base_state, _ = start(FIRST, base, images, fitted)
    rows, final, of_first = [], [], np.zeros(0)
    for name in [*RESIDUAL, *LINEAR]:
        asked = filled(name, 0)
        state, prepared = start(name, asked, images, fitted)
        of_base, of_row = compare([(base, base_state), (asked, state)], on_device)
        steps = max(CHUNK, CHUNK * round((STEPS * of_base - prepared) / of_row / CHUNK))
        steps = STEPS if name == FIRST else CHUNK if asked.training.learning_rate == 0 else steps
        bounds, results, looks = [], [], []
        for seed in SEEDS:
            asked = filled(name, seed, steps=steps)
            params, seen = train(name, asked, start(name, asked, images, fitted)[0], on_device, images)
            bounds.append(totals(asked, params, x_val))
            looks.append(seen)
            for split in ("val", "test") if name in FINAL else ("val",):
                result = held_out_.evaluate_weights(
                    vdm.graph_of(asked.model), params, images, split, baselines=fitted, draws=DRAWS
                )
                if split == "val":
                    results.append(result)
                else:
                    final.append({"name": name, "seed": seed} | {k: result[k] for k in KEPT})
        of_row_images = np.mean(bounds, axis=0)
        of_first = of_row_images if name == FIRST else of_first
        excess = np.array([r["excess_bpd"] for r in results])
        between = excess.var(ddof=1) / len(SEEDS) + (np.square(rows[0]["excess_sd"]) / len(SEEDS) if rows else 0.0)
        change = of_row_images - of_first
        average = {k: float(np.mean([r[k] for r in results])) for k in ("over_lingauss_bpd", "rate_bits_per_image")}
        rows.append(
            {
                "name": name,
                "steps": steps,
                "step_over_first": of_row / of_base,
                "preparation_steps": prepared / of_base,
                "excess": float(excess.mean()),
                "excess_sd": float(excess.std(ddof=1)),
                "change": float(change.mean()),
                "change_se": 0.0 if name == FIRST else math.sqrt(clustered_stderr(change, patients) ** 2 + between),
                "best_look": float(np.mean([(1 + int(np.argmin(seen))) / LOOKS for seen in looks])),
                "over_lingauss": average["over_lingauss_bpd"],
                "rate": average["rate_bits_per_image"],
                "psnr": float(np.mean([r["psnr_db"] for r in results])),
                "ssim": float(np.mean([r["ssim"] for r in results])),
            }
        )
        record.say(rows[-1])
    record.experiment(
        "ablation",
        config=settings("linear start", 0, None),
        seconds=time.perf_counter() - begin,
        results={"data": images.name, "steps": STEPS, "validation": rows, "test": final},
    )


if __name__ == "__main__":
    main()
