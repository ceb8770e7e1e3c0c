r"""What a training step and a sample must cost: operations and bytes counted by hand, over ceilings that are measured.

A phase of F operations that moves Q bytes to and from memory takes, on a machine that can do at most :math:`\pi`
operations and :math:`\beta` bytes a second, at least

.. math::
    t = \max(F / \pi,\; Q / \beta)

(the roofline model: Williams, Waterman & Patterson, 2009). The count assumes that each matrix product reads its two
operands once and writes its result once, that everything element-wise between two products is free, and that nothing
stays in a cache. It is a lower bound for large models; a model that fits into the cache may be faster.

With K inputs, N outputs and a batch of B, one dense layer needs, in numbers (not bytes) and operations:

=================  =====================  ==========  =====================
product            numbers read           written     operations
=================  =====================  ==========  =====================
forward            B K + K N              B N         2 B K N
weights' gradient  B K + B N              K N         2 B K N
inputs' gradient   B N + K N              B K         2 B K N
=================  =====================  ==========  =====================

The encoder's first layer needs no gradient of its input. AdamW reads p, m, v and g and writes p, m and v: seven
numbers per parameter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from medvdm.errors import InputError, nearest
from medvdm.models import blocks, vdm
from medvdm.training.step import TrainConfig

FLOAT = 4
"""Bytes of a parameter, a gradient and an optimiser's number: always float32."""
ADAMW_OPERATIONS = 15
"""Operations of AdamW a parameter, as XLA counts them."""


class Dense(NamedTuple):
    """One dense layer: its name, and how many numbers go in and come out."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Entries of the kernel, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the work that comes before or after the others: they do not overlap, so their times add."""

    name: str
    flops: float
    """Operations (a multiplication and an addition are two)."""
    bytes: float
    """Bytes that go to or come from memory."""

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time that the phase can take: max(F / pi, Q / beta)."""
        return max(self.flops / ceilings.flops_per_second, self.bytes / ceilings.bytes_per_second)

    def bound(self, ceilings: Ceilings) -> Literal["memory", "arithmetic"]:
        """Which of the two it waits for."""
        by_memory = self.bytes / ceilings.bytes_per_second > self.flops / ceilings.flops_per_second
        return "memory" if by_memory else "arithmetic"


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a machine can do at most.

    Raises:
        InputError: a rate that is not positive and finite.
    """

    bytes_per_second: float
    """Streaming: two arrays read and one written, all much larger than the caches."""
    flops_per_second: float
    """A large square matrix product."""

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "flops_per_second"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}: {value}; expected a positive, finite rate")

    @property
    def knee(self) -> float:
        """The batch from which a dense layer's forward product is bound by arithmetic.

        Each weight is 4 bytes and 2 B operations, so 4 / beta = 2 B / pi at B = 2 pi / beta. The backward pass has
        twice of both and the same knee. Activations, which move the knee up, are left out.
        """
        return FLOAT / 2 * self.flops_per_second / self.bytes_per_second


def dense_layers(model: vdm.VDMConfig) -> tuple[Dense, ...]:
    """All dense layers of a model, in the order in which an image passes them. Names start with their network's.

    Raises:
        InputError: an architecture that is not made of dense layers only.
    """
    if not vdm.ARCHITECTURES[model.architecture].dense:
        raise InputError(f"architecture: '{model.architecture}'; expected 'residual', whose layers are all dense")
    c, inner, pixels = model.embedding_dim, model.inner_width, model.dimensions

    def stack(name: str, enter: int, width: int, layers: int, leave: int) -> list[Dense]:
        block = [Dense(f"{name}.expand", width, inner), Dense(f"{name}.contract", inner, width)]
        return [Dense(f"{name}.enter", enter, width), *block * layers, Dense(f"{name}.leave", width, leave)]

    mix = [
        Dense("condition.mix", 2 * c, 4 * c),
        Dense("condition.mix", 4 * c, 4 * c),
        Dense("condition.mix", 4 * c, c),
    ]
    films = [Dense("condition.film", c, 2 * inner)] * model.score_layers
    return (
        *stack("encoder", pixels, model.encoder_width, model.encoder_layers, model.latent),
        *mix,
        *films,
        *stack("score", model.latent, c, model.score_layers, model.latent),
        *stack("decoder", model.latent, model.decoder_width, model.decoder_layers, pixels),
    )


