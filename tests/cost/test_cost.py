"""The hand count of a step against XLA's own, the closed form of the parameters against the model, and bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from helpers import refused, said
from jax.flatten_util import ravel_pytree

import medvdm
from medvdm.cli.tables import benchmark_table
from medvdm.cost import benchmark, plain, roofline
from medvdm.errors import InputError
from medvdm.models import vdm
from medvdm.training import step
from medvdm.training.step import TrainConfig, TrainState, init_state, jit_step, make_step

LIMITS = roofline.Ceilings(bytes_per_second=1e10, flops_per_second=4e11)
MODEL = vdm.VDMConfig(
    image_shape=(32, 32, 1),
    latent=16,
    embedding_dim=32,
    encoder_width=128,
    decoder_width=128,
    inner_width=256,
    encoder_layers=1,
    decoder_layers=1,
    score_layers=1,
)

LINEAR_START = replace(MODEL, architecture="linear-start")


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        vdm.VDMConfig(),
        replace(medvdm.preset("demo").model, image_shape=(28, 20, 3), classes=5),
        replace(MODEL, encoder_layers=0, decoder_layers=3, score_layers=2, latent=7),
    ],
)
def test_parameters_by_hand_are_those_of_the_model(model: vdm.VDMConfig) -> None:
    assert roofline.parameters(model) == vdm.count(jax.eval_shape(lambda: vdm.new_params(model, 0)))


def compiled_update(config: TrainConfig, side: int = 512) -> Any:
    """The optimiser alone, on one matrix."""
    optimiser = step.optimiser(config)
    p = jax.ShapeDtypeStruct((side, side), jnp.float32)

    def update(p: Any, state: Any, g: Any, ema: Any) -> Any:
        updates, state = optimiser.update(g, state, p)
        p = optax.apply_updates(p, updates)
        return p, state, optax.incremental_update(p, ema, 0.1) if config.ema_decay else ema

    ema = p if config.ema_decay else None
    return jax.jit(update, donate_argnums=(0, 1, 3)).lower(p, jax.eval_shape(optimiser.init, p), p, ema).compile()


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}])
def test_bytes_of_the_optimiser_are_those_that_xla_counts(settings: dict[str, float]) -> None:
    """One pass is the least; XLA makes as many as the hand count without fusion says, or fewer in another version."""
    config = TrainConfig(**settings)
    found = roofline.xla(compiled_update(config))["bytes"] / (4 * 512**2)
    least, unfused = (roofline.optimiser_numbers(config, fused=fused) for fused in (True, False))
    assert 0.99 * least < found < 1.01 * unfused


def test_operations_of_the_optimiser_are_those_that_xla_counts() -> None:
    found = roofline.xla(compiled_update(TrainConfig()))["flops"] / 512**2
    assert found == pytest.approx(roofline.ADAMW_OPERATIONS, rel=0.35)


@pytest.mark.parametrize("batch", [1, 32])
def test_work_of_a_step_by_hand_agrees_with_xla(batch: int) -> None:
    """Operations to 15 % (XLA also counts the element-wise ones); its bytes within a factor 2.5 above the least."""
    config = TrainConfig(batch_size=batch)
    images = jax.ShapeDtypeStruct((batch, *MODEL.image_shape), jnp.float32)
    state = jax.eval_shape(lambda: init_state(MODEL, config))
    found = roofline.xla(jit_step(MODEL, config).lower(state, images, None).compile())
    work = roofline.step_work(MODEL, config)
    flops, moved = sum(p.flops for p in work), sum(p.bytes for p in work)
    assert flops < found["flops"] < 1.15 * flops
    assert moved < found["bytes"] < 2.5 * moved
    # In place: parameters, two moments, and less than two gradients beside them (activations are small here).
    assert 12 < found["memory"] / roofline.parameters(MODEL) < 22


def test_bytes_of_adamw_are_28_a_parameter() -> None:
    *_, optimiser = roofline.step_work(MODEL, TrainConfig())
    count = vdm.count(jax.eval_shape(lambda: vdm.new_params(MODEL, 0)))
    assert optimiser.bytes == 28 * count
    *_, unfused = roofline.step_work(MODEL, TrainConfig(), fused=False)
    assert unfused.bytes == 40 * count and unfused.flops == optimiser.flops
    extras = TrainConfig(clip_norm=1.0, ema_decay=0.9)
    assert roofline.optimiser_numbers(extras) == 10 and roofline.optimiser_numbers(extras, fused=False) == 18


def test_work_is_affine_in_the_batch_and_the_optimiser_does_not_depend_on_it() -> None:
    one, two, four = (roofline.step_work(MODEL, TrainConfig(batch_size=b)) for b in (1, 2, 4))
    assert one[2] == four[2]
    for phase in (0, 1):
        assert four[phase].flops == pytest.approx(4 * one[phase].flops)
        slope = two[phase].bytes - one[phase].bytes
        assert four[phase].bytes == pytest.approx(one[phase].bytes + 3 * slope) and slope > 0


def test_activations_of_half_the_width_move_half_the_bytes() -> None:
    wide, narrow = (
        [roofline.step_work(replace(MODEL, dtype=dtype), TrainConfig(batch_size=b))[1].bytes for b in (1, 2)]
        for dtype in ("float32", "bfloat16")
    )
    assert wide[1] - wide[0] == pytest.approx(2 * (narrow[1] - narrow[0]))


def test_a_phase_waits_for_the_slower_of_memory_and_arithmetic() -> None:
    streaming = roofline.Phase(name="a", flops=1.0, bytes=1e10)
    product = roofline.Phase(name="b", flops=8e11, bytes=1.0)
    assert streaming.seconds(LIMITS) == pytest.approx(1) and streaming.bound(LIMITS) == "memory"
    assert product.seconds(LIMITS) == pytest.approx(2) and product.bound(LIMITS) == "arithmetic"
    assert roofline.seconds([streaming, product], LIMITS) == pytest.approx(3)


def test_the_forward_pass_changes_its_bound_at_the_knee() -> None:
    """With activations left out, that is: they move it up, less in a model whose layers are wide."""
    assert LIMITS.knee == pytest.approx(80)
    bound = {b: roofline.step_work(vdm.VDMConfig(), TrainConfig(batch_size=b))[0].bound(LIMITS) for b in (1, 79, 200)}
    assert bound == {1: "memory", 79: "memory", 200: "arithmetic"}


def test_work_of_samples() -> None:
    one, decoder = roofline.sample_work(MODEL, num=1, steps=10)
    many, _ = roofline.sample_work(MODEL, num=3, steps=10)
    twice, same = roofline.sample_work(MODEL, num=1, steps=20)
    score = 2 * 16 * 32 + 2 * 32 * 256
    assert many.flops - one.flops == 2 * 10 * 2 * score and many.bytes == one.bytes
    assert twice.flops == 2 * one.flops and same == decoder
    assert decoder.flops == 2 * (16 * 128 + 2 * 128 * 256 + 128 * 1024)


def test_work_of_one_sample_by_hand() -> None:
    """Every layer of a model small enough to be written out, the conditions of each step included."""
    model = vdm.VDMConfig(
        image_shape=(2, 3, 1), latent=2, embedding_dim=4, decoder_width=5, inner_width=7, decoder_layers=1,
        score_layers=2,
    )  # fmt: skip
    mix, films = 8 * 16 + 16 * 16 + 16 * 4, 2 * (4 * 14)
    score = 2 * 4 + 2 * (4 * 7 + 7 * 4) + 4 * 2
    decode = 2 * 5 + (5 * 7 + 7 * 5) + 5 * 6
    chain, decoder = roofline.sample_work(model, num=1, steps=3)
    assert chain.flops == 2 * 3 * (mix + films + score) and chain.bytes == 4 * 3 * (mix + films + score)
    assert decoder.flops == 2 * decode and decoder.bytes == 4 * (decode + 6)


def test_measured_ceilings_and_the_report_can_be_written_as_json() -> None:
    limits = roofline.ceilings(side=64, numbers=2**12, repeats=1)
    assert 0 < limits.bytes_per_second < math.inf and 0 < limits.flops_per_second < math.inf
    table = roofline.report(MODEL, TrainConfig(batch_size=4), LIMITS)
    assert [p["phase"] for p in table["phases"]] == ["forward", "backward", "optimiser"]
    assert table["roofline_ms"] == pytest.approx(sum(p["milliseconds"] for p in table["phases"]), abs=1e-3)
    assert table["unfused_ms"] > table["roofline_ms"] and table["knee_batch"] == 80
    assert table["phases"][2]["bound"] == "memory" and "xla_gigabytes" not in table


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: roofline.Ceilings(bytes_per_second=0.0, flops_per_second=1.0), "bytes_per_second: 0.0; expected"),
        (lambda: roofline.Ceilings(bytes_per_second=1.0, flops_per_second=math.nan), "flops_per_second: nan; expected"),
        (lambda: benchmark.run(medvdm.preset("linear-start")), "benchmark: the plain step has"),
        (lambda: benchmark.run(medvdm.preset("pixel", schedule="monotonic")), "benchmark: the plain step has"),
        (lambda: benchmark.run(medvdm.preset("pixel", dtype="bfloat16")), "benchmark: the plain step has"),
        (lambda: benchmark.run(medvdm.preset("pixel", image_size=32, reduce=2)), "benchmark: the plain step has"),
        (lambda: benchmark.run(medvdm.preset("pixel", augment_shift=0.1)), "benchmark: the plain step has"),
        (lambda: benchmark.run(medvdm.preset("pixel"), roofline=True), "architecture: 'unet'; expected 'residual'"),
        (lambda: roofline.ceilings(dtype="float23"), "dtype: 'float23'; did you mean 'float32'"),
        (lambda: roofline.ceilings(side=0), "side: 0; expected at least 1"),
        (lambda: roofline.ceilings(repeats=0), "repeats: 0; expected at least 1"),
        (lambda: roofline.dense_layers(LINEAR_START), "architecture: 'linear-start'; expected 'residual'"),
        (lambda: roofline.step_work(LINEAR_START, TrainConfig()), "architecture: 'linear-start'; expected"),
        (lambda: roofline.sample_work(MODEL, num=0, steps=1), "num: 0; expected at least 1"),
        (lambda: roofline.sample_work(MODEL, num=1, steps=-1), "steps: -1; expected at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call: Any, names: str) -> None:
    with pytest.raises(InputError) as problem:
        call()
    assert str(problem.value).startswith(names) and "\n" not in str(problem.value)


def test_the_command_refuses_a_bad_option(capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "benchmark", "--roofline", "--repeats", "1", names=["repeats: 1"])
    refused(capfd, "benchmark", "--rooflin", names=["--rooflin"])


UNET = {"width": 8, "embedding_dim": 8, "blocks": 1, "ema_decay": 0.9, "label_dropout": 0.5}


def rounding(model: vdm.VDMConfig) -> float:
    r"""How much float32 may change an estimate of noise, in units of the noise.

    It is read out of z by a division by the least :math:`\sigma / \alpha = e^{\gamma_0 / 2}`. A soft rounding to gray
    levels multiplies an error by the variance of the level, at most 1/4, over that of the noise.
    """
    noise = math.exp(0.5 * model.gamma_min)
    soft = max(1.0, 0.25 / (127.5 * noise) ** 2) if model.architecture == "unet" and model.rounding else 1.0
    return 2.0**-24 / noise * soft


@pytest.mark.parametrize(
    ("preset", "image_shape", "settings"),
    [
        # All parts at once: crops that are filled up to whole cells, three channels, labels, attention, rounding.
        # Little noise, so that the deviations of the law of levels lie on both sides of where rounding ends.
        ("pixel", (9, 11, 3), {**UNET, "crop": 6, "classes": 2, "attention": True, "blocks": 2, "gamma_max": -6.0}),
        (
            "pixel",
            (8, 8, 1),
            {
                **UNET,
                "scales": 3,
                "patch": 1,
                "details": "fourier",
                "rounding": False,
                "clip_norm": 0.0,
                "ema_decay": 0.0,
            },
        ),
        ("demo", (6, 5, 2), {**tiny.SETTINGS, "classes": 3, "score_layers": 2, "label_dropout": 0.5}),
    ],
)
def test_the_plain_step_computes_what_the_library_computes(
    preset: str, image_shape: tuple[int, int, int], settings: dict[str, Any]
) -> None:
    """Losses, gradients (in Adam's moments), weights and averages after two steps, from weights that are zero nowhere.

    The tolerance is three roundings of every pixel at the least noise, all in one direction.
    """
    # So large an epsilon that an update shows the size of its gradient. The first step has a learning rate of 0.
    recipe = {"batch_size": 4, "adam_eps": 1.0, "learning_rate": 1.0, "warmup_steps": 1, "weight_decay": 0.1}
    config = medvdm.preset(preset, **{**settings, **recipe, "image_shape": image_shape})
    model, training, rng = config.model, config.training, np.random.default_rng(0)
    values, back = ravel_pytree(vdm.init(model, 0))
    weights = back(values + 0.2 * rng.standard_normal(values.shape).astype(np.float32))
    levels = rng.integers(0, 256, (4, *image_shape), np.uint8)
    x = levels if model.integers else levels / np.float32(255)
    labels = np.eye(model.classes, dtype=np.float32)[rng.integers(0, model.classes, 4)] if model.classes else None

    average = weights if training.ema_decay else None
    ours = TrainState(jnp.zeros((), jnp.int32), weights, step.optimiser(training).init(weights), average)
    take_ours = jax.jit(make_step(model, training))
    with jax.numpy_rank_promotion("allow"):  # the plain step is as plain as people write it
        take, start = plain.plain_step(config)
        theirs = start(weights)
        for _ in range(2):
            theirs, terms = take(theirs, x, labels)
            ours, metrics = take_ours(ours, x, labels)
            np.testing.assert_allclose(np.array(terms), np.array(metrics[:3]), rtol=3 * rounding(model), atol=1e-6)
    for mine, other, before in zip(ours[1:], theirs[1:], (weights, None, average), strict=True):
        mine, other = (np.asarray(ravel_pytree(part)[0]) for part in (mine, other))
        moved = np.linalg.norm(other - (0.0 if before is None else ravel_pytree(before)[0]))
        assert np.linalg.norm(mine - other) <= 3 * rounding(model) * moved + 2.0**-22 * np.linalg.norm(other)


def test_timed_calls_take_turns_and_none_always_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: a takes 2 seconds and b 3, and the first of each pair a half more."""
    now, order = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> None:
        now[0] += seconds + (0.5 if len(order) % 2 == 0 else 0.0)
        order.append(name)

    a, b = benchmark.in_turns(lambda: call("a", 2.0), lambda: call("b", 3.0), 4)
    assert "".join(order) == "abbaabba"
    np.testing.assert_allclose(a, [2.5, 2, 2.5, 2])
    np.testing.assert_allclose(b, [3, 3.5, 3, 3.5])


def test_a_time_is_a_median_with_its_quartiles() -> None:
    found = benchmark.spread("step_ms", np.array([5.0, 1.0, 2.0, 3.0, 4.0]), 2)
    assert found == {"step_ms": 3.0, "step_ms_quartiles": [2.0, 4.0]}


def test_the_table_says_which_way_is_good() -> None:
    names = ("step_ms", "plain_step_ms", "ratio", "loop_over_step")
    result = {name: 1.0 for name in names} | {f"{name}_quartiles": [0.9, 1.1] for name in names}
    more = {"preset": "demo", "image_shape": [8, 8, 1], "batch_size": 4, "parameters": 1e6, "repeats": 7}
    text = benchmark_table(result | more | {"environment": {"devices": "1 x cpu"}, "peak_memory_gib": 1.0})
    assert "7 pairs" in text and text.count("0.900 to 1.100") == 2 and text.count("0.9 to 1.1;") == 1
    assert "below 1, the library is faster" in text and "1 where the input pipeline costs nothing" in text


@pytest.mark.slow
def test_the_command_prints_the_roofline(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"side": 256, "numbers": 2**20}.items():  # quick ceilings
        monkeypatch.setitem(roofline.ceilings.__kwdefaults__, name, value)
    options = ["--preset", "demo", "--image-size", "16", "--batch-size", "4", "--repeats", "3", "--roofline"]
    with jax.numpy_rank_promotion("allow"):  # the plain step is as plain as people write it
        out, err = said(capfd, "benchmark", *options)
    assert err == "" and "fastest step / roofline" in out and "bound by memory" in out and "XLA's own count" in out


DEVICES = """
import json
import jax, numpy as np, tiny
from jax.flatten_util import ravel_pytree
from medvdm.models import vdm
from medvdm.training import step
from medvdm.training.devices import Layout

config = tiny.config(image_shape=(16, 16, 1), classes=2)
model, recipe, rng, graph = config.model, config.training, np.random.default_rng(0), vdm.graph_of(config.model)
images, labels = rng.random((8, 16, 16, 1), np.float32), np.eye(2, dtype=np.float32)[rng.integers(0, 2, 8)]
flat, back = ravel_pytree(vdm.init(model, 0))
moved = back(flat + 0.1 * jax.random.normal(jax.random.key(2), flat.shape))

def loss(params, x, y):
    return step.loss_fn(vdm.merge(graph, params), recipe, x, y, jax.random.key(1))[0]

found = []
for n in (1, 8):
    layout = Layout(n)
    arrays = jax.device_put(moved, layout.replicated), layout.put(images), layout.put(labels)
    value, grads = jax.jit(jax.value_and_grad(loss))(*arrays)
    found.append((layout.count, float(value), np.asarray(ravel_pytree(jax.device_get(grads))[0])))
one = found[0]
apart = lambda other: float(np.linalg.norm(other - one[2]) / np.linalg.norm(one[2]))
print(json.dumps([[n, value / one[1] - 1, apart(grad)] for n, value, grad in found]))
"""


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_the_number_of_devices() -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    counts, losses, gradients = zip(*json.loads(done.stdout), strict=True)
    assert counts == (1, 8)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_allclose(gradients, 0, atol=1e-5)
