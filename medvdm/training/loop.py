"""The training loop: take steps, report each, save and look when due. It meets no data source and no run folder.

A step's images, times and noise depend on the seed and the step's number only, so a loop that continues at a saved
state gives the same losses as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
from tqdm import tqdm

from medvdm.errors import DivergedError
from medvdm.models import vdm
from medvdm.training.step import Metrics, StepFn, TrainState

#: What one step is given: images and labels, on the devices that the step runs on.
Batches = Iterator[tuple[jax.Array, jax.Array | None]]


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls. A step's number is that of the step just taken, 1 the first.

    Attributes:
        log: is given each step's number and its terms, in order, one step late.
        save: is given the number and the state, which it must have read (or copied) when it returns.
        look: likewise; for an evaluation on the way.
        save_due: whether to save after this step. The last step is saved without asking.
        look_due: whether to look after this step. At the last step the loop looks without asking.
        stop: whether to end after this step, which is then saved.
    """

    log: Callable[[int, dict[str, float]], None]
    save: Callable[[int, TrainState], None]
    look: Callable[[int, TrainState], None]
    save_due: Callable[[int], bool]
    look_due: Callable[[int], bool]
    stop: Callable[[int], bool]


def train(state: TrainState, step_fn: StepFn, batches: Batches, *, steps: int, hooks: Hooks) -> TrainState:
    """Train from ``state`` up to step ``steps``, or to the step at which ``hooks.stop`` says so.

    Args:
        state: the state to start from; its memory is used again.
        step_fn: from :func:`medvdm.training.step.jit_step`.
        batches: the first of them is that of step ``state.step + 1``.
        steps: the number of the last step.
        hooks: what is done on the way.

    Raises:
        DivergedError: a loss or a weight is not finite. A state with such a weight is never given to ``hooks.save``.
    """
    reports = _Reports(hooks.log)
    for number in range(int(state.step) + 1, steps + 1):
        state, metrics = step_fn(state, *next(batches))
        reports.add(number, metrics)
        reports.read(all_but=1)  # the device works on this step while the host reads the one before
        stop = hooks.stop(number)
        last = number == steps
        if last or stop or hooks.save_due(number):
            reports.read()
            if not bool(_finite(state.params)):
                raise DivergedError(f"step {number}: a weight is not finite")
            hooks.save(number, state)
        if last or hooks.look_due(number):
            reports.read()
            hooks.look(number, state)
        if stop:
            break
    return state


class _Reports:
    """Metrics of steps that the devices may still be working on."""

    def __init__(self, log: Callable[[int, dict[str, float]], None]):
        self._log = log
        self._pending: deque[tuple[int, Metrics]] = deque()

    def add(self, number: int, metrics: Metrics) -> None:
        self._pending.append((number, metrics))

    def read(self, *, all_but: int = 0) -> None:
        """Log the finished steps; raises DivergedError instead of logging what is not finite."""
        while len(self._pending) > all_but:
            number, metrics = self._pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
            if not all(map(math.isfinite, values.values())):
                raise DivergedError(f"step {number}: the loss is {values['loss']}; expected a finite number")
            self._log(number, values)


@functools.partial(jax.jit, compiler_options=vdm.QUICK_TO_COMPILE)
def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


class Progress:
    """The progress on stderr: steps taken and to take, time left, and the last step's terms in bits per dimension.

    It fits into 80 columns for up to 10^8 steps. Until the first step is through it says what takes so long.

    Args:
        start: steps taken before.
        steps: the number of the last step.
        show: False is silent.
    """

    COMPILING_AFTER = 3.0  #: seconds without a step, after which the bar says that the step is being compiled

    def __init__(self, start: int, steps: int, *, show: bool):
        large = steps >= 100_000  # 123k/1.00M
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit_scale=large,
            disable=not show,
            file=sys.stderr,
            bar_format="{n_fmt}/{total_fmt} {remaining} left{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file needs no animation
        )
        self._waiting = threading.Timer(self.COMPILING_AFTER, self._say_compiling)
        self._waiting.daemon = True
        if show and start < steps:
            self._waiting.start()

    def _say_compiling(self) -> None:
        self._bar.write("compiling the training step; large images or models take minutes", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.cancel()
        self._bar.close()

    def update(self, values: dict[str, float]) -> None:
        """Count a step and show its terms."""
        self._waiting.cancel()
        self._bar.set_postfix_str(terms_text(values), refresh=False)
        self._bar.update()


def terms_text(values: dict[str, float]) -> str:
    """The bound and its three terms, at most 52 characters while total and reconstruction are in 0.01 to 9999.

    >>> terms_text({"vlb_bpd": 0.87124, "reconstruction_bpd": 0.87, "diffusion_bpd": 0.00123, "latent_bpd": 7.576e-6})
    'total 0.8712 recon 0.8700 diff 1.2e-03 prior 7.6e-06'
    """
    names = {"vlb_bpd": "total", "reconstruction_bpd": "recon", "diffusion_bpd": "diff", "latent_bpd": "prior"}
    return " ".join(f"{short} {_short(values[name])}" for name, short in names.items())


def _short(value: float) -> str:
    """A number in six characters or fewer, or in seven where it needs an exponent."""
    if 0.01 <= abs(value) < 10 or value == 0:
        return f"{value:.4f}"
    return f"{value:.4g}" if 10 <= abs(value) < 9999.5 else f"{value:.1e}"


class Requests:
    """Whether somebody asked the process to stop: ``signal`` is the number of the signal, or 0."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[Requests]:
    """Note SIGTERM and the first Ctrl-C instead of dying of them; a second Ctrl-C interrupts at once."""
    asked = Requests()

    def note(number: int, frame: Any) -> None:
        if asked.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = number

    old: dict[int, Any] = {}
    try:
        if jax.process_count() == 1:  # several processes agree on a step through JAX's own handler
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ValueError):  # not in the main thread: signals are not ours to handle
                    old[number] = signal.signal(number, note)
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
