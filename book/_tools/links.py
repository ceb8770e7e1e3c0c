"""A Sphinx extension: the pages of the book refer to each other by themselves.

* "(6.11)" in prose links to its equation; below an equation stand the other pages that use it.
* A term of the glossary links to its entry where a page first uses it, and shows its definition when pointed at; below
  an entry stand the pages that use it.
* The number in "[figure 4.2](#fig-...)" is held against that of the figure.
* ``{needs-map}`` draws which chapter needs which, from the chapters' own lines "**Needs**: ...".
* ``{result}`RECORD:path|.3f` `` is a number of a record, see results.py.

A reference to an equation that is not there, and a figure's number that is wrong, are warnings, which fail the build.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

import results

LOG = logging.getLogger(__name__)
TAG = re.compile(r"\\tag\{((?:\d+|S)\.\d+)\}")
REFERENCE = re.compile(r"\(((?:\d{1,2}|S)\.\d{1,2})\)")
FIGURE = re.compile(r"[Ff]igure (\d+\.\d+)$")
GLOSSARY = "book/glossary"
#: Pages that do not link terms, and entries that every page would link, or that are common words with other meanings.
UNLINKING = ("book/api", "book/bibliography", "book/notation", GLOSSARY)
COMMON = (
    "attention audit bound cell crop divergence exposure gaps latent noise null patch run score skip split step time"
)
UNLINKED = {*COMMON.split(), "v"}
#: Words that are a term in some company only.
IN_COMPANY = {"rate": r"(?<=the )rate(?! of)|(?<=distortion and )rate"}
#: What is no prose: a reference or a term in it stays as it is.
SOLID = (nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.title, nodes.raw)
SOLID += (nodes.comment,)


# --- Reading: what each page has and uses ------------------------------------------------------------------------


def _state(env: Any) -> dict[str, Any]:
    """What is known of all pages: equations by tag, terms by name, uses of both, needs by page."""
    if not hasattr(env, "medvdm_links"):
        env.medvdm_links = {"equations": {}, "terms": {}, "uses": {}, "term_uses": {}, "needs": {}}
    return env.medvdm_links


def forget(app: Sphinx, env: Any, docname: str) -> None:
    """Drop what a page had before it is read anew."""
    state = _state(env)
    state["equations"] = {tag: doc for tag, doc in state["equations"].items() if doc != docname}
    for kind in ("uses", "term_uses", "needs"):
        state[kind].pop(docname, None)
    if docname == GLOSSARY:
        state["terms"] = {}


def read(app: Sphinx, tree: nodes.document) -> None:
    """Give equations and terms their anchors, and note what the page uses."""
    env, docname = app.env, app.env.docname
    state = _state(env)
    for block in tree.findall(nodes.math_block):
        for tag in TAG.findall(block.astext()):
            state["equations"][tag] = docname
            block["ids"].append(_anchor(tag))
    if docname == GLOSSARY:
        for item in tree.findall(nodes.definition_list_item):
            term, definition = item.children[0], item.children[-1]
            name = term.astext()
            term["ids"].append("term-" + nodes.make_id(name))
            state["terms"][name] = (term["ids"][-1], _plain(definition))
    prose = list(_prose(tree))
    state["uses"][docname] = {tag for text in prose for tag in REFERENCE.findall(text.astext())}
    state["term_uses"][docname] = "\n".join(text.astext() for text in prose)
    for paragraph in tree.findall(nodes.paragraph):
        if "Needs:" in paragraph.astext():
            links = paragraph.astext().split("Needs:", 1)[1]
            state["needs"][docname] = [int(n) for n in re.findall(r"\b(\d{1,2})\b", links)]
            break


def _anchor(tag: str) -> str:
    return "eq-" + tag.replace(".", "-").lower()


def _plain(definition: nodes.Node) -> str:
    """A definition as one line of text, without mathematical markup and without the list of chapters at its end."""
    definition = definition.deepcopy()
    for formula in list(definition.findall(nodes.math)):
        formula.parent.replace(formula, nodes.Text(unicode_math(formula.astext())))
    text = " ".join(definition.astext().split())
    return re.sub(r"\s*(?:,? ?[Cc]hapters? \d+(?: and \d+)?)+\.?$", "", text).rstrip(" ,")


SIGNS = {"mid": "|", "Vert": "‖", "cdot": "·", "top": "ᵀ", "ge": "≥", "le": "≤", "sim": "~", "infty": "∞", "sqrt": "√"}
SIGNS |= {"alpha": "α", "beta": "β", "gamma": "γ", "epsilon": "ε", "sigma": "σ", "lambda": "λ", "mu": "μ", "pi": "π"}
LOWERED = str.maketrans("0123456789st", "₀₁₂₃₄₅₆₇₈₉ₛₜ")


def unicode_math(tex: str) -> str:
    """A short formula as text, such as the ones in definitions."""
    tex = re.sub(r"\\(?:mathrm|mathcal|mathbb|text|operatorname)\{([^}]*)\}", r"\1", tex)
    tex = re.sub(r"\\hat\s*(?:\{(\S+?)\}|(\\?\w+))", lambda m: (m[1] or m[2]) + "\u0302", tex)
    tex = re.sub(r"\\t?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/(\2)", tex)
    tex = re.sub(r"\\([a-zA-Z]+)", lambda m: SIGNS.get(m[1], m[1]), tex)
    tex = re.sub(r"_(?:\{(\w+)\}|([0-9st]))", lambda m: (m[1] or m[2]).translate(LOWERED), tex)
    tex = tex.replace("^2", "²").replace("^ᵀ", "ᵀ")
    return re.sub(r"\\[,;! ]|[{}$]", "", tex)


def _prose(tree: nodes.Node) -> list[nodes.Text]:
    """The texts of paragraphs, items and captions, without code, mathematics, headings and links."""
    return [text for text in tree.findall(nodes.Text) if not _inside(text, SOLID)]


def _inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    parent = node.parent
    while parent is not None:
        if isinstance(parent, nodes.caption):  # of a figure, which is the output of a cell
            return False
        if isinstance(parent, kinds) or "cell" in getattr(parent, "attributes", {}).get("classes", []):
            return True
        parent = parent.parent
    return False


# --- Writing: links in both directions ---------------------------------------------------------------------------


def resolve(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Turn the references of a page into links, and add those that lead back."""
    if app.builder.format != "html":
        return
    state = _state(app.env)
    if docname.startswith("book/"):
        _used_in(app, tree, docname, state)
        _link_equations(app, tree, docname, state)
        if not docname.startswith(UNLINKING):
            _link_terms(app, tree, docname, state)
        _check_figures(app, tree, docname)


