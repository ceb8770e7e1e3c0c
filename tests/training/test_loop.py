"""The loop by itself, with a step that counts: what it calls, in which order, and what it shows."""

from __future__ import annotations

import io
import itertools
import sys
import time
from typing import Any

import jax.numpy as jnp
import pytest

from medvdm.errors import DivergedError
from medvdm.training import loop
from medvdm.training.step import Metrics, TrainState

VALUES = {
    "reconstruction_bpd": 0.87006, "diffusion_bpd": 0.0011, "latent_bpd": 7.576e-6, "vlb_bpd": 0.87124, "loss": 1.0
}  # fmt: skip


def counting(nan_loss_at: int = 0, nan_weight_at: int = 0) -> Any:
    """A step that adds the batch to its only weight, and reports the step's number as its loss."""

    def step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, Metrics]:
        number = int(state.step) + 1
        weight = float("nan") if number == nan_weight_at else state.params["w"] + images
        loss = jnp.asarray(float("nan") if number == nan_loss_at else float(number))
        return TrainState(jnp.asarray(number), {"w": jnp.asarray(weight)}, (), None), Metrics(*[loss] * 5)

    return step


def calls(
    *, start: int = 0, steps: int = 6, save_at: tuple[int, ...] = (), look_at: tuple[int, ...] = (), stop_at: int = 0,
    **faults: int,
) -> tuple[list[tuple[str, int]], TrainState]:  # fmt: skip
    """What the hooks were called for, in order, and the state at the end."""
    made: list[tuple[str, int]] = []
    hooks = loop.Hooks(
        log=lambda number, values: made.append(("log", number)),
        save=lambda number, state: made.append(("save", int(state.step))),
        look=lambda number, state: made.append(("look", int(state.step))),
        save_due=lambda number: number in save_at,
        look_due=lambda number: number in look_at,
        stop=lambda number: number == stop_at,
    )
    state = TrainState(jnp.asarray(start), {"w": jnp.zeros(())}, (), None)
    batches = ((jnp.asarray(float(n)), None) for n in itertools.count(start + 1))
    try:
        state = loop.train(state, counting(**faults), batches, steps=steps, hooks=hooks)
    except DivergedError as problem:
        made.append((str(problem), -1))
    return made, state


def test_each_step_is_logged_before_its_state_is_saved_or_looked_at() -> None:
    made, state = calls(save_at=(2,), look_at=(2, 4))
    assert [number for what, number in made if what == "log"] == [1, 2, 3, 4, 5, 6]
    assert [one for one in made if one[0] != "log"] == [
        ("save", 2), ("look", 2), ("look", 4), ("save", 6), ("look", 6)
    ]  # fmt: skip
    assert made.index(("save", 2)) == 2 and made.index(("look", 4)) > made.index(("log", 4))
    assert float(state.params["w"]) == 21  # the batches 1 to 6, each once


def test_it_goes_on_where_the_state_stands() -> None:
    made, state = calls(start=4)
    assert made == [("log", 5), ("log", 6), ("save", 6), ("look", 6)]
    assert float(state.params["w"]) == 11


def test_a_finished_run_does_nothing() -> None:
    assert calls(start=6)[0] == []


def test_asked_to_stop_it_saves_and_ends() -> None:
    made, state = calls(stop_at=3)
    assert made == [("log", 1), ("log", 2), ("log", 3), ("save", 3)] and int(state.step) == 3


def test_a_loss_that_is_not_finite_is_neither_logged_nor_saved() -> None:
    made, _ = calls(nan_loss_at=3, save_at=(3,))
    assert made == [("log", 1), ("log", 2), ("step 3: the loss is nan; expected a finite number", -1)]


def test_a_weight_that_is_not_finite_is_not_saved() -> None:
    made, _ = calls(nan_weight_at=3, save_at=(2, 4))
    assert made[-1] == ("step 4: a weight is not finite", -1)
    assert [number for what, number in made if what == "save"] == [2]


class Screen(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, steps: int, values: dict[str, float], start: int = 0) -> list[str]:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with loop.Progress(start, steps, show=True) as bar:
        for _ in range(steps - start if steps < 100 else 3):
            bar.update(values)
        bar._bar.refresh()
    return screen.getvalue().replace("\n", "\r").split("\r")


def test_the_progress_shows_steps_time_and_every_term_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    last = shown(monkeypatch, 12, VALUES, start=5)[-2].rstrip()
    assert last == "12/12 00:00 left, total 0.8712 recon 0.8701 diff 1.1e-03 prior 7.6e-06"
    for steps in (20_000, 99_999, 1_000_000):
        slow = {**VALUES, "vlb_bpd": 1234.5678, "reconstruction_bpd": 1234.5678, "diffusion_bpd": 3.2e-10}
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with loop.Progress(0, steps, show=True) as bar:
            bar._bar.start_t -= 3.5  # 3.5 seconds a step: a day and more for the longest runs
            bar.update(slow)
            bar._bar.refresh()
        lines = screen.getvalue().replace("\n", "\r").split("\r")
        assert any("prior 7.6e-06" in line and "left" in line for line in lines)
        assert max(map(len, lines)) <= 80, lines


def test_compiling_is_said_where_the_first_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Progress, "COMPILING_AFTER", 0.05)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with loop.Progress(0, 10, show=True) as bar:
        time.sleep(0.3)
        assert "compiling the training step" in screen.getvalue()
        bar.update(VALUES)
    quick = Screen()
    monkeypatch.setattr(sys, "stderr", quick)
    with loop.Progress(0, 10, show=True) as bar:
        bar.update(VALUES)
        time.sleep(0.3)
    assert "compiling" not in quick.getvalue()


def test_without_progress_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Progress, "COMPILING_AFTER", 0.01)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with loop.Progress(0, 10, show=False) as bar:
        time.sleep(0.1)
        bar.update(VALUES)
    assert screen.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.87124, "0.8712"), (0.0, "0.0000"), (7.576e-6, "7.6e-06"), (9.99996, "10.0000"), (12.345678, "12.35"),
     (9999.4, "9999"), (123456.0, "1.2e+05"), (0.0099, "9.9e-03"), (-0.5, "-0.5000")],
)  # fmt: skip
def test_numbers_are_short_and_keep_their_exponent(value: float, text: str) -> None:
    assert loop._short(value) == text and len(text) <= 7
