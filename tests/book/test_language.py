"""One language: floor, excess, distortion and rate mean one thing each, and a result has one number on every page."""

import json
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "_tools"))

import record  # noqa: E402

TEXTS = sorted((BOOK / "text").glob("*.md"))
PLAIN = [ROOT / "README.md", *sorted(BOOK.glob("*.md"))]
LIBRARY = sorted((ROOT / "medvdm").rglob("*.py")) + sorted((BOOK / "experiments").glob("*.py"))
EVERYTHING = [*TEXTS, *PLAIN, *LIBRARY]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def code_of(path):
    """The code of a page or module, with comments."""
    if path.suffix == ".py":
        return path.read_text("utf8")
    return "\n".join(
        re.findall(r"^```(?:\{code-cell\}|python).*?^```", path.read_text("utf8"), re.MULTILINE | re.DOTALL)
    )


def words_of(path):
    """What people read: prose, captions and alt texts, without code, links and inline code."""
    text = path.read_text("utf8")
    shown = re.findall(r'(?:alt|caption): (["\'].*["\'])', text)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\([^)]*\)|`[^`]*`|\\[lr]floor", "", "\n".join([text, *shown]))


def found(pattern, text):
    return [match[0] for match in re.finditer(pattern, text, re.IGNORECASE | re.DOTALL)]


# --- Words -----------------------------------------------------------------------------------------------------------

#: Pages that read the Bernoulli cost of gray values, and so may speak of its floor.
OF_THE_FLOOR = """
README limits notation glossary cli paper reading index use
bound linear_gaussian autoencoder training whole figures floor linear_start schedule_variance audit eight_bit
""".split()


@pytest.mark.parametrize("path", [*TEXTS, *PLAIN], ids=name_of)
def test_floor_is_the_entropy_of_the_pixels_and_no_other_limit(path):
    said = found(r"[^.\n]{0,60}\bfloors?\b[^.\n]{0,40}", words_of(path))
    if path.stem in OF_THE_FLOOR:
        said = [words for words in said if re.search(r"noise floor|reach(es)? a floor|floor of (the )?noise", words)]
    assert [words for words in said if not re.search(r"\bno floor\b", words)] == []


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_excess_holds_the_rate_and_distortion_does_not(path):
    wrong = (
        r"\b\w*excess\w*(\([^()\n]*\))?(: float)?\s*(=|:).{0,120}?(reconstruction|_nll|cross_entropy)[^\n]*-[^\n]*floor"
    )
    assert found(wrong, code_of(path)) == []
    plane = r"(excess\}? *(\+|plus|against|over) *(\\text\{|the |its )?rate|rate against excess|excess over rate)"
    assert found(plane, path.read_text("utf8")) == []


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_a_share_is_said_with_per(path):
    amounts = "values?|numbers?|bits?|nats?|keys?|loss|losses|seconds|ms|files?|copies|maps?|labels?|seeds?|looks?"
    wholes = "image|pixel|patient|step|second|dimension|component|level|example"
    assert (
        found(rf"\b({amounts}) an? ({wholes})\b(?!'s| (costs?|takes?|needs?|of|has|is|with)\b)", path.read_text("utf8"))
        == []
    )


# --- Numbers ---------------------------------------------------------------------------------------------------------

#: Heads of columns that hold a number of the records.
COLUMNS = {
    r"^(negative )?(bound|total|cost)\b": "vlb_bpd",
    r"excess|above the floor": "excess_bpd",
    r"^rate\b": "rate_bits_per_image",
}
PAGES = ["README", "index", "whole", "figures", "linear_start"]


def markdown_of(page):
    """The README, or the text of a chapter with the tables that its cells have made."""
    if page == "README":
        return (ROOT / "README.md").read_text("utf8")
    cells = nbformat.read(BOOK / f"{page}.ipynb", 4).cells
    made = [
        o.data["text/markdown"] for c in cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})
    ]
    return "\n\n".join([*(c.source for c in cells if c.cell_type == "markdown"), *made])


def tables_of(text):
    """The rows of each table on our test patients, head first, as lists of cells without emphasis."""
    for lines in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [[cell.strip(" *`↓↑") for cell in line.strip()[1:-1].split("|")] for line in lines.splitlines()]
        if "NIH" in rows[0][0] and "test patients" in rows[0][0]:
            yield [rows[0], *rows[2:]]