def _link_equations(app: Sphinx, tree: nodes.document, docname: str, state: dict[str, Any]) -> None:
    for text in _prose(tree):
        pieces, last, content = [], 0, text.astext()
        for found in REFERENCE.finditer(content):
            home = state["equations"].get(found[1])
            if home is None:
                LOG.warning("(%s) is no equation of the book", found[1], location=docname)
                continue
            pieces += [
                nodes.Text(content[last : found.start()]),
                _link(app, docname, home, _anchor(found[1]), found[0]),
            ]
            last = found.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(content[last:])])


def _link_terms(app: Sphinx, tree: nodes.document, docname: str, state: dict[str, Any]) -> None:
    """The first use of each term on the page."""
    left = {name for name in state["terms"] if name.lower() not in UNLINKED}
    if not left:
        return
    for text in _prose(tree):
        content, pieces, last = text.astext(), [], 0
        pattern = _terms_pattern(left)
        for found in pattern.finditer(content):
            name = _named(found[1], state["terms"])
            if name not in left:
                continue
            left.discard(name)
            anchor, definition = state["terms"][name]
            link = _link(app, docname, GLOSSARY, anchor, found[1])
            link["classes"] = ["term"]
            link["reftitle"] = definition
            pieces += [nodes.Text(content[last : found.start()]), link]
            last = found.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(content[last:])])
        if not left:
            return


