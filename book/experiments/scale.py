"""The parts from which the chapter 'Scale out' extrapolates: reading, decoding, steps, checkpoints, memory by files.

    python book/experiments/scale.py [--tiny]     writes book/results/scale.json

Nothing large is run here. Each row measures one part on this machine, in a process of its own, so that its peak memory
is its own; the chapter multiplies. Files are PNG phantoms, those of 1,024 pixels as large as the files of NIH
ChestX-ray14. They have just been written, so they come from the system's cache and not from a disk. Steps are of the
preset `paper` with random images: the time does not depend on them. `load` is the system's load when a row began.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "_tools")]

TINY = {"embedding_dim": 16, "inner_width": 32, "encoder_layers": 1, "decoder_layers": 1, "score_layers": 1}


def rows(tiny: bool) -> list[tuple[str, dict[str, int]]]:
    """Everything that is measured, in order: kind and settings."""
    large, many = (64, (200, 300)) if tiny else (1024, (4000, 16000))
    steps = (16, 32) if tiny else (256, 512)
    return [
        ("ceilings", {}),
        ("headers", {"files": 200 if tiny else 1000, "side": large}),
        *[("decode", {"files": 8 if tiny else 32, "side": large, "to": side}) for side in (large // 4, large)],
        *[("step", {"image_size": side, "batch": 16}) for side in steps],
        ("checkpoint", {"image_size": steps[0]}),
        *[("files", {"files": number, "side": 16}) for number in many],
    ]


# --- What each process does ----------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def write_images(folder: Path, number: int, side: int) -> list[Path]:
    """Phantoms as PNG files; no two are the same, also where a few are written again with another corner."""
    import numpy as np
    from medvdm.data import phantom
    from PIL import Image

    drawn = phantom.load(num_images=min(number, 32), image_size=side).read(np.arange(min(number, 32)))
    gray = (255 * drawn[..., 0]).round().astype(np.uint8)
    paths = []
    for i in range(number):
        one = gray[i % len(gray)].copy()
        one.flat[:4] = np.frombuffer(np.uint32(i).tobytes(), np.uint8)
        paths.append(folder / f"{i // 3:08d}_{i % 3:03d}.png")
        Image.fromarray(one).save(paths[-1])
    return paths


def ceilings(row: dict[str, Any]) -> dict[str, float]:
    """What the machine can do at most, for the projection of steps."""
    from medvdm.cost import roofline

    found = roofline.ceilings(side=256, numbers=2**20) if row["tiny"] else roofline.ceilings()
    return {"bytes_per_second": found.bytes_per_second, "flops_per_second": found.flops_per_second}


def headers(row: dict[str, Any]) -> dict[str, float]:
    """Opening the header of every file, as a source does when it is loaded; two threads a core, as there."""
    from medvdm.data import files

    with tempfile.TemporaryDirectory() as folder:
        some = write_images(Path(folder), min(row["files"], 50), row["side"])
        paths = []
        for i in range(row["files"]):
            paths.append(Path(folder) / f"link-{i}.png")
            paths[-1].hardlink_to(some[i % len(some)])
        size = statistics.mean(path.stat().st_size for path in some)
        times = [seconds_of(lambda: files.headers(paths))[0] for _ in range(3)]
    return {"seconds_per_1000": 1000 * min(times) / row["files"], "bytes_per_file": size}


def decode(row: dict[str, Any]) -> dict[str, float]:
    """Decoding a file and bringing it to a size: one after the other on one core, and by all cores as a source does."""
    from medvdm.data import convert, files

    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), row["files"], row["side"])
        one = functools.partial(convert.read_image, image_size=row["to"])
        alone = min(seconds_of(lambda: [one(path) for path in paths])[0] for _ in range(2))
        together = min(seconds_of(lambda: files.threaded(one, paths))[0] for _ in range(2))
    return {"images_per_second_core": len(paths) / alone, "images_per_second": len(paths) / together}


def step(row: dict[str, Any]) -> dict[str, float]:
    """A training step of the preset `paper`, as :mod:`cost` measures it."""
    import cost

    found = cost.step({**row, "latent": 64, "dtype": "float32"})
    return {name: found[name] for name in ("parameters", "ms", "median_ms", "peak_gib")}


def checkpoint(row: dict[str, Any]) -> dict[str, float]:
    """Saving a whole state and reading it back, both to the end. The disk is the one that holds temporary files."""
    import jax
    from medvdm.runs import config as config_
    from medvdm.training.checkpoints import Checkpoints
    from medvdm.training.devices import Layout
    from medvdm.training.step import init_state

    import cost

    config = cost.settings({**row, "latent": 64, "batch": 16, "dtype": "float32"})
    shapes = jax.eval_shape(lambda: init_state(config.model, config.training))
    place = Layout(1).replicated
    state = jax.device_put(cost.filled(shapes), place)
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder) / "c", settings=config_.fingerprint(config)) as kept,
    ):
        held, _ = seconds_of(lambda: kept.save(state))
        rest, _ = seconds_of(kept.wait)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        read, _ = seconds_of(lambda: jax.block_until_ready(kept.restore(like)))
    raw = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return {
        "state_bytes": raw,
        "disk_bytes": size,
        "save_seconds": held + rest,
        "held_seconds": held,
        "read_seconds": read,
    }


def files(row: dict[str, Any]) -> dict[str, float]:
    """From file names to a trained step: a folder in NIH's layout, the pixels not kept in memory, one step of `fit`.

    A run on a few files comes first, so that compiling counts neither as time nor as memory.
    """
    import medvdm
    from medvdm.data import files as files_

    files_.MEMORY_LIMIT = 0  # as for a set that does not fit: what grows is what is kept of each file
    small = {"batch_size": 4, "latent": 2, "encoder_width": 8, "decoder_width": 8}
    with tempfile.TemporaryDirectory() as folder:
        for number in (100, row["files"]):
            place = Path(folder) / str(number)
            place.mkdir()
            paths = write_images(place, number, row["side"])
            with (place / "Data_Entry_2017.csv").open("w", newline="") as table:
                lines = csv.writer(table)
                lines.writerow(["Image Index", "Finding Labels", "Follow-up #", "Patient ID"])
                lines.writerows((p.name, ("No Finding", "Effusion")[i % 2], i % 3, i // 3) for i, p in enumerate(paths))
            config = medvdm.preset(
                "paper", data="nih", data_dir=str(place), image_size=row["side"], steps=1, **TINY, **small
            )
            before = peak_mb()
            call = functools.partial(medvdm.fit, config, Path(folder) / f"run-{number}", progress=False)
            taken, _ = seconds_of(call)
    return {"fit_seconds": taken, "growth_mb": peak_mb() - before, "peak_mb": peak_mb()}


# --- The processes, and the record ---------------------------------------------------------------------------------


def child(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    environment = {**os.environ}
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as `medvdm train` does on Linux
    command = [sys.executable, __file__, "--child", kind, json.dumps(row)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few files, to try the script")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.child:
        kind, row = options.child
        print(json.dumps(globals()[kind](json.loads(row))))
        return

    import jax
    import medvdm
    import record
    from medvdm.runs import config as config_

    tables: dict[str, list[dict[str, Any]]] = {}
    begin = time.perf_counter()
    for kind, row in rows(options.tiny):
        load = os.getloadavg()[0]
        found = child(kind, {**row, "tiny": options.tiny})
        record.say(kind, row, found)
        tables.setdefault(kind, []).append({**row, **found, "load": load})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tables["machine"] = [{"backend": jax.default_backend(), "cores": cores}]
    config = config_.change(medvdm.preset("paper", batch_size=16), **(TINY if options.tiny else {}))
    seconds = time.perf_counter() - begin
    record.experiment("scale-tiny" if options.tiny else "scale", config=config, seconds=seconds, results=tables)


if __name__ == "__main__":
    main()
