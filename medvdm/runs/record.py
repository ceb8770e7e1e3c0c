"""What a run writes down about its data and about the machine that computed it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from medvdm.data import ImageData, Reading
from medvdm.data.levels import LevelUse
from medvdm.training.devices import describe


def version() -> str:
    """The installed version of medvdm."""
    return importlib.metadata.version("medvdm")


def environment() -> dict[str, str]:
    """What the run was computed with."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": describe(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def data_record(data: ImageData, *, integers: bool = False) -> dict[str, Any]:
    """What the model card and a resumed run need to know of the data, as JSON.

    Args:
        data: the images.
        integers: whether the model takes gray levels: then also how many of the 256 the training images use
            (the notes on them are :attr:`medvdm.data.levels.LevelUse.notes`).

    Raises:
        DataError: nothing to train on, see :meth:`medvdm.data.ImageData.check_splits`.
    """
    return {
        "name": data.name,
        "origin": data.origin,
        "split_rule": data.split_rule,
        "counts": data.counts(),
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "fingerprint": data.fingerprint(),
        "reading": None if data.reading is None else _reading(data.reading),
        "level_use": _level_use(data.level_use()) if integers else None,
        "notes": [*data.notes, *data.check_splits()],
    }


def _reading(reading: Reading) -> dict[str, Any]:
    return {
        "seen": reading.seen,
        "read": reading.read,
        "skipped": dict(reading.skipped),
        "stored_range": None if reading.stored_range is None else list(reading.stored_range),
        "guessed": list(reading.guessed),
        "rounded_from": list(reading.rounded_from),
    }


def _level_use(use: LevelUse) -> dict[str, Any]:
    return {
        "images": use.images,
        "distinct": use.distinct,
        "distinct_per_image": use.distinct_per_image,
        "rounded": use.rounded,
    }
