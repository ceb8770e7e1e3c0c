"""Numbers of the records in the text of the pages: they resolve, and what does not resolve is named."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "_tools"))

import results  # noqa: E402

PAGES = [p for p in (*BOOK.glob("*.md"), *(BOOK / "text").glob("*.md")) if results.references(p.read_text("utf8"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two records of one experiment."""
    folder = tmp_path_factory.mktemp("results")
    for name, bits in {"a": 1.0, "a-s1": 2.0}.items():
        rows = [{"split": "test", "w": 0.5, "bits": bits, "own": True}, {"split": "test", "w": 2, "bits": -bits}]
        record = {"name": name, "rows": rows, "by": {"no finding": [3, 4.5]}, "lost": 0.25, "images": 12_345}
        (folder / f"{name}.json").write_text(json.dumps(record), "utf8")
    return folder


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("a:name", "a"),
        ("a:images", "12345"),
        ("a:images|,", "12,345"),
        ("a:lost|.0%", "25%"),
        ("a:by.no finding.1|.2f", "4.50"),
        ("a:by.no finding[0]", "3"),
        ("a:rows.-1.bits|.1f", "\N{MINUS SIGN}1.0"),
        ("a:rows[split=test].bits|.1f", "1.0"),
        ("a:rows[split=test,w=2].bits|+.1f", "\N{MINUS SIGN}1.0"),
        ("a:rows[w=0.50, own=True].bits|+.1f", "+1.0"),
        ("mean(a, a-s1):rows[split=test].bits|.2f", "1.50"),
        ("sd(a, a-s1):rows[split=test].bits|.3f", "0.707"),
        ("a:lost + a-s1:rows.0.bits|.2f", "2.25"),
        ("a:lost - mean(a, a-s1):rows.0.bits|.2f", "\N{MINUS SIGN}1.25"),
        ("a:images / a:by.no finding.0|,.0f", "4,115"),
    ],
)
def test_a_reference_is_the_value_in_its_format(reference, text, folder):
    assert results.resolve(reference, folder) == text


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("a", "expected RECORD:path"),
        ("a:", "expected RECORD:path"),
        ("b:name", "there is no record 'b'"),
        ("../a:name", "there is no record"),
        ("a:lots", "no 'lots' in the record, which has name, rows"),
        ("a:by.none", "no 'none' in 'by', which has no finding"),
        ("a:rows.2.bits", "no '2' in 'rows'"),
        ("a:rows[split=train].bits", r"no '\[split=train\]' in 'rows'"),
        ("a:by[split=test].bits", r"no '\[split=test\]' in 'by'"),
        ("a:rows[0", r"cannot read the path from '\[0'"),
        ("a:rows", "expected a number or a text, found list"),
        ("a:rows.0.own", "found bool"),
        ("a:name|.3f", "'.3f' is no format for 'a'"),
        ("a:name + a:lost", r"cannot take 'a' \+ 0.25"),
        ("a:lost + rows", "expected RECORD:path"),
        ("median(a, a-s1):lost", "expected mean"),
        ("sd(a):lost", "of two or more numbers"),
        ("mean(a, a-s1):name", "of two or more numbers"),
    ],
)
def test_a_wrong_reference_is_named_in_one_line(reference, why, folder):
    with pytest.raises(ValueError, match=why) as raised:
        results.resolve(reference, folder)
    assert "\n" not in str(raised.value) and reference in str(raised.value)


def test_a_page_with_its_values(folder):
    page = "Of {result}`a:images|,` images, {result}`a:lost|.0%`.\n\n| a | {result}`a:rows[0].bits\\|.1f` |\n"
    assert results.references(page) == ["a:images|,", "a:lost|.0%", "a:rows[0].bits|.1f"]
    assert [results.resolve(one, folder) for one in results.references(page)] == ["12,345", "25%", "1.0"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_result_on_a_page_resolves(path):
    content = path.read_text("utf8")
    assert all(map(results.resolve, results.references(content)))
    for line in content.splitlines():  # an unescaped | would end the cell of a table
        assert not line.startswith("|") or all(
            "|" not in role.replace("\\|", "") for role in results._ROLE.findall(line)
        )


# --- What a page says in words about numbers of the records ----------------------------------------------------------


@pytest.mark.parametrize("name", ["quality", "quality-pixel", "quality-pixel-cascade"])
def test_no_more_samples_than_unseen_images_are_near_the_training_images(name):
    """As chapters 19 and 23 and the page on limits say, in both spaces."""
    rows = json.loads((results.RESULTS / f"{name}.json").read_text("utf8"))["results"]["nearest"]
    nearer = {(row["run"], row["space"], row["set"]): row["nearer_than_any_held_out"] for row in rows}
    of_samples = {key[:2]: value for key, value in nearer.items() if key[2] == "samples"}
    assert of_samples and all(value <= nearer[*key, "real"] for key, value in of_samples.items())


def test_the_words_of_the_page_on_limits_fit_its_numbers():
    page = (BOOK / "limits.md").read_text("utf8")
    images, ten = int(results.resolve("paper-nih-b16:data.counts.train.images")), "which takes ten bits"
    assert ten in page and math.ceil(math.log2(images)) == 10
    bits = {
        name: float(results.resolve(f"{name}:evaluations[split=test].vlb_bpd"))
        for name in ("pixel-nih", "pixel-large-nih", "pixel-cascade-nih")
    }
    assert f"spend {{result}}`{min(bits, key=bits.get)}:evaluations" in page  # "or more", so the fewest


def test_the_words_of_the_page_about_the_paper_fit_its_numbers():
    """Its 0.869 lies between three and two principal components, and the network passes it after 300 steps."""
    own = "floors:results.floors[data=nih,size=256,split=test].floor_bpd"
    of = "floors:results.predictors[data=nih,size=256,predictor=PCA-{}].distortion_bpd"
    three, two = (float(results.resolve(f"{own} + {of.format(k)}")) for k in (3, 2))
    assert three < 0.869 < two
    steps = [
        json.loads((results.RESULTS / f"paper-nih-b16{seed}.json").read_text("utf8"))["config"]["training"]["steps"]
        for seed in ("", "-s1", "-s2")
    ]
    assert steps == [3000] * 3
