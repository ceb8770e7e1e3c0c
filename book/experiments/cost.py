"""What a training step and a sample of the paper's model cost: time, memory, and the roofline beside them.

    python book/experiments/cost.py [--dtype bfloat16] [--tiny]     writes book/results/cost.json

Every row is measured in a process of its own, so that its peak memory is its own. Images are random gray values: the
time of a step does not depend on them. Times are the least of several calls, medians beside them. The ceilings (a
streamed sum, a large matrix product) are measured in the same run, before, between and after. Rows that are done are
kept in the system's folder for temporary files until the record is written, so a run that was stopped goes on; --only
KIND measures the rows of one kind and stops there. On a GPU the same rows are measured, with the device's own peak of
memory; the fake devices stay on the CPU, because they check numbers and not speed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))

SIZES, LATENTS, BATCHES, DEVICES = (
    (32, 64, 128, 256, 512),
    (8, 64, 512),
    (1, 4, 16, 64),
    (1, 2, 4, 8),
)
SECONDS = 0.6  # about how long a row's timed calls take together
TINY = {
    "embedding_dim": 16,
    "inner_width": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "score_layers": 1,
}


def rows(tiny: bool) -> list[tuple[str, dict[str, int]]]:
    """Everything that is measured, in order: kind and settings."""
    sizes, batches = ((16, 32), (1, 4)) if tiny else (SIZES, BATCHES)
    middle, batch = (32, 4) if tiny else (128, 16)
    grid = [(size, 64, b) for b in (batch, batches[0]) for size in sizes]
    grid += [(middle, latent, batch) for latent in LATENTS if latent != 64]
    grid += [(middle, 64, b) for b in batches]
    steps = [dict(zip(("image_size", "latent", "batch"), row, strict=True)) for row in dict.fromkeys(grid)]
    grid = [(middle, latent, batch) for latent in LATENTS] + [(middle, 64, batches[0])]
    samples = [dict(zip(("image_size", "latent", "batch"), row, strict=True)) for row in dict.fromkeys(grid)]
    return [
        ("ceilings", {"turn": 0}),
        *[("step", row) for row in steps],
        ("ceilings", {"turn": 1}),
        *[("sample", row) for row in samples],
        ("parts", {"image_size": sizes[-2], "latent": 64, "batch": batch}),
        ("ceilings", {"turn": 2}),
        *[("devices", {"devices": n}) for n in DEVICES],
    ]


# --- What each process does ----------------------------------------------------------------------------------------


def settings(row: dict[str, Any]) -> Any:
    """The paper's preset with the size, latent and batch of a row."""
    import medvdm
    from medvdm.runs import config as config_

    small = TINY if row["tiny"] else {}
    size = row["image_size"]
    config = medvdm.preset(
        "paper",
        latent=row["latent"],
        batch_size=row["batch"],
        dtype=row["dtype"],
        **small,
    )
    return config_.change(config, image_size=size, image_shape=(size, size, 1))


def filled(shapes: Any) -> Any:
    """Small random numbers for every array of parameters, and zeros for counters: values do not change the time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def fill(shape: Any) -> Any:
        if shape.ndim == 0:
            return jnp.zeros(shape.shape, shape.dtype)
        return jnp.array(0.02 * rng.random(shape.shape, np.float32))

    return jax.tree.map(fill, shapes)


def timed(call: Any, least: int = 3, most: int = 40) -> dict[str, float]:
    """Milliseconds of a call, the least and the median of as many as fit into SECONDS."""
    import jax

    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < least or (sum(times) < SECONDS and len(times) < most):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return {
        "ms": min(times) * 1e3,
        "median_ms": statistics.median(times) * 1e3,
        "calls": len(times),
    }


def peak_gib() -> float:
    """The most memory that this process has held: of the device, or of the process on a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 2**30


