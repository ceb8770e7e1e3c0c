"""Checkpoints: whole, of the right run, in every folder that is not refused, and not too often."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvdm.errors import InputError, NotSavedError, RunError
from medvdm.training.checkpoints import Cadence, Checkpoints, check_folder, read_back
from medvdm.training.step import TrainState


def state(step: int, value: float = 1.0) -> TrainState:
    return TrainState(
        jnp.asarray(step, jnp.int32),
        {"a": {"b": jnp.full((4,), value)}},
        {"m": jnp.zeros(2)},
        {"a": {"b": jnp.ones(4)}},
    )


def like() -> TrainState:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), state(0))


def saved(folder: Path, *states: TrainState, settings: str = "s") -> Path:
    with Checkpoints(folder, settings=settings) as checkpoints:
        for one in states:
            checkpoints.save(one)
    return folder


@pytest.mark.parametrize("name", ["a b", "ü日本", "a:b", "%20", "x{1}", "-x", "$HOME", "a#b", "~", "a'b\"c"])
def test_unusual_folders_give_back_what_was_saved(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / name / "checkpoints", state(3, 0.5))
    read_back(folder, like(), 3, settings="s")
    with Checkpoints(folder, settings="s", create=False) as checkpoints:
        found = checkpoints.restore(like())
    jax.tree.map(np.testing.assert_array_equal, found, state(3, 0.5))


@pytest.mark.parametrize("name", ["[1]", "x[1", "x]", "a\\b", "**", "a*", "run?"])
def test_folders_that_would_be_read_as_a_pattern_are_refused(tmp_path: Path, name: str) -> None:
    """Orbax loses the weights in most of these, and in 'run?' it may read those of 'run1'."""
    folder = tmp_path / name / "checkpoints"
    with pytest.raises(InputError, match="in its path, which the checkpoint library reads as a pattern"):
        Checkpoints(folder, settings="s")
    assert not folder.parent.exists()


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"caf\\udce9.*expected a path in UTF-8"):
        check_folder(tmp_path / "caf\udce9", "out")


def test_a_pattern_anywhere_above_a_relative_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "[old]").mkdir()
    monkeypatch.chdir(tmp_path / "[old]")
    with pytest.raises(InputError, match=r"out: .*\[old\]/run has \[ \] in its path"):
        check_folder(Path("run"), "out")


def test_a_state_may_be_overwritten_as_soon_as_save_returns(tmp_path: Path) -> None:
    """As the next step does, which reuses the state's memory while the files are still being written."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    one = state(1)._replace(params={"a": jnp.full((1 << 22,), 2.0)}, ema=None)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), one)
    with Checkpoints(tmp_path / "c", settings="s") as checkpoints:
        checkpoints.save(one)
        for _ in range(20):
            one = jax.block_until_ready(overwrite(one))
    read_back(tmp_path / "c", shapes, 1, settings="s")


def test_weights_alone_serve_evaluation_and_not_training(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c", settings="s") as checkpoints:
        checkpoints.save(state(1), weights_only=True)
        checkpoints.wait()
        step, found = checkpoints.restore_weights(like().ema, "ema")
        assert step == 1
        np.testing.assert_array_equal(found["a"]["b"], np.ones(4))
        with pytest.raises(RunError, match="reading the checkpoint failed"):
            checkpoints.restore(like())


def test_reading_back_notices_what_is_missing_damaged_or_of_another_step(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", state(3), state(5))
    read_back(folder, like(), 5, settings="s")
    with pytest.raises(NotSavedError, match="newest checkpoint is of step 5; expected 6"):
        read_back(folder, like(), 6, settings="s")
    with pytest.raises(NotSavedError, match="belongs to settings s; expected t"):
        read_back(folder, like(), 5, settings="t")
    data = max((p for p in (folder / "5" / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(bytes(reversed(data.read_bytes())))
    with pytest.raises(NotSavedError, match="step 5 was saved, but does not read back"):
        read_back(folder, like(), 5, settings="s")
    with pytest.raises(NotSavedError, match="no complete checkpoint found"):
        (tmp_path / "none").mkdir()
        read_back(tmp_path / "none", like(), 1, settings="s")
    assert NotSavedError.exit_code == 1


def test_checkpoints_from_before_an_extension_are_accepted_and_no_others(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", state(3), settings="short")
    with Checkpoints(folder, settings="long", earlier=("short",), create=False) as checkpoints:
        assert int(checkpoints.restore(like()).step) == 3
    with Checkpoints(folder, settings="long", earlier=("shorter",), create=False) as checkpoints:
        with pytest.raises(RunError, match="belongs to settings short; expected long"):
            checkpoints.restore(like())


class Clock:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def share_of_saving(step_seconds: float, save_seconds: float, steps: int, every: int) -> tuple[float, list[int]]:
    """The share of the time of a run that saving takes, and the steps saved (the last one, always saved, aside)."""
    clock, kept, saving = Clock(), [], 0.0
    cadence = Cadence(every, exact=False, clock=clock)
    for step in range(1, steps):
        clock.now += step_seconds
        cadence.ended()
        if cadence.due(step):
            cadence.began()
            clock.now += save_seconds
            saving += save_seconds
            kept.append(step)
    return saving / (clock.now - 100.0), kept


def test_saving_by_default_takes_a_small_share_of_the_time() -> None:
    assert share_of_saving(0.19, 7.0, 200, 20) == (0.0, [])  # over in 38 seconds: the last step alone is saved
    share, kept = share_of_saving(0.19, 7.0, 20_000, 1_000)
    assert kept == list(range(1_000, 20_000, 1_000)) and share < 0.15
    for step_seconds, save_seconds in ((0.1, 7.0), (0.01, 7.0), (1.0, 90.0), (20.0, 600.0), (0.5, 0.01)):
        share, kept = share_of_saving(step_seconds, save_seconds, 50_000, 100)
        assert share < 0.15 and kept, (step_seconds, save_seconds)


def test_no_writing_begins_before_the_one_before_has_ended() -> None:
    clock = Clock()
    cadence = Cadence(1, exact=False, clock=clock)
    clock.now += 61
    assert cadence.due(1)
    cadence.began()
    clock.now += 1000
    assert not cadence.due(2)  # still writing
    cadence.ended()
    clock.now += 9_999
    assert not cadence.due(3)
    clock.now += 2
    assert cadence.due(4)


def test_an_interval_that_was_asked_for_is_kept_exactly() -> None:
    clock = Clock()
    cadence = Cadence(3, exact=True, clock=clock)
    due = []
    for step in range(1, 10):
        if cadence.due(step):
            cadence.began()
            due.append(step)
    assert due == [3, 6, 9]
