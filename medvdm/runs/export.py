"""Write a run for release: what is needed to draw from it, and nothing that need not leave.

============================  ==========  ==========================================================================
of the run                    released    why
============================  ==========  ==========================================================================
``checkpoints/``, ``best/``   one set     ``weights.npz``: raw or averaged weights of one step. The optimiser's moments
                                          are sums of gradients of training images; other steps tell by their
                                          differences what was learnt between them
``config.json``               in part     see below
``MODEL_CARD.md``             made anew   with the results and audits, which are means over many images
``baselines.npz``             no          mean image and principal components of the training images
``gaussian.npz``              no          eigenvectors of their covariance
``metrics.jsonl``             no          losses of single batches, down to one image each
``evaluations.jsonl``         no          results by step; the card has those of the weights
``results/``, ``audits/``     in card     their notes can name files
``held_out/``                 no          a value for each validation image
``privacy/``                  verdicts    the rest can hold a value for each image
``.lock``, anything else      no          unknown
============================  ==========  ==========================================================================

Of ``config.json`` these do not leave: ``data_dir``, ``patient_pattern``; the fingerprint of the data, with which
somebody could prove that a folder holds them; what reading them found, and notes on them, which name files, folders and
patients (those of generated images are kept); origin and split rule of data that are no public set; names of classes
that the model does not draw from; and the seed of training. The seed fixes which image was in which batch and, where
noise was added for privacy, that noise, which is no protection from whoever can draw it again.

The released folder is a run: :func:`medvdm.load` reads it and samples are, bit for bit, those of the run. What needs
more than it has (``train --resume``, ``evaluate``, ``audit``, ``score``) says "exported for release".
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medvdm import data as data_
from medvdm.errors import InputError, MissingFileError, RunError
from medvdm.models import vdm
from medvdm.paths import local_path
from medvdm.runs.model_card import card_record, write_card
from medvdm.runs.record import version
from medvdm.runs.run import Run, load
from medvdm.runs.store import CARD, CONFIG, read_record, write_json
from medvdm.runs.weights import write_weights

#: Settings of which the released record has the default.
WITHHELD = ("data.data_dir", "data.patient_pattern", "training.seed")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was released.

    Attributes:
        path: the folder.
        step: of the weights.
        weights: 'ema' for averages, or 'raw'.
        notes: what whoever releases it should know, one line each.
    """

    path: Path
    step: int
    weights: str
    notes: tuple[str, ...]


def export(
    run: str | Path, out: str | Path, *, ema: bool = True, step: int | Literal["best"] | None = None
) -> Exported:
    """Write a run for release into a folder of its own; all of it is there, or nothing.

    Args:
        run: the run's folder.
        out: the folder, new or empty; its name is the released run's.
        ema: release the averaged weights, where the run keeps an average.
        step: as of :func:`medvdm.load`.

    Raises:
        RunError: as :func:`medvdm.load`; also a run that was exported already.
        InputError: ``out`` is a file, or holds something.
        MissingFileError: no run there, or the folder that ``out`` shall be in is not there.
        OSError: the folder cannot be written; nothing of it is left.
    """
    path, out = local_path(run, "run"), local_path(out, "out")
    record, config = read_record(path)
    if "exported" in record:
        raise RunError(f"{path}: exported for release already; expected the run that it was made from")
    _check_out(out)
    loaded = load(path, ema=ema and config.training.ema_decay > 0, step=step)
    place = out.resolve()
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        sha256 = write_weights(temporary, loaded.params)
        released = _record(loaded, sha256)
        card, notes = _card(loaded, released)
        write_json(temporary / CONFIG, released)
        write_card(temporary / CARD, card)
        os.replace(temporary, place)  # also onto an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(path=out, step=loaded.step, weights=loaded.weights, notes=notes)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; expected a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"out: {out} holds something already; expected a new or empty folder")
    if not out.absolute().parent.is_dir():
        raise MissingFileError(f"out: {out}: the folder {out.parent} is not there; expected an existing one")


def _record(run: Run, sha256: str) -> dict[str, Any]:
    """The record that leaves."""
    old = copy.deepcopy(run.record)
    config, data = old["config"], old["data"]
    config["data"] |= {"data_dir": None, "patient_pattern": None}
    config["training"]["seed"] = 0
    drawn = run.config.model.classes > 0
    public = data["name"] in data_.names() and data["name"] != "folder"
    return {
        "version": old["version"],
        "config": config,
        "data": {
            "name": data["name"],
            "origin": data["origin"] if public else "images given by the user",
            "split_rule": data["split_rule"] if public else "by patient",
            "counts": data["counts"],
            "class_names": data["class_names"] if drawn else [],
            "image_shape": data["image_shape"],
            "fingerprint": None,
            "reading": None,
            "level_use": data["level_use"],
            "notes": data["notes"] if data["name"] == "phantom" else [],
        },
        "environment": old["environment"],
        "trained_classes": old["trained_classes"],
        "notes": old["notes"],
        "extended_from": old["extended_from"],
        **({"privacy": old["privacy"]} if "privacy" in old else {}),
        "exported": {"version": version(), "step": run.step, "weights": run.weights, "sha256": sha256},
    }


# --- The card --------------------------------------------------------------------------------------------------------


def _card(run: Run, released: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the card is made from, and what whoever releases it should know."""
    whole = card_record(run.path, released)
    notes = []
    for name in ("evaluations", "audits"):
        own = [one for one in whole[name] if (one.get("step"), one.get("weights")) == (run.step, run.weights)]
        if whole[name] and not own:
            notes.append(f"the {name} in the card are of other weights of the run; none is of those released")
        whole[name] = [{**one, "notes": []} for one in own or whole[name]]
    said = ("step", "weights", "num_samples", "num_train", "num_held_out", "verdict")
    whole["privacy_audits"] = [{key: one.get(key) for key in said} for one in whole["privacy_audits"]]
    if not whole["privacy_audits"]:
        notes.append("no privacy audit of this run: what its weights tell about training images is not measured")
    if any("canar" in note.lower() for note in (*run.record["notes"], *run.record["data"]["notes"])):
        notes.append("canaries were planted into the training images, and the weights have learnt from them")
    card = {
        **whole,
        "training": {**whole["training"], "last": {}},  # of one batch
        "left_out": [],
        "release": {
            **released["exported"],
            "withheld": list(WITHHELD),
            "components": vdm.ARCHITECTURES[run.config.model.architecture].measures_components,
            "data_notes": len(run.record["data"]["notes"]) - len(released["data"]["notes"]),
            "notes": notes,
        },
    }
    return card, tuple(notes)
