"""What the Sphinx extensions of the book make of a page."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book" / "_tools"))

import layers  # noqa: E402
import links  # noqa: E402


class App(SimpleNamespace):
    """As much of Sphinx as the links need: two chapters and a glossary."""

    def __init__(self):
        super().__init__(
            env=SimpleNamespace(
                docname="", toc_secnumbers={"book/a": {"": (1,)}, "book/b": {"": (2,)}}, toc_fignumbers={}
            ),
            builder=SimpleNamespace(format="html", get_relative_uri=lambda here, there: f"{there}.html"),
        )

    def read(self, docname, tree):
        self.env.docname = docname
        links.read(self, tree)
        return tree


def tree_of(*children):
    document = nodes.document(None, None)
    document.extend(children)
    return document


def paragraph(text):
    return nodes.paragraph("", text)


def glossary(**entries):
    items = [
        nodes.definition_list_item("", nodes.term("", name), nodes.definition("", paragraph(text)))
        for name, text in entries.items()
    ]
    return tree_of(nodes.definition_list("", *items))


@pytest.fixture
def book():
    app = App()
    first = app.read(
        "book/a", tree_of(nodes.math_block("", r"a = b \tag{1.1}"), paragraph("By (1.1), a schedule of (0.25)."))
    )
    second = app.read(
        "book/b", tree_of(paragraph("With (1.1) and Schedules: a schedule."), nodes.literal("", "(1.1) schedule"))
    )
    terms = app.read("book/glossary", glossary(schedule="Bits per image. Chapter 1, chapter 2.", fit="To train."))
    return SimpleNamespace(app=app, first=first, second=second, terms=terms)


def anchors(tree):
    return [(link.astext(), link["refuri"]) for link in tree.findall(nodes.reference)]


def test_references_lead_to_equations_and_back(book, monkeypatch):
    said = []
    monkeypatch.setattr(links.LOG, "warning", lambda message, *args, **more: said.append(message % args))
    links.resolve(book.app, book.first, "book/a")
    links.resolve(book.app, book.second, "book/b")
    assert ("(1.1)", "#eq-1-1") in anchors(book.first)  # on the page itself
    assert ("2", "book/b.html") in anchors(book.first)  # "used in 2"
    assert ("(1.1)", "book/a.html#eq-1-1") in anchors(book.second)
    assert said == ["(0.25) is no equation of the book"]


def test_the_first_use_of_a_term_links_and_code_does_not(book):
    links.resolve(book.app, book.second, "book/b")
    found = [link for link in book.second.findall(nodes.reference) if "term" in link["classes"]]
    assert [link.astext() for link in found] == ["Schedules"]
    assert found[0]["refuri"] == "book/glossary.html#term-schedule" and found[0]["reftitle"] == "Bits per image."
    assert list(book.second.findall(nodes.literal))[0].astext() == "(1.1) schedule"
    links.resolve(book.app, book.terms, "book/glossary")
    assert ("2", "book/b.html") in anchors(book.terms)


def test_a_name_links_as_it_is_written_and_a_word_in_any_case():
    pattern = links._terms_pattern({"FiLM", "Bernoulli distribution", "skip"})
    found = pattern.findall("A film by FiLM. Skips and a skip. A bernoulli distribution, to skipping.")
    assert found == ["FiLM", "Skips", "skip", "bernoulli distribution"]


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"q(z_s \mid z_t, x)", "q(zₛ | zₜ, x)"),
        (r"D_\mathrm{KL}(q \,\Vert\, p)", "D_KL(q ‖ p)"),
        (r"\gamma = -\log\mathrm{SNR}", "γ = -logSNR"),
        (r"\log \frac{p}{1 - p}", "log p/(1 - p)"),
        (r"\hat\epsilon + v^\top A v / \sigma_t^2", "ε̂ + vᵀ A v / σₜ²"),
    ],
)
def test_a_formula_in_a_definition_is_shown_as_text(tex, text):
    assert links.unicode_math(tex) == text


def test_a_page_that_is_read_anew_forgets_its_equations(book):
    links.forget(book.app, book.app.env, "book/a")
    assert links._state(book.app.env)["equations"] == {}


def test_a_wrong_number_of_a_figure_is_a_warning(book, monkeypatch):
    said = []
    monkeypatch.setattr(links.LOG, "warning", lambda message, *args, **more: said.append(message % args))
    book.app.env.toc_fignumbers = {"book/a": {"figure": {"fig-a": (1, 1)}}}
    names = [("figure 1.1", "#fig-a"), ("figure 1.2", "#fig-a"), ("this", "#fig-b"), ("figure 1.1", "#end")]
    tree = tree_of(paragraph(""))
    for text, target in names:
        tree[0] += nodes.reference("", text, refuri=target)
    links.resolve(book.app, tree, "book/a")
    assert said == [
        "'figure 1.2' links to figure 1.1",
        "'this' links to #fig-b, which is no figure",
        "'figure 1.1' links to no figure, but to 'end'",
    ]


def test_needs_are_drawn_without_what_another_chapter_needs_already(book):
    book.app.env.titles = {f"book/{page}": nodes.title("", page) for page in "abc"}
    svg = links._map_svg(book.app, "book/reading", {1: "book/a", 2: "book/b", 3: "book/c"}, {1: [], 2: [1], 3: [1, 2]})
    assert 'data-from="3" data-to="2"' in svg and 'data-from="3" data-to="1"' not in svg
    assert 'data-chapter="3" data-needs="1 2"' in svg and "chapter 1 needs nothing before it" in svg


# --- Layers ------------------------------------------------------------------------------------------------------


def cell(*printed):
    blocks = [nodes.literal_block("assert x", "assert x"), *(nodes.literal_block(p, p) for p in printed)]
    return tree_of(nodes.container("", *blocks, classes=["cell", "tag_check"]))


def test_a_check_is_folded_to_the_line_that_it_printed(book):
    tree = cell("checked: a < b, largest error 3e-07")
    layers.fold_checks(book.app, tree, "book/a")
    head, code, _ = tree[0].children
    assert "a &lt; b, largest error 3e-07</summary>" in head.astext() and code.astext() == "assert x"


@pytest.mark.parametrize("printed", [(), ("checked: a, b", "checked: c, d"), ("checked: a\nchecked: b",)])
def test_a_check_that_did_not_print_one_line_is_a_warning(book, monkeypatch, printed):
    said = []
    monkeypatch.setattr(layers.LOG, "warning", lambda message, *args, **more: said.append(message % args))
    layers.fold_checks(book.app, cell(*printed), "book/a")
    assert len(said) == 1 and "expected one" in said[0]


def test_a_figure_takes_the_ink_of_the_page_and_keeps_its_picture(monkeypatch):
    import numpy as np

    from medvdm import plotting

    figure, axes = plotting.subplots()
    axes.plot([0, 1], [0, 1])
    axes.plot([0, 1], [1, 0], color="#000000")
    axes.imshow(np.eye(4), cmap="gray")
    stored = figure._repr_mimebundle_()["image/svg+xml"]
    drawn = layers.themed(stored, 'what "it" shows', "n1")
    assert drawn.startswith("<svg ") and 'aria-label="what &quot;it&quot; shows"' in drawn
    for gone in ("#ffffff", "#000000", "#555555", "<style", "<?xml", "#0072b2"):
        assert gone in stored and gone not in drawn, gone
    assert "stroke: currentColor" in drawn and "var(--figure-blue)" in drawn and "data:image/png;base64," in drawn
    assert 'id="n1-figure_1"' in drawn and "url(#n1-" in drawn


def test_a_stored_figure_is_small_and_draws_the_same():
    import notebooks

    svg = '<?xml?>\n<svg><metadata>x</metadata>\n <path d="M 1.23456 -0.001\nL 3 4.5" transform="scale(0.0156)"/></svg>'
    assert notebooks._small_svg(svg) == '<svg>\n<path d="M 1.23 -0 L 3 4.5" transform="scale(0.0156)"/></svg>'