def parameters(model: vdm.VDMConfig) -> int:
    """The number of parameters by hand: kernels and biases, two numbers a unit of each norm, the embedded labels.

    The few of a learned schedule are left out.
    """
    dense = sum(layer.weights + layer.outputs for layer in dense_layers(model))
    widths = (
        model.encoder_layers * model.encoder_width
        + model.decoder_layers * model.decoder_width
        + model.score_layers * model.embedding_dim
    )
    return dense + 2 * widths + (1 + model.classes) * model.embedding_dim


def optimiser_numbers(config: TrainConfig, *, fused: bool = True) -> int:
    """How many numbers per parameter the optimiser reads and writes.

    ``fused``: in one pass over memory, the least there is. AdamW reads p, m, v, g and writes p, m, v; clipping has to
    read g once more (its norm must be known first); the moving average is read and written.
    Not fused: m from (m, g), then v from (v, g), then p from (p, m, v), ten numbers, which is how XLA compiles optax's
    chain on a CPU (jax 0.10). Clipping then costs five more (the squares, and a scaled copy of g), the average three.
    """
    adamw, clip, average = (7, 1, 2) if fused else (10, 5, 3)
    return adamw + clip * (config.clip_norm > 0) + average * (config.ema_decay > 0)


def step_work(model: vdm.VDMConfig, config: TrainConfig, *, fused: bool = True) -> tuple[Phase, Phase, Phase]:
    """The work of one training step: forward, backward, optimiser.

    Counted are the matrix products, each reading its operands and writing its result once, and what the optimiser
    reads and writes; all that is element-wise between two products is free.

    Args:
        model, config: what is trained; the batch is ``config.batch_size``.
        fused: whether the optimiser makes one pass over memory, see :func:`optimiser_numbers`.
    """
    b, layers, count = config.batch_size, dense_layers(model), parameters(model)
    activation = blocks.DTYPES[model.dtype].itemsize
    weights = sum(layer.weights for layer in layers)
    moved = sum(b * (layer.inputs + layer.outputs) for layer in layers) * activation
    first = layers[0]
    forward = Phase(name="forward", flops=2.0 * b * weights, bytes=float(FLOAT * weights + moved))
    backward = Phase(
        name="backward",
        flops=2.0 * b * (2 * weights - first.weights),
        bytes=float(
            FLOAT * (2 * weights - first.weights) + 2 * moved - b * (first.inputs + first.outputs) * activation
        ),
    )
    optimiser = Phase(
        name="optimiser",
        flops=float(ADAMW_OPERATIONS * count),
        bytes=float(FLOAT * optimiser_numbers(config, fused=fused) * count),
    )
    return forward, backward, optimiser


def sample_work(model: vdm.VDMConfig, *, num: int, steps: int) -> tuple[Phase, Phase]:
    """The work of ``num`` samples of ``steps`` ancestral steps with one label for all: the chain and the decoder.

    The conditions of a step are computed once for all samples. The bytes are those of weights that are fetched anew at
    every step; a score network that stays in the cache is faster than that.

    Raises:
        InputError: a count below 1.
    """
    for name, value in {"num": num, "steps": steps}.items():
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")

    def of(name: str) -> int:
        return sum(layer.weights for layer in dense_layers(model) if layer.name.startswith(f"{name}."))

    chain = Phase(
        name="chain",
        flops=2.0 * steps * (num * of("score") + of("condition")),
        bytes=float(FLOAT * steps * (of("score") + of("condition"))),
    )
    decoder = Phase(
        name="decoder", flops=2.0 * num * of("decoder"), bytes=float(FLOAT * (of("decoder") + num * model.dimensions))
    )
    return chain, decoder


def seconds(phases: Sequence[Phase], ceilings: Ceilings) -> float:
    """The least time of all phases, one after the other."""
    return sum(phase.seconds(ceilings) for phase in phases)


