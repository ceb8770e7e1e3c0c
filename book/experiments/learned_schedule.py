"""What a learned noise schedule is good for: spread of the loss and of its gradient, and what training makes of it.

    python book/experiments/learned_schedule.py [--data-dir DIR]

On the phantom, and on NIH images where a folder is given, at 64x64 with small networks: trains with a linear, a cosine
and a learned schedule between the same ends, and with learned ends, three seeds each; looks at validation images once
at the end; measures, at fixed weights, the variance of a batch's loss and of its gradient under each schedule; and
times the training step. Writes book/results/learned-schedule.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import medvdm
import numpy as np
import optax
from medvdm import data
from medvdm.models import vdm
from medvdm.runs.config import RunConfig, change
from medvdm.theory import bound as bound_
from medvdm.theory import schedules
from medvdm.training.step import gradient, init_state, jit_step, optimiser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))
import record

SEEDS, TRAIN_IMAGES, VAL_IMAGES, DRAWS, BATCHES = 3, 512, 70, 32, 150
SMALL = medvdm.preset(
    "demo", image_size=64, conditional=False, encoder_width=64, decoder_width=64, inner_width=128,
    encoder_layers=1, decoder_layers=1, score_layers=2, steps=300, batch_size=32, learning_rate=2e-3, warmup_steps=50,
    ema_decay=0.0,
)  # fmt: skip
LEARNED = {
    "schedule": "monotonic",
    "schedule_objective": "variance",
    "schedule_rate": 25.0,
}
ARMS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"schedule": "fixed-cosine"},
    "learned": LEARNED,
    "learned, ends too": {**LEARNED, "learn_ends": True},
}
GRID = jnp.linspace(0.0, 1.0, 2049)  # on which a schedule is written down
start = time.perf_counter()


def settings(arm: str) -> RunConfig:
    config = change(SMALL, **ARMS[arm])
    return change(config, image_shape=(64, 64, 1))


@cache
def trainer(arm: str) -> Any:
    """A whole run as one compiled function of the seed's key and the images."""
    config = settings(arm)
    model, train = config.model, config.training
    graph = vdm.graph_of(model)
    optimise = optimiser(train, learned_schedule=schedules.KINDS[model.schedule].learned)

    @jax.jit
    def begin(key: jax.Array) -> vdm.Params:
        return vdm.split(vdm.VDM(model, rngs=nnx.Rngs(key)))[1]

    @jax.jit
    def run(params: vdm.Params, images: jax.Array, key: jax.Array) -> vdm.Params:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            rows = jax.random.choice(
                jax.random.fold_in(key, 1),
                len(images),
                (train.batch_size,),
                replace=False,
            )
            grads, _ = gradient(graph, train, params, images[rows], None, key)
            updates, state = optimise.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, train.steps)
        return jax.lax.scan(step, (params, optimise.init(params)), keys)[0][0]

    @jax.jit
    def bound(params: vdm.Params, images: jax.Array) -> jax.Array:
        """The bound of each image, bits per dimension, by the mean of its draws, which are the same for all arms."""
        model = vdm.merge(graph, params)
        keys = jax.random.split(jax.random.key(99), DRAWS)
        totals = jax.lax.map(lambda key: bound_.terms(model, images, key=key).total, keys)
        return bound_.bits_per_dim(totals.mean(axis=0), (64, 64, 1))

    return graph, begin, run, bound


class Swapped:
    """A model's networks with another schedule: what the diffusion loss asks for."""

    timesteps = 0

    def __init__(self, model: vdm.VDM, values: jax.Array):
        self.gamma = lambda t: jnp.interp(t, GRID, values)
        self.condition, self.eps_hat = model.condition, model.eps_hat


NETWORKS = vdm.graph_of(settings("linear").model)