def known(row):
    """The records that a row of a trained network stands for; none where it has no network, or stands for a step."""
    name = row.lower().replace("-", " ").replace("`", "").replace(",", "")
    if (steps := re.search(r"(\d+) steps", name)) is None:
        return []
    kind = "literal" if "literal" in name else "linear-start" if "linear start" in name else "paper"
    (records,) = (of for title, of in record.ROWS.items() if kind in title and f" {int(steps[1]):,} steps" in title)
    one = re.search(r"\bseed (\d)\b", name)
    return [records[int(one[1])]] if one else list(records)


def last(name, key):
    evaluations = json.loads((BOOK / "results" / f"{name}.json").read_text("utf8"))["evaluations"]
    return max((e for e in evaluations if e["split"] == "test"), key=lambda e: e["step"])[key]


def expected(row, key):
    """The number of a row, or None if the records hold none."""
    if of := known(row):
        return sum(last(name, key) for name in of) / len(of)
    for name, (bound, excess) in record.baselines().items():
        if name.lower() in row.lower():
            return {"vlb_bpd": bound, "excess_bpd": excess}.get(key)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_a_result_is_the_same_number_on_every_page(page):
    compared = 0
    for head, *rows in tables_of(markdown_of(page)):
        for row in rows:
            for title, cell in zip(head[1:], row[1:], strict=True):
                key = next((key for words, key in COLUMNS.items() if re.search(words, title.lower())), None)
                number = re.match(r"-?[\d,]+(\.\d+)?", cell)
                value = expected(row[0], key) if key and number else None
                if value is not None:
                    digits = len((number[1] or ".")[1:])
                    assert number[0].replace(",", "") == f"{value:.{digits}f}", f"{row[0]}, {title}"
                    compared += 1
    assert compared >= 6


@pytest.mark.parametrize("page", PAGES)
def test_a_row_of_three_seeds_is_their_mean_with_its_spread_and_a_row_of_one_says_so(page):
    for head, *rows in tables_of(markdown_of(page)):
        if not any(re.search("excess|above the floor", title.lower()) for title in head):
            continue
        counted = [column for column, title in enumerate(head) if title.lower().startswith("seeds")]
        for row in rows:
            of, said = known(row[0]), " ".join(row)
            if len(of) == 3:
                assert "SD" in said and (counted or "three seeds" in said or "3 seeds" in said), row
            elif of and "seed" not in row[0]:
                assert any(row[column] == "1" for column in counted), row


@pytest.mark.parametrize("page", PAGES)
def test_the_network_is_behind_the_linear_model_at_this_length_of_training(page):
    sentences = re.split(r"(?<=[.?!])\s+", re.sub(r"```.*?```", "", markdown_of(page), flags=re.DOTALL))
    behind = r"(worse than|behind|not ahead of|above) (a|the) (linear|closed)|beats the paper's network"
    length = r"steps|minutes|hour|length of training|short training|longer|so long"
    assert [s for s in sentences if re.search(behind, s) and not re.search(length, s)] == []


def test_the_rows_are_all_recorded_on_the_same_patients():
    found = [record.evaluations(row) for row in record.ROWS]
    assert {(e["num_images"], e["num_patients"], round(e["floor_bpd"], 6)) for of in found for e in of} == {
        (192, 125, 0.792026)
    }
    assert {len(of) for of in found} == {1, 3}
    seeds = [
        json.loads((BOOK / "results" / f"{name}.json").read_text("utf8"))["seed"]
        for name in record.ROWS["`paper`, 3,000 steps of 16"]
    ]
    assert seeds == [0, 1, 2]


def test_the_readers_of_a_page_find_its_tables():
    text = "| NIH, test patients | seeds | excess ↓ |\n|---|---|---|\n| *linear-Gaussian VDM* |  | *0.0195* |\n"
    ((head, row),) = tables_of(text)
    assert head == ["NIH, test patients", "seeds", "excess"] and row == ["linear-Gaussian VDM", "", "0.0195"]
    assert expected(row[0], "excess_bpd") == pytest.approx(0.0195, abs=5e-5)
    assert known("`paper`, 3,000 steps of 16, seed 1") == ["paper-nih-b16-s1"]
    assert jupytext.read(BOOK / "text" / "index.md").cells