def step(row: dict[str, Any]) -> dict[str, Any]:
    """A training step."""
    import jax
    import numpy as np
    from medvdm.cost import roofline
    from medvdm.training.step import init_state, jit_step

    config = settings(row)
    model, recipe = config.model, config.training
    jax.block_until_ready(jax.numpy.zeros(()))
    empty = peak_gib()
    shapes = jax.eval_shape(lambda: init_state(model, recipe))
    images = np.random.default_rng(0).random((recipe.batch_size, *model.image_shape), np.float32)
    program = jit_step(model, recipe)
    compiled = program.lower(shapes, images, None).compile()
    state = filled(shapes)
    images = jax.device_put(images)

    def call() -> Any:
        nonlocal state
        state, _ = compiled(state, images, None, program.plan)
        return state

    time_ = timed(call)
    found = roofline.xla(compiled)
    return {
        "parameters": roofline.parameters(model),
        **time_,
        "peak_gib": peak_gib(),
        "empty_gib": empty,
        "xla_memory_gib": found["memory"] / 2**30,
        "xla_gigaflops": found["flops"] / 1e9,
        "xla_gigabytes": found["bytes"] / 1e9,
    }


def parts(row: dict[str, Any]) -> dict[str, Any]:
    """The gradient and the optimiser of a step, each compiled alone."""
    import jax
    import optax
    from medvdm.models import vdm
    from medvdm.training import step as step_
    from medvdm.training.step import init_state, loss_fn

    config = settings(row)
    model, recipe = config.model, config.training
    graph, optimiser = vdm.graph_of(model), step_.optimiser(recipe)
    state = filled(jax.eval_shape(lambda: init_state(model, recipe)))
    images = jax.random.uniform(jax.random.key(0), (recipe.batch_size, *model.image_shape))

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return loss_fn(vdm.merge(graph, params), recipe, images, None, jax.random.key(1))[0]

        return jax.grad(loss)(params)

    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    update = jax.jit(update, donate_argnums=(0, 1))
    first = timed(lambda: gradient(state.params))
    grads, held = gradient(state.params), (state.params, state.opt_state)

    def call() -> Any:
        nonlocal held
        held = update(*held, grads)
        return held

    second = timed(call)
    return {"gradient_ms": first["ms"], "optimiser_ms": second["ms"]}


def sample(row: dict[str, Any]) -> dict[str, Any]:
    """Samples: one of 250 steps, and what one step adds."""
    import jax
    from medvdm.models import vdm
    from medvdm.models.generate import generate

    model = settings(row).model
    graph = vdm.graph_of(model)
    params = filled(jax.eval_shape(lambda: vdm.new_params(model, 0)))

    def draw(steps: int) -> Any:
        size = row["batch"]
        return lambda: generate(graph, params, num=size, steps=steps, batch_size=size).images

    long, short = timed(draw(250)), timed(draw(50))
    return {
        "ms": long["ms"],
        "median_ms": long["median_ms"],
        "ancestral_ms": (long["ms"] - short["ms"]) / 200,
    }


def ceilings(row: dict[str, Any]) -> dict[str, Any]:
    """The ceilings, and how well products with few rows reach them."""
    import jax
    import jax.numpy as jnp
    from medvdm.cost import roofline

    limits = roofline.ceilings(dtype=row["dtype"], **({"side": 256, "numbers": 2**20} if row["tiny"] else {}))
    side, out = 256 if row["tiny"] else 4096, {}
    weights = jnp.full((side, side), 1e-3)
    product = jax.jit(jnp.matmul)
    for b in (1, 4, 16, 64, 256):
        out[f"product_{b}_ms"] = timed(lambda b=b: product(jnp.ones((b, side)), weights), most=15)["ms"]
    return {**vars(limits), "product_side": side, **out}