@partial(jax.jit, static_argnames="stratified")
def spread(params: vdm.Params, images: jax.Array, values: jax.Array, *, stratified: bool) -> dict[str, jax.Array]:
    """Over random batches at fixed weights: the diffusion loss in nats per image and its gradient by the ScoreNet."""
    n = SMALL.training.batch_size

    def one(carry: Any, key: jax.Array) -> Any:
        key_rows, key_times, key_eps = jax.random.split(key, 3)
        x = images[jax.random.choice(key_rows, len(images), (n,), replace=False)]
        u = bound_.sample_times(key_times, n, stratified=stratified)

        def loss(score: vdm.Params) -> jax.Array:
            model = vdm.merge(NETWORKS, {**params, "score": score})
            f, label = model.encode(x), model.embed(None, n=n)
            return bound_.diffusion_loss(Swapped(model, values), f, label, u, key_eps).mean()

        value, grad = jax.value_and_grad(loss)(params["score"])
        total, squares = carry
        squares += sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grad))
        return (jax.tree.map(jnp.add, total, grad), squares), value

    begin = (jax.tree.map(jnp.zeros_like, params["score"]), jnp.zeros(()))
    (total, squares), losses = jax.lax.scan(one, begin, jax.random.split(jax.random.key(7), BATCHES))
    mean_square = sum(jnp.sum((leaf / BATCHES) ** 2) for leaf in jax.tree.leaves(total))
    return {
        "loss": losses.mean(),
        "loss_variance": losses.var(ddof=1),
        "gradient_variance": (squares - BATCHES * mean_square) / (BATCHES - 1),
    }