def _terms_pattern(names: set[str]) -> re.Pattern[str]:
    """Any of the terms, the longest first, with a plural s; in any case, but for names such as FiLM."""
    longest = sorted(names, key=len, reverse=True)
    words = [
        IN_COMPANY.get(name) or (re.escape(name) if _is_name(name) else f"(?i:{re.escape(name)})") for name in longest
    ]
    return re.compile(rf"(?<![\w-])((?:{'|'.join(words)})s?)(?![\w-])")


def _is_name(term: str) -> bool:
    """Whether a term has capitals beyond its first letter."""
    return term[1:] != term[1:].lower()


def _named(text: str, names: dict[str, Any]) -> str:
    """The entry that a text of the pattern stands for."""
    by_lower = {name.lower(): name for name in names}
    return by_lower.get(text.lower()) or by_lower.get(text.lower().removesuffix("s"), "")


def _used_in(app: Sphinx, tree: nodes.document, docname: str, state: dict[str, Any]) -> None:
    numbers = _chapter_numbers(app)
    for block in list(tree.findall(nodes.math_block)):
        tags = TAG.findall(block.astext())
        users = [d for d in numbers if d != docname and state["uses"].get(d, set()) & set(tags)]
        if users:
            _after(block, _back(app, docname, users, numbers))
    if docname == GLOSSARY:
        for item in tree.findall(nodes.definition_list_item):
            name = item.children[0].astext()
            if name.lower() in UNLINKED:
                continue
            pattern = _terms_pattern({name})
            users = [d for d in numbers if pattern.search(state["term_uses"].get(d, ""))]
            if users:
                item.children[-1].append(_back(app, docname, users, numbers))


def _back(app: Sphinx, docname: str, users: list[str], numbers: dict[str, int]) -> nodes.paragraph:
    """The line 'used in 7, 12', each number a link to the chapter."""
    line = nodes.paragraph("", "", nodes.Text("used in "), classes=["used-in"])
    for i, user in enumerate(users):
        if i:
            line += nodes.Text(", ")
        line += _link(app, docname, user, "", str(numbers[user]))
    return line


def _after(block: nodes.Node, line: nodes.Node) -> None:
    """Behind a formula, also where it stands within a paragraph of its own."""
    where = block.parent if isinstance(block.parent, nodes.paragraph) else block
    where.parent.insert(where.parent.index(where) + 1, line)


def _link(app: Sphinx, docname: str, home: str, anchor: str, text: str) -> nodes.reference:
    uri = "" if home == docname else app.builder.get_relative_uri(docname, home)
    uri += f"#{anchor}" if anchor else ""
    return nodes.reference("", text, internal=True, refuri=uri, classes=["equation-link"] if anchor else [])


def _chapter_numbers(app: Sphinx) -> dict[str, int]:
    """Number of each numbered chapter by page, in order."""
    numbers = {doc: found[""][0] for doc, found in app.env.toc_secnumbers.items() if found.get("")}
    return dict(sorted(numbers.items(), key=lambda pair: pair[1]))


