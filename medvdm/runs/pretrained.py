"""Small trained models that come with the package: nothing to download, and no patient in their training data.

Each is a folder of ``medvdm/pretrained``: the run's ``config.json``, its model card, and ``weights.npz``, the moving
average of the weights as float16, whose SHA-256 stands in the record.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from medvdm.errors import InputError, RunError, nearest
from medvdm.models import vdm
from medvdm.runs.run import Run
from medvdm.runs.store import CARD, CONFIG, atomic, read_record, write_json, write_text

NAMES = ("phantom",)
FOLDER = Path(__file__).parents[1] / "pretrained"
WEIGHTS = "weights.npz"


def pretrained(name: str = "phantom") -> Run:
    """A trained model that comes with the package, ready for :func:`medvdm.sample` and whatever else needs no data.

    ``phantom`` draws 64x64 chest X-rays as the generator of :mod:`medvdm.data.phantom` makes them.

    Raises:
        InputError: no such model.
        RunError: the file of its weights is not the one that was made.

    >>> pretrained("phantom").config.model.image_shape
    (64, 64, 1)
    """
    if name not in NAMES:
        raise InputError(f"pretrained: '{name}'; {nearest(name, NAMES)}")
    return unpack(FOLDER / name)


def pack(run: Run, folder: str | Path, *, command: str) -> None:
    """Write a run's weights, record and card in the form that :func:`unpack` reads.

    Args:
        run: from :func:`medvdm.load`, with ``ema=True`` if it keeps an average.
        folder: made if it is not there.
        command: the command line that trains the run again, for the record.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    half = {_name(path): np.asarray(value, np.float16) for path, value in flatten_dict(run.params).items()}
    np.savez_compressed(buffer, **half)  # type: ignore[arg-type]
    with atomic(folder / WEIGHTS) as file:
        file.write(buffer.getvalue())
    first = [line["vlb_bpd"] for line in run.metrics()[:3]]
    made = {"step": run.step, "weights": run.weights, "command": command, "first_vlb_bpd": first}
    write_json(folder / CONFIG, {**run.record, "pretrained": {**made, "sha256": _hash(buffer.getvalue())}})
    write_text(folder / CARD, (run.path / CARD).read_text("utf8"))


def unpack(folder: Path) -> Run:
    """The run that :func:`pack` has written.

    Raises:
        MissingFileError, RunError: nothing there, or weights that are not those of the record.
    """
    record, config = read_record(folder)
    made, content = record["pretrained"], (folder / WEIGHTS).read_bytes()
    if _hash(content) != made["sha256"]:
        raise RunError(f"{folder / WEIGHTS}: SHA-256 {_hash(content)[:12]}...; expected {made['sha256'][:12]}...")
    shapes = flatten_dict(jax.eval_shape(lambda: vdm.new_params(config.model, 0)))
    with np.load(io.BytesIO(content)) as stored:
        params = unflatten_dict({path: jnp.asarray(stored[_name(path)], jnp.float32) for path in shapes})
    return Run(
        path=folder,
        config=config,
        record=record,
        step=made["step"],
        weights=made["weights"],
        graph=vdm.graph_of(config.model),
        params=params,
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
