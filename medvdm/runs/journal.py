"""What a run writes while it trains: ``metrics.jsonl``, a line per step, and ``evaluations.jsonl``, a line per look.

Both begin, when a run goes on, by dropping the lines of steps past its checkpoint: those steps will be taken again.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medvdm.data import ImageData
from medvdm.evaluation import held_out
from medvdm.models import vdm
from medvdm.runs.config import RunConfig
from medvdm.runs.store import EVALUATIONS, METRICS, read_lines, write_text
from medvdm.training.devices import local
from medvdm.training.step import TrainState

MAX_LOOK = 256  #: validation images of the looks during training, at most


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a JSON-lines file down to the lines of steps up to ``step``, and return these."""
    kept = [record for record in read_lines(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


class StepLog:
    """``metrics.jsonl``: one line per step, each step once, also after a kill and a resume."""

    def __init__(self, out: Path, start: int):
        kept = keep_until(out / METRICS, start)
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = self._flushed = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=50)
        self._file = (out / METRICS).open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a step."""
        now = time.perf_counter()
        self._recent.append(now)
        span = self._recent[-1] - self._recent[0]
        rate = (len(self._recent) - 1) / span if span > 0 else 1.0 / max(now - self._start, 1e-9)
        record = {
            "step": step,
            "seconds": round(self._before + now - self._start, 3),
            "steps_per_second": round(rate, 4),
            **values,
        }
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if now - self._flushed > 1.0:
            self.flush()

    def flush(self) -> None:
        """Hand all lines to the system, so that a kill loses none of them."""
        self._file.flush()
        self._flushed = time.perf_counter()


class Looks:
    """``evaluations.jsonl``: the bound on validation patients during training, by one draw.

    Attributes:
        best: the least bound so far, in bits per dimension, of the averaged weights where there are any; inf before.
        best_step: the step of that look; 0 before.
    """

    def __init__(self, out: Path, config: RunConfig, data: ImageData, indices: Any, start: int):
        self._path = out / EVALUATIONS
        self._data = data
        self._indices = indices
        self._graph = vdm.graph_of(config.model)
        self._labelled = config.model.classes > 0 and config.training.label_dropout < 1
        self._judged = "ema" if config.training.ema_decay else "raw"
        kept = keep_until(self._path, start)
        judged = [(r["vlb_bpd"], r["step"]) for r in kept if r["weights"] == self._judged]
        self.best, self.best_step = min(judged, default=(float("inf"), 0))

    def write(self, step: int, state: TrainState) -> bool:
        """Evaluate the state; returns whether no state before was as good."""
        better = False
        for weights, params in (("raw", state.params), ("ema", state.ema)):
            if params is None:
                continue
            found = held_out.quick(
                self._graph,
                local(params),  # one device is enough for a look
                self._data,
                self._indices,
                batch_size=min(32, len(self._indices)),
                labelled=self._labelled,
            )
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "split": "val", "weights": weights, **found}) + "\n")
            if weights == self._judged and found["vlb_bpd"] < self.best:
                self.best, self.best_step, better = found["vlb_bpd"], step, True
        return better