@jax.jit
def moments(params: vdm.Params, images: jax.Array, gammas: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E |eps - eps_hat|^2 and E |eps - eps_hat|^4 at some gammas, by one draw per image."""
    model = vdm.merge(NETWORKS, params)
    f, label = model.encode(images), model.embed(None, n=len(images))

    def at(gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = Swapped(model, jnp.full(len(GRID), gamma))  # one noise level, of any slope: 1/2 |.|^2 by the probe
        probe = bound_.Probe(jnp.zeros(len(images)), jnp.full(len(images), 2.0))
        squares = bound_.diffusion_loss(flat, f, label, jnp.full(len(images), 0.5), jax.random.key(8), probe)
        return squares.mean(), jnp.mean(squares**2)

    return jax.lax.map(at, gammas)


def best_shape(params: vdm.Params, images: jax.Array, *, stratified: bool) -> jax.Array:
    """The schedule of least variance for fixed weights, read off the errors: gamma' by the root is constant."""
    gammas = jnp.linspace(SMALL.model.gamma_min, SMALL.model.gamma_max, 56)
    mean, square = (np.asarray(v, np.float64) for v in moments(params, images, gammas))
    root = np.sqrt(square - mean**2 if stratified else square)
    reached = np.concatenate([[0.0], np.cumsum(root[1:] + root[:-1])])
    return jnp.interp(GRID, jnp.asarray(reached / reached[-1], jnp.float32), gammas)


def values_of(arm: str, params: vdm.Params) -> jax.Array:
    return vdm.merge(trainer(arm)[0], params).gamma(GRID)


def networks_of(params: vdm.Params) -> vdm.Params:
    return {name: part for name, part in params.items() if name != "schedule"}


def spreads_of(source: str, train: jax.Array, weights: dict[str, Any]) -> list[dict[str, Any]]:
    """The spread of loss and gradient under each schedule, at the weights before and after training."""
    spreads = []
    for name, networks in (
        ("before training", weights["linear"][0]),
        ("trained with linear", weights["linear"][1]),
        ("trained with learned", weights["learned"][1]),
    ):
        networks = networks_of(networks)
        for stratified in (True, False):
            curves = {arm: values_of(arm, weights[arm][1]) for arm in ("linear", "cosine", "learned")}
            curves["read off"] = best_shape(networks, train, stratified=stratified)
            for arm, values in curves.items():
                found = spread(networks, train, values, stratified=stratified)
                spreads.append(
                    {
                        "data": source,
                        "weights": name,
                        "stratified": stratified,
                        "schedule": arm,
                    }
                    | {key: float(value) for key, value in found.items()}
                )
        record.say(source, "spread", name)
    return spreads


def study(source: str, folder: str | None) -> dict[str, list[dict[str, Any]]]:
    """All tables for one source of images."""
    wanted = data.DataConfig(
        data=source,
        data_dir=folder,
        image_size=64,
        **({} if folder else {"num_images": 740}),
    )
    images = data.load(wanted)
    train = jnp.asarray(images.read(images.indices("train")[:TRAIN_IMAGES]))
    rows = images.indices("val")[:VAL_IMAGES]
    held_out = jnp.asarray(images.read(rows))
    patients = np.unique(np.asarray(images.patients)[rows]).size
    record.say(
        source,
        len(train),
        "training images,",
        len(rows),
        "validation images of",
        patients,
        "patients",
    )
    finals, weights = [], {}
    for arm in ARMS:
        graph, begin, run, bound = trainer(arm)
        for seed in range(SEEDS):
            first = begin(jax.random.key(seed))
            params = run(first, train, jax.random.key(100 + seed))
            total = float(bound(params, held_out).mean())
            ends = vdm.merge(graph, params).gamma(jnp.array([0.0, 1.0]))
            finals.append(
                {"data": source, "schedule": arm, "seed": seed, "total_bpd": round(total, 5)}
                | {"gamma_0": float(ends[0]), "gamma_1": float(ends[1])}
            )
            record.say(source, arm, seed, f"{total:.5f} bits per pixel, ends {ends}")
            if seed == 0:
                weights[arm] = first, params
    at = values_of("learned", weights["learned"][1])[:: (len(GRID) - 1) // 64]
    shapes = [{"data": source, "schedule": "learned", "t": i / 64, "gamma": float(value)} for i, value in enumerate(at)]
    spreads = spreads_of(source, train, weights)
    return {"finals": finals, "shapes": shapes, "spreads": spreads}


def overhead(name: str, config: RunConfig, repeats: int) -> dict[str, Any]:
    """CPU time of the step with a learned schedule over that with the linear one: median and quartiles of the pairs."""
    config = change(config, image_shape=(config.data.image_size or 64,) * 2 + (1,), steps=1000)
    x = jax.random.uniform(jax.random.key(0), (config.training.batch_size, *config.model.image_shape))
    steps, states, times = [], [], []
    for changes in ({}, LEARNED):
        now = change(config, **changes)
        steps.append(jit_step(now.model, now.training))
        states.append(jax.jit(partial(init_state, now.model, now.training))())
    for repeat in range(repeats + 2):
        taken = [0.0, 0.0]
        for which in ((0, 1), (1, 0))[repeat % 2]:
            begin = time.process_time()
            states[which], metrics = steps[which](states[which], x, None)
            jax.block_until_ready((states[which], metrics))
            taken[which] = time.process_time() - begin
        times.append(taken)
    linear, learned = np.asarray(times[2:]).T
    low, ratio, high = (float(np.quantile(learned / linear, share)) for share in (0.25, 0.5, 0.75))
    row = {
        "preset": name, "batch_size": config.training.batch_size, "image_size": config.model.image_shape[0],
        "linear_ms": 1e3 * float(np.median(linear)), "learned_ms": 1e3 * float(np.median(learned)),
        "ratio": ratio, "low": low, "high": high, "repeats": repeats,
    }  # fmt: skip
    record.say("overhead", row)
    return row


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", help="folder of NIH ChestX-ray images; without it, phantoms only")
    return options


def main() -> None:
    folder = parser().parse_args().data_dir
    tables: dict[str, list[Any]] = {"finals": [], "shapes": [], "spreads": []}
    for source, place in (("phantom", None), *((("nih", folder),) if folder else ())):
        for name, rows in study(source, place).items():
            tables[name] += rows
    tables["overhead"] = [
        overhead("demo", medvdm.preset("demo", conditional=False, image_size=64), 60),
        overhead("paper", medvdm.preset("paper", batch_size=16), 24),
    ]
    record.experiment(
        "learned-schedule",
        config=change(SMALL, **LEARNED),
        seconds=time.perf_counter() - start,
        results=tables,
    )


if __name__ == "__main__":
    main()
