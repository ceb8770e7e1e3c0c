"""What a notebook shows besides figures."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from medvdm import plotting
from medvdm.errors import InputError
from medvdm.notebook import checked, checked_mean, checked_that, interactive, over_seeds, table


def test_a_check_prints_its_largest_error(capsys):
    checked("halves", [1.0, 2.0], [1.0, 2.0003], atol=1e-3, of="2 numbers")
    checked("halves", [1.0, 2.0], [1.0, 2.002], rtol=1e-2)
    assert capsys.readouterr().out.splitlines() == [
        "checked: halves, largest error 3e-04 of 2 numbers",
        "checked: halves, largest relative error 1e-03",
    ]


def test_a_check_fails_where_the_routes_part():
    with pytest.raises(AssertionError, match="halves"):
        checked("halves", [1.0, 2.0], 1.0, atol=0.9)
    with pytest.raises(AssertionError):
        checked("nothing is no number", np.nan, 1.0, atol=1.0)
    with pytest.raises(InputError, match="rtol 0.0 and atol 0.0"):
        checked("halves", 1.0, 1.0)
    with pytest.raises(InputError, match="compares nothing"):
        checked("halves", [], [], atol=1.0)


def test_a_mean_is_held_to_its_standard_error(capsys):
    draws = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
    checked_mean("the mean", draws, 3.0)
    off = abs(draws.mean() - 3.0) / (draws.std(ddof=1) / 100)
    assert capsys.readouterr().out == f"checked: the mean, {off:.1f} standard errors off in 10,000 draws\n"
    with pytest.raises(AssertionError, match="the mean"):
        checked_mean("the mean", draws, 3.2)
    with pytest.raises(InputError, match="1 samples"):
        checked_mean("the mean", [1.0], 1.0)


def test_a_claim_says_by_how_much(capsys):
    checked_that("rising", np.diff([1, 2, 4]) > 0, "least step 1")
    assert capsys.readouterr().out == "checked: rising, least step 1\n"
    with pytest.raises(AssertionError, match="rising: not so; least step -1"):
        checked_that("rising", np.diff([1, 0, 4]) > 0, "least step -1")


def test_a_table_marks_the_best_of_the_models_and_never_a_yardstick():
    found = table(
        {"floor": [0.79, None], "a": [(0.8123, 0.0021), 1234.0], "b": [0.8119, -3.0], "c": [0.9, "no"]},
        {"bits": "low", "PSNR, dB": "high"},
        digits=[3, 0],
        yardsticks=1,
        corner="model",
    )
    assert found._repr_markdown_().splitlines() == [
        "| model | bits ↓ | PSNR, dB ↑ |",
        "|---|---:|---:|",
        "| *floor* | *0.790* |  |",
        "| a | **0.812 ± 0.002** | **1,234** |",
        "| b | **0.812** | −3 |",  # equal as printed, so both are marked
        "| c | 0.900 | no |",
    ]


def test_seeds_show_their_mean_and_how_far_they_lie_apart():
    three, alike = ([{"excess_bpd": x} for x in values] for values in ([0.01, 0.03, 0.02], [0.5, 0.50001, 0.5]))
    found = over_seeds(three)
    assert found == pytest.approx((0.02, np.std([0.01, 0.03, 0.02], ddof=1), 3))
    rows = {"three": [found], "alike": [over_seeds(alike)], "one": [over_seeds([{"excess_bpd": 0.04}])]}
    assert repr(table(rows, {"excess": "low"})).splitlines()[2:] == [
        "| three | **0.020 (SD 0.010)** |",
        "| alike | 0.500 (SD < 0.001) |",
        "| one | 0.040 |",
    ]
    with pytest.raises(InputError, match="no evaluation"):
        over_seeds([])


def test_a_column_without_a_direction_has_no_best():
    assert "**" not in repr(table({"a": [1.0], "b": [2.0]}, {"seed": None}))


def test_rows_and_digits_must_fit_the_columns():
    with pytest.raises(InputError, match="'a' has 1 entries; expected 2"):
        table({"a": [1.0]}, {"x": None, "y": None})
    with pytest.raises(InputError, match="digits: 2 for 1 columns"):
        table({"a": [1.0]}, {"x": None}, digits=[1, 2])


def test_a_figure_that_moves_is_a_picture_and_its_data():
    figure, _ = plotting.subplots(height=1.0, width=2.0)
    images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    data = {"images": images, "x": np.array([1 / 3, 2.0]), "n": np.int64(4), "name": "a</script>b", "none": None}
    shown = interactive("noise", data, figure, alt="A line that falls & a dot")._repr_mimebundle_()
    markup = shown["text/html"]
    assert shown["text/plain"] == "A line that falls & a dot"
    assert 'data-moving="noise"' in markup and 'alt="A line that falls &amp; a dot"' in markup
    assert markup.count("</script>") == 1  # no text of the data ends the script
    found = json.loads(markup.split('<script type="application/json">')[1].split("</script>")[0])
    assert found["x"] == [0.3333333, 2.0] and found["n"] == 4 and found["name"] == "a</script>b"
    sheet = found["images"]
    assert (sheet["count"], sheet["height"], sheet["width"]) == (2, 3, 5)
    for source in (sheet["png"], markup.split('src="')[1].split('"')[0]):
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        if picture.mode == "L":
            np.testing.assert_array_equal(np.asarray(picture).reshape(2, 3, 5), images)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"kind": "a b"}, "kind"), ({"alt": "dots"}, "alt"), ({"data": {"x": np.nan}}, "finite")],
)
def test_a_figure_that_moves_needs_a_name_words_and_numbers(change, word):
    figure, _ = plotting.subplots(height=1.0, width=2.0)
    given = {"kind": "noise", "data": {}, "alt": "A line that falls"} | change
    with pytest.raises(InputError, match=word):
        interactive(given["kind"], given["data"], figure, alt=given["alt"])
    with pytest.raises(InputError, match=r"\(n, h, w\)"):
        interactive("noise", {"image": np.zeros((2, 2), np.uint8)}, figure, alt="A line that falls")
