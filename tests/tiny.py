"""A run small enough for tests: the demo preset with everything on, shrunk to seconds; and networks of any weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import medvdm
from medvdm.models import vdm
from medvdm.runs.config import RunConfig

SETTINGS: dict[str, Any] = {
    "num_images": 60,
    "image_size": 16,
    "batch_size": 8,
    "steps": 12,
    "latent": 4,
    "embedding_dim": 8,
    "encoder_width": 16,
    "decoder_width": 16,
    "inner_width": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "score_layers": 1,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
}

#: The same for a diffusion on pixels, from the preset pixel.
PIXELS: dict[str, Any] = {
    "num_images": 60,
    "image_size": 16,
    "batch_size": 8,
    "steps": 12,
    "embedding_dim": 8,
    "width": 8,
    "scales": 1,  # networks of more are tested with the models
    "blocks": 1,
    "warmup_steps": 2,
}

#: What the shared run on pixels is trained with.
CROPS: dict[str, Any] = {"conditional": True, "crop": 12, "augment_shift": 0.05}


def config(**changes: Any) -> RunConfig:
    """The tiny settings with changes."""
    return medvdm.preset("demo", **{**SETTINGS, **changes})


def pixels(**changes: Any) -> RunConfig:
    """The tiny settings of a diffusion on pixels with changes."""
    return medvdm.preset("pixel", **{**PIXELS, **changes})


def weights(config: vdm.VDMConfig, deviation: float) -> vdm.Params:
    """Random weights everywhere, in layers that start at zero too; no initialisation is compiled for them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: vdm.new_params(config, 0))
    return jax.tree.map(lambda p: jnp.asarray(deviation * rng.standard_normal(p.shape), p.dtype), shapes)


def options(**changes: Any) -> list[str]:
    """The same for the command line."""
    merged = {**SETTINGS, **changes}
    return [text for name, value in merged.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def start(*arguments: str | Path, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start ``medvdm`` in a process of its own, with a number of fake CPU devices."""
    return subprocess.Popen(
        [sys.executable, "-m", "medvdm", *map(str, arguments)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def medvdm_command(*arguments: str | Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ``medvdm`` to its end."""
    process = start(*arguments, devices=devices)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
