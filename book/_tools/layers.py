"""A Sphinx extension: a page in two layers, and figures that take the colours of the theme.

* A cell tagged ``check`` becomes one line, the one it printed, that opens to its code.
* A figure that is stored as SVG is put into the page itself: without its white ground, and with the page's ink in place
  of black. Pictures within it stay as they are.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)
#: Those of medvdm.plotting, each with a lighter one for dark pages (custom.css).
COLOURS = {"#0072b2": "blue", "#d55e00": "orange", "#009e73": "green", "#cc79a7": "pink"}
INK = re.compile(r"(fill|stroke): ?#(?:000000|262626)\b")
GRAY = re.compile(r"(fill|stroke): ?#555555\b")
RULE = re.compile(r"(fill|stroke): ?#e4e4e4\b", re.IGNORECASE)
GROUND = re.compile(r'<g id="patch_1">\s*<path [^>]*style="fill: ?#ffffff[^>]*/>\s*</g>')
WHITE = re.compile(r'(<path [^>]*style="[^"]*)fill: ?#ffffff')


def fold_checks(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """One line for each cell tagged check."""
    if app.builder.format != "html":
        return
    for cell in list(tree.findall(nodes.container)):
        if "tag_check" not in cell["classes"]:
            continue
        blocks = list(cell.findall(nodes.literal_block))
        lines = [b.astext().strip() for b in blocks if b.astext().startswith("checked: ")]
        if len(lines) != 1 or "\n" in lines[0]:
            LOG.warning("a cell tagged check printed %s lines; expected one", len(lines), location=docname)
            continue
        said = html.escape(lines[0].removeprefix("checked: "))
        head = f'<details class="check"><summary><span class="checked">checked</span> {said}</summary>'
        code = [block for block in blocks if not block.astext().startswith("checked: ")]
        cell.children = []
        cell["classes"] = ["cell", "tag_check"]
        cell.extend([nodes.raw("", head, format="html"), *code, nodes.raw("", "</details>", format="html")])


def inline_figures(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Each SVG of a cell's output as a part of the page."""
    if app.builder.format != "html":
        return
    for image in list(tree.findall(nodes.image)):
        uri = image.get("uri", "")
        if uri.endswith(".svg") and "jupyter_execute" in uri:
            path = Path(app.srcdir) / uri.lstrip("/")
            drawn = themed(path.read_text("utf8"), image.get("alt", ""), path.stem[:8])
            image.parent.replace(image, nodes.raw("", f'<div class="figure-scroll">{drawn}</div>', format="html"))


def themed(svg: str, alt: str, name: str) -> str:
    """An SVG of matplotlib as a part of a page: no ground, the page's ink, ids of its own, described by ``alt``."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = GROUND.sub("", svg, count=1)
    svg = WHITE.sub(r"\1fill: none", svg)
    svg = INK.sub(r"\1: currentColor", svg)
    svg = GRAY.sub(r"\1: var(--pst-color-text-muted)", svg)
    svg = RULE.sub(r"\1: var(--figure-rule)", svg)
    for colour, word in COLOURS.items():
        svg = re.sub(rf"(fill|stroke): ?{colour}\b", rf"\1: var(--figure-{word})", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, rest = svg.split(">", 1)
    width, height = (float(re.search(rf' {side}="([\d.]+)pt"', head)[1]) for side in ("width", "height"))
    view = f"0 0 {width:g} {height:g}"
    style = f"--width: {width * 96 / 72:.0f}px; max-width: var(--width)"
    said = f'role="img" aria-label="{html.escape(alt)}"'
    return f'<svg class="figure" viewBox="{view}" fill="currentColor" style="{style}" {said}>{rest}'


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("doctree-resolved", fold_checks)
    app.connect("doctree-resolved", inline_figures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
