"""Small trained models that come with the package: nothing to download, and no patient in their training data.

Each is a folder of ``medvdm/pretrained``: the run's ``config.json``, its model card, and ``weights.npz``, the moving
average of the weights as float16, whose SHA-256 stands in the record.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medvdm.errors import InputError, nearest
from medvdm.models import vdm
from medvdm.runs.run import Run
from medvdm.runs.store import CARD, CONFIG, read_record, write_json, write_text
from medvdm.runs.weights import read_weights, write_weights

NAMES = ("phantom",)
FOLDER = Path(__file__).parents[1] / "pretrained"


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
    sha256 = write_weights(folder, run.params, np.float16)
    first = [line["vlb_bpd"] for line in run.metrics()[:3]]
    made = {"step": run.step, "weights": run.weights, "command": command, "first_vlb_bpd": first}
    write_json(folder / CONFIG, {**run.record, "pretrained": {**made, "sha256": sha256}})
    write_text(folder / CARD, (run.path / CARD).read_text("utf8"))


def unpack(folder: Path) -> Run:
    """The run that :func:`pack` has written.

    Raises:
        MissingFileError, RunError: nothing there, or weights that are not those of the record.
    """
    record, config = read_record(folder)
    made = record["pretrained"]
    return Run(
        path=folder,
        config=config,
        record=record,
        step=made["step"],
        weights=made["weights"],
        graph=vdm.graph_of(config.model),
        params=read_weights(folder, config.model, made["sha256"]),
    )