def xla(compiled: Any) -> dict[str, float]:
    """XLA's own account of a compiled function: ``flops``, ``bytes`` of all its operations, ``memory`` at its peak.

    ``bytes`` adds up what every operation reads and writes, whether it comes from a cache or not. ``memory`` is
    arguments, results (counted once where they take an argument's place) and temporaries.
    """
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "flops": float(cost["flops"]),
        "bytes": float(cost["bytes accessed"]),
        "memory": float(memory.argument_size_in_bytes + results + memory.temp_size_in_bytes),
    }


def ceilings(*, dtype: str = "float32", side: int = 2048, numbers: int = 2**25, repeats: int = 5) -> Ceilings:
    """Measure both ceilings on the first device, each the best of ``repeats``; takes about two seconds on a CPU.

    Args:
        dtype: the type of the matrix product (at JAX's default precision, as in the networks).
        side: of the square matrices.
        numbers: in each of the two float32 arrays that are streamed (2**25 are 134 MB; caches must be far smaller).
        repeats: how often.

    Raises:
        InputError: an unknown dtype, or a count below 1.
    """
    if dtype not in blocks.DTYPES:
        raise InputError(f"dtype: '{dtype}'; {nearest(dtype, blocks.DTYPES)}")
    for name, value in {"side": side, "numbers": numbers, "repeats": repeats}.items():
        if value < 1:
            raise InputError(f"{name}: {value}; expected at least 1")
    a, b = (jax.block_until_ready(jnp.full((numbers,), value, jnp.float32)) for value in (1.0, 2.0))
    triad = jax.jit(lambda a, b: a + 1e-3 * b, donate_argnums=0)
    streamed, _ = best_seconds(triad, a, b, repeats=repeats)
    del a, b
    square = jax.block_until_ready(jnp.full((side, side), 1.0 / side, blocks.DTYPES[dtype]))
    multiplied, _ = best_seconds(jax.jit(jnp.matmul), square, square, repeats=repeats, carry=False)
    return Ceilings(bytes_per_second=3 * FLOAT * numbers / streamed, flops_per_second=2 * side**3 / multiplied)


def best_seconds(
    function: Callable[..., Any], first: Any, *rest: Any, repeats: int, carry: bool = True
) -> tuple[float, Any]:
    """The least time of ``repeats`` calls after one that is not counted, and what the last returned.

    Args:
        function: called as ``function(first, *rest)``.
        carry: the result is the next call's ``first``, as for functions that are given their argument's memory.
    """
    best = math.inf
    for i in range(repeats + 1):
        begin = time.perf_counter()
        result = jax.block_until_ready(function(first, *rest))
        best = min(best, time.perf_counter() - begin) if i else best
        first = result if carry else first
    return best, first if carry else result


def report(model: vdm.VDMConfig, config: TrainConfig, limits: Ceilings, compiled: Any = None) -> dict[str, Any]:
    """The roofline of a training step as a table that JSON can hold.

    Returns:
        The ceilings in GB/s and GFLOP/s; for each phase its work, its least time and what bounds it; the least time
        of the step, ``roofline_ms``, and with an optimiser of three passes, ``unfused_ms``; ``knee_batch``; and
        XLA's account if the compiled step is given.
    """
    phases = step_work(model, config)
    out: dict[str, Any] = {
        "gigabytes_per_second": round(limits.bytes_per_second / 1e9, 3),
        "gigaflops_per_second": round(limits.flops_per_second / 1e9, 3),
        "knee_batch": round(limits.knee, 1),
        "phases": [
            {
                "phase": phase.name,
                "gigaflops": round(phase.flops / 1e9, 6),
                "gigabytes": round(phase.bytes / 1e9, 6),
                "milliseconds": round(phase.seconds(limits) * 1e3, 4),
                "bound": phase.bound(limits),
            }
            for phase in phases
        ],
        "roofline_ms": round(seconds(phases, limits) * 1e3, 4),
        "unfused_ms": round(seconds(step_work(model, config, fused=False), limits) * 1e3, 4),
    }
    if compiled is not None:
        found = xla(compiled)
        out |= {f"xla_giga{name}": round(found[name] / 1e9, 6) for name in ("flops", "bytes")}
        out["xla_memory_gib"] = round(found["memory"] / 2**30, 4)
    return out