def devices(row: dict[str, Any]) -> dict[str, Any]:
    """The loss and the gradient's norm of one batch of 16 on several devices; the gradient goes to a file."""
    import jax
    import medvdm
    import numpy as np
    from jax.flatten_util import ravel_pytree
    from medvdm.models import vdm
    from medvdm.training.devices import Layout
    from medvdm.training.step import loss_fn

    config = medvdm.preset("demo", image_size=32, batch_size=16, image_shape=(32, 32, 1), classes=2)
    model, recipe, graph = config.model, config.training, vdm.graph_of(config.model)
    layout, rng = Layout(recipe.batch_size), np.random.default_rng(0)
    images = layout.put(rng.random((recipe.batch_size, *model.image_shape), np.float32))
    labels = layout.put(np.eye(2, dtype=np.float32)[rng.integers(0, 2, recipe.batch_size)])
    # Zero-initialised layers would hide the gradients of those before them, so every weight is moved a little.
    flat, back = ravel_pytree(vdm.init(model, 0))
    moved = back(flat + 0.02 * jax.random.normal(jax.random.key(2), flat.shape))
    params = jax.device_put(moved, layout.replicated)

    def loss(params: Any) -> Any:
        return loss_fn(vdm.merge(graph, params), recipe, images, labels, jax.random.key(1))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    flat = np.asarray(ravel_pytree(jax.device_get(grads))[0])
    np.save(row["file"], flat)
    return {
        "used": layout.count,
        "loss_bpd": float(value),
        "gradient_norm": float(np.linalg.norm(flat)),
    }


# --- The processes, and the record ---------------------------------------------------------------------------------


def child(kind: str, row: dict[str, Any], work: Path) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as `medvdm train` does on Linux
    if kind == "devices":
        row = {**row, "file": str(work / f"gradient-{row['devices']}.npy")}
        environment |= {
            "JAX_NUM_CPU_DEVICES": str(row["devices"]),
            "JAX_PLATFORMS": "cpu",
        }
    command = [sys.executable, __file__, "--child", kind, json.dumps(row)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def differences(found: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The fake devices' rows, with their distance from one device."""
    import numpy as np

    one = np.load(work / "gradient-1.npy")
    for row in found:
        other = np.load(work / f"gradient-{row['devices']}.npy")
        row["loss_difference"] = abs(row["loss_bpd"] - found[0]["loss_bpd"]) / found[0]["loss_bpd"]
        row["gradient_difference"] = float(np.linalg.norm(other - one) / np.linalg.norm(one))
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the arithmetic; bfloat16 is for accelerators",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny model and few rows, to try the script",
    )
    parser.add_argument("--only", help="measure the rows of one kind and stop")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.child:
        kind, row = options.child
        print(json.dumps(globals()[kind](json.loads(row))))
        return

    name = "cost" + ("-tiny" if options.tiny else "") + ("" if options.dtype == "float32" else f"-{options.dtype}")
    work = Path(tempfile.gettempdir()) / f"medvdm-{name}"
    work.mkdir(exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seconds = 0.0
    for kind, row in rows(options.tiny):
        if options.only not in (None, kind):
            continue
        kept = work / f"{kind}-{'-'.join(map(str, row.values()))}.json"
        if not kept.exists():
            begin = time.perf_counter()
            result = child(kind, {**row, "tiny": options.tiny, "dtype": options.dtype}, work)
            result |= {"seconds": time.perf_counter() - begin, "cores": cores, "load": os.getloadavg()[0]}
            kept.write_text(json.dumps(result))
            print(kind, row, result, file=sys.stderr)
        result = json.loads(kept.read_text())
        seconds += result.pop("seconds")
        tables.setdefault(kind, []).append({**row, **result})
    if options.only:
        return

    import jax
    import medvdm
    import record

    tables["devices"] = differences(tables["devices"], work)
    timed_rows = [row for kind in ("ceilings", "step", "sample", "parts") for row in tables[kind]]
    tables["machine"] = [
        {
            "backend": jax.default_backend(),
            "dtype": options.dtype,
            "cores": max(row["cores"] for row in timed_rows),
            "load_first": timed_rows[0]["load"],
            "load_last": timed_rows[-1]["load"],
        }
    ]
    config = medvdm.preset("paper", image_size=128, batch_size=16, dtype=options.dtype)
    record.experiment(name, config=config, seconds=seconds, results=tables)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