def _check_figures(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """The number that is written is the number that the figure has."""
    numbers = {
        label: ".".join(map(str, number))
        for by_label in [found.get("figure", {}) for found in app.env.toc_fignumbers.values()]
        for label, number in by_label.items()
    }
    for link in tree.findall(nodes.reference):
        target = link.get("refid") or link.get("refuri", "").rpartition("#")[2]
        written = FIGURE.search(link.astext())
        if written and target in numbers and written[1] != numbers[target]:
            LOG.warning("'%s' links to figure %s", link.astext(), numbers[target], location=docname)
        elif target.startswith("fig-") and target not in numbers:
            LOG.warning("'%s' links to #%s, which is no figure", link.astext(), target, location=docname)
        elif written and target not in numbers:
            LOG.warning("'%s' links to no figure, but to '%s'", link.astext(), target, location=docname)


# --- The map of the chapters -------------------------------------------------------------------------------------


class NeedsMap(SphinxDirective):
    """Which chapter needs which: a place that is filled when all pages are read."""

    def run(self) -> list[nodes.Node]:
        """An empty container of the class needs-map."""
        return [nodes.container(classes=["needs-map"])]


def draw_map(app: Sphinx, tree: nodes.document, docname: str) -> None:
    """Fill the place: one line per chapter, arcs from each to those that it needs."""
    for place in tree.findall(nodes.container):
        if "needs-map" not in place["classes"]:
            continue
        numbers = _chapter_numbers(app)
        pages = {number: doc for doc, number in numbers.items()}
        needs: dict[int, list[int]] = {number: [] for number in pages}
        for number, doc in pages.items():
            for other in _state(app.env)["needs"].get(doc, []):
                if other in pages and other < number:  # no arcs in a circle
                    needs[number].append(other)
                else:
                    LOG.warning("chapter %s says that it needs chapter %s", number, other, location=doc)
        place += nodes.raw("", _map_svg(app, docname, pages, needs), format="html")


def _map_svg(app: Sphinx, docname: str, pages: dict[int, str], needs: dict[int, list[int]]) -> str:
    """Arcs on the left, names on the right; only what is not needed through another chapter already."""
    row, left = 26, 190

    def all_needs(number: int) -> set[int]:
        return set(needs[number]).union(*(all_needs(other) for other in needs[number])) if needs[number] else set()

    height = row * len(pages) + 8
    out = [f'<svg class="map" viewBox="0 0 720 {height}" role="img" aria-label="{_map_text(needs)}">']
    where = {number: row * (i + 0.5) + 4 for i, number in enumerate(sorted(pages))}
    for number, needed in needs.items():
        through = set().union(*(all_needs(other) for other in needed)) if needed else set()
        for other in sorted(set(needed) - through):
            y0, y1 = where[other], where[number]
            reach = min(left - 10, 22 + (y1 - y0) * 0.55)
            path = f"M {left} {y0:.0f} C {left - reach:.0f} {y0:.0f} {left - reach:.0f} {y1:.0f} {left} {y1:.0f}"
            out.append(f'<path data-from="{number}" data-to="{other}" d="{path}"/>')
    for number, doc in sorted(pages.items()):
        title = html.escape(app.env.titles[doc].astext())
        uri = app.builder.get_relative_uri(docname, doc)
        y = where[number]
        wanted = " ".join(map(str, sorted(all_needs(number))))
        out.append(
            f'<a href="{uri}" data-chapter="{number}" data-needs="{wanted}"><circle cx="{left}" cy="{y:.0f}" r="4"/>'
            f'<text x="{left + 14}" y="{y + 5:.0f}"><tspan class="number">{number}</tspan>'
            f'<tspan x="{left + 42}">{title}</tspan></text></a>'
        )
    return "\n".join([*out, "</svg>"])


def _map_text(needs: dict[int, list[int]]) -> str:
    """The map in words, for those who do not see it."""
    return "; ".join(
        f"chapter {number} needs {', '.join(map(str, needed)) or 'nothing before it'}"
        for number, needed in needs.items()
    )


# --- Numbers of records ------------------------------------------------------------------------------------------


class Result(SphinxRole):
    """A number of a record, such as ``{result}`floors:results.floors[split=test].floor_bpd|.3f` ``."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The number as text; a reference that leads nowhere is a warning."""
        folder = Path(self.env.srcdir) / "book" / "results"
        try:
            return [nodes.Text(results.resolve(self.text, folder))], []
        except ValueError as problem:
            LOG.warning("%s", problem, location=self.get_location())
            return [nodes.Text("?")], []


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("env-purge-doc", forget)
    app.connect("doctree-read", read)
    app.connect("doctree-resolved", resolve)
    app.connect("doctree-resolved", draw_map)
    app.add_directive("needs-map", NeedsMap)
    app.add_role("result", Result())
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
