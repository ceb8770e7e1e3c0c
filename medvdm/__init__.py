"""medvdm: variational diffusion models for medical images, derived, tested and measured.

The whole job in a few lines::

    import medvdm

    config = medvdm.preset("demo", steps=500)
    run = medvdm.fit(config, "runs/first")
    print(medvdm.evaluate(run, split="test")["excess_bpd"])
    medvdm.sample(run, num=16, steps=250).save("samples.png")

Names are loaded when they are first used, so ``import medvdm`` is quick and free of side effects.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_HOMES = {
    "RunConfig": "runs.config",
    "preset": "runs.presets",
    "VDMConfig": "models.vdm",
    "VDM": "models.vdm",
    "TrainConfig": "training.step",
    "DataConfig": "data",
    "ImageData": "data",
    "from_arrays": "data",
    "fit": "runs.fit",
    "Run": "runs.run",
    "load": "runs.run",
    "pretrained": "runs.pretrained",
    "evaluate": "runs.evaluate",
    "sample": "runs.sample",
    "inpaint": "runs.inpaint",
    "restore": "runs.inpaint",
    "audit": "runs.audit",
    "audit_privacy": "runs.privacy",
    "bound": "runs.bound",
    "denoise": "runs.denoise",
    "score": "runs.score",
    "marks": "runs.marks",
    "export": "runs.export",
    "flow_likelihood": "runs.flow",
    "importance_bound": "runs.flow",
    "MedvdmError": "errors",
}

__version__ = importlib.metadata.version("medvdm")
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"medvdm.{_HOMES[name]}"), name)
    try:
        return importlib.import_module(f"medvdm.{name}")
    except ModuleNotFoundError as problem:
        if problem.name != f"medvdm.{name}":
            raise
        raise AttributeError(f"module 'medvdm' has no attribute '{name}'") from None


def __dir__() -> list[str]:
    return sorted(__all__)
