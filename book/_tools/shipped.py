"""A Sphinx extension: what the pages come with, and what they do not.

With the weights of the model that comes with the package, for the start page to draw with. They are written from the
package's own file when the pages are built: ``_static/model/phantom.bin``, all arrays as float16 one after another, and
``phantom.json``, which says where each begins and what the network is.

Without the scripts of sphinx-thebe, which Jupyter Book always adds: cells run on Colab, Binder or at home, not on the
page, and the address of another host is on none of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sphinx.application import Sphinx

PACKAGE = Path(__file__).resolve().parents[2] / "medvdm" / "pretrained" / "phantom"


def write(folder: Path, package: Path = PACKAGE) -> None:
    """Write both files into a folder."""
    model = json.loads((package / "config.json").read_text("utf8"))["config"]["model"]
    kinds = {"architecture": "unet", "details": "contrast", "attention": False, "rounding": True, "reduce": 0}
    assert {name: model[name] for name in kinds} == kinds, "unet.js draws with a network of this kind only"
    with np.load(package / "weights.npz") as stored:
        arrays = {name: np.ascontiguousarray(stored[name], "<f2") for name in stored.files}
    starts = np.cumsum([0, *(array.size for array in arrays.values())])
    about = {
        "size": model["image_shape"][0],
        "embedding": model["embedding_dim"],
        **{name: model[name] for name in ("width", "scales", "blocks", "patch", "gamma_min", "gamma_max")},
        "weights": {
            name: {"start": int(start), "shape": list(array.shape)}
            for (name, array), start in zip(arrays.items(), starts[:-1], strict=True)
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phantom.json").write_text(json.dumps(about), "utf8")
    (folder / "phantom.bin").write_bytes(b"".join(array.tobytes() for array in arrays.values()))


def finished(app: Sphinx, problem: Exception | None) -> None:
    """When the pages are built."""
    if problem is None and app.builder.format == "html":
        write(Path(app.outdir) / "_static" / "model")


def draws(app: Sphinx, page: str, *_: Any) -> None:
    """Give the start page, and no other, the script that draws."""
    if page == app.config.root_doc:
        app.add_js_file("model/draw.js")


def without_thebe(app: Sphinx) -> None:
    """Take sphinx-thebe off all events, and its style off all pages."""
    app.registry.css_files[:] = [file for file in app.registry.css_files if "thebe" not in file[0]]
    for listeners in app.events.listeners.values():
        for listener in [*listeners]:
            if listener.handler.__module__.split(".")[0] == "sphinx_thebe":
                app.disconnect(listener.id)


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("config-inited", lambda app, _: without_thebe(app), priority=999)
    app.connect("build-finished", finished)
    app.connect("html-page-context", draws)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
