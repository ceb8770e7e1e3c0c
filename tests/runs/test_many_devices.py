"""Evaluation, bound, samples and audit: one device, eight devices, and two processes give the same."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Trained

pytestmark = pytest.mark.slow  # processes

#: What is done with a run, in a process of its own; prints a JSON object.
WORK = """
import dataclasses, json, sys
import jax, numpy as np
from medvdm.training.devices import start_processes
folder, out, coordinator, processes, process = sys.argv[1:]
start_processes(coordinator or None, int(processes), int(process))
import medvdm
from medvdm.runs.audit import nearest_training
from medvdm.runs.run import load_data
from medvdm.runs.sample import sample_to
run = medvdm.load(folder)
data = load_data(run)
read, inner, known = [], data.reader, data._digests
watched = lambda rows: (read.extend(map(int, rows)), inner(rows))[1]
data = dataclasses.replace(data, reader=watched, digests=lambda: known)
found = {"devices": len(jax.devices()), "processes": jax.process_count()}
found["evaluation"] = medvdm.evaluate(run, data, split="train", draws=2, batch_size=8)
found["evaluated"] = sorted(set(read) & set(map(int, data.indices("train"))))
images = data.read(data.indices("test"))
read.clear()
result = medvdm.bound(run, images, draws=2, batch_size=3)
found["bound"] = [result.nats.tolist(), result.stderr.tolist()]
drawn = medvdm.sample(run, 13, steps=3, batch_size=4, label="Pneumonia", guidance=1.0, num_states=2)
found["sample"] = [drawn.images.tolist(), drawn.states[0].tolist(), drawn.findings.tolist()]
sample_to(out, run, 13, steps=3, batch_size=4, label="Pneumonia", guidance=1.0)
import medvdm.runs.audit as audit
audit.PART = 16 * 16 * 8
found["audit"] = medvdm.audit(run, data, num=10, steps=3, batch_size=4)
found["compared"] = sorted(set(read) & set(map(int, data.indices("train"))))
print(json.dumps(found))
"""


def work(folder: Path, out: Path, devices: int = 1, processes: int = 1) -> list[dict[str, Any]]:
    """The objects that the processes print."""
    coordinator = ""
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    said = [out.parent.with_name(f"{out.parent.name}-{i}.txt") for i in range(processes)]  # a pipe would fill up
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in said]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WORK, *map(str, (folder, out, coordinator, processes, i))],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for i, file in enumerate(files)
        ]
        try:
            codes = [process.wait(timeout=120) for process in started]
        finally:
            for process in started:
                process.kill()
    texts = [path.read_text() for path in said]
    assert codes == [0] * processes, texts
    return [json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in texts]


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one device gives, and the file of its samples."""
    out = tmp_path_factory.mktemp("alone") / "samples.npz"
    return work(trained.path, out)[0], out


def assert_same(found: dict[str, Any], file: Path, alone: tuple[dict[str, Any], Path]) -> None:
    expected, expected_file = alone
    for part in ("evaluation", "audit"):
        a, b = found[part], expected[part]
        for name, value in (b | b.get("samples", {}) | b.get("decoded", {})).items():
            one = (a | a.get("samples", {}) | a.get("decoded", {}))[name]
            if name.startswith("c2st"):  # of ranks, which rounding may swap
                assert one == pytest.approx(value, abs=0.03), name
            elif isinstance(value, float) and name != "seconds":
                assert one == pytest.approx(value, rel=1e-3, abs=1e-6), name
            elif not isinstance(value, float | dict):
                assert one == value, name
    np.testing.assert_allclose(found["bound"], expected["bound"], rtol=1e-4)
    for one, other in zip(found["sample"], expected["sample"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with np.load(file) as one, np.load(expected_file) as other:
        assert set(one) == set(other)
        for name in set(one) - {"images"}:
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one["images"], other["images"], atol=1e-5)
        np.testing.assert_allclose(one["images"], found["sample"][0], atol=1e-5)
    assert os.listdir(file.parent) == [file.name], "no part is left behind"


def test_eight_devices_give_what_one_gives(
    trained: Trained, tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    assert (alone[0]["devices"], alone[0]["processes"]) == (1, 1)
    assert len(alone[0]["evaluated"]) == len(alone[0]["compared"]) == 46
    (found,) = work(trained.path, tmp_path / "samples.npz", devices=8)
    assert (found["devices"], found["processes"]) == (8, 1)
    assert_same(found, tmp_path / "samples.npz", alone)


def test_two_processes_give_what_one_gives_and_each_reads_its_share(
    trained: Trained, tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    found = work(trained.path, tmp_path / "samples.npz", devices=2, processes=2)
    for one in found:
        assert (one["devices"], one["processes"]) == (4, 2)
        assert_same(one, tmp_path / "samples.npz", alone)
    for what in ("evaluated", "compared"):
        shares = [set(one[what]) for one in found]
        assert shares[0] | shares[1] == set(alone[0][what])
        assert len(shares[0] & shares[1]) <= 8, "at most the last batch is read twice"
