"""Weights in one file of NumPy's, with nothing but the weights in it; their SHA-256 stands in a record beside it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from medvdm.errors import MissingFileError, RunError
from medvdm.models import vdm
from medvdm.runs.store import atomic

WEIGHTS = "weights.npz"


def write_weights(folder: Path, params: vdm.Params, dtype: Any = np.float32) -> str:
    """Write ``weights.npz``, an array per leaf under its path such as 'decoder/out/kernel'; returns its SHA-256."""
    buffer = io.BytesIO()
    arrays = {_name(path): np.asarray(value, dtype) for path, value in flatten_dict(params).items()}
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    with atomic(folder / WEIGHTS) as file:
        file.write(buffer.getvalue())
    return _hash(buffer.getvalue())


def read_weights(folder: Path, config: vdm.VDMConfig, sha256: str) -> vdm.Params:
    """The weights of a model as float32.

    Raises:
        MissingFileError: no file of weights.
        RunError: another file than the one of the record.
    """
    try:
        content = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{folder / WEIGHTS}: not found; expected the weights of the run") from None
    if _hash(content) != sha256:
        raise RunError(f"{folder / WEIGHTS}: SHA-256 {_hash(content)[:12]}...; expected {sha256[:12]}...")
    shapes = flatten_dict(jax.eval_shape(lambda: vdm.new_params(config, 0)))
    with np.load(io.BytesIO(content)) as stored:
        return unflatten_dict({path: jnp.asarray(stored[_name(path)], jnp.float32) for path in shapes})


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
