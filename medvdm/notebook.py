"""What a notebook shows besides figures: the line of a check, a table of results with one row for all seeds of a
training, and a figure that moves. None needs IPython.

A check computes one thing by two routes. :func:`checked` and its two siblings fail where the routes part, and print one
line with the error where they meet, so that a reader sees how well a formula holds and not merely that it does.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from medvdm.errors import InputError


class Seeds(NamedTuple):
    """What several trainings found that differ in their seed only. Made by :func:`over_seeds`.

    Attributes:
        mean: over the seeds.
        sd: standard deviation between the seeds; None of one seed.
        count: of seeds.
    """

    mean: float
    sd: float | None
    count: int


#: What a cell of a table may hold: a text, a number, a value with its standard error, several seeds, or nothing.
Entry = str | float | tuple[float, float] | Seeds | None
_ARROWS = {"low": " ↓", "high": " ↑", None: ""}


# --- Checks ------------------------------------------------------------------------------------------------------


def checked(claim: str, found: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, of: str = "") -> None:
    """Assert ``abs(found - expected) <= atol + rtol * abs(expected)`` everywhere, and print the largest error.

    The error is the largest difference; where only ``rtol`` is given, divided by the largest ``abs(expected)``.

    Args:
        claim: what is checked, such as "the marginal by composition".
        found, expected: numbers or arrays that broadcast to one shape.
        of: what the error is the largest of, such as "1,000 draws".

    Raises:
        InputError: neither rtol nor atol, or nothing to compare.
        AssertionError: they differ by more than that.
    """
    if rtol <= 0 and atol <= 0:
        raise InputError(f"checked: '{claim}' has rtol {rtol} and atol {atol}; expected one of them above 0")
    found, expected = np.broadcast_arrays(np.asarray(found, np.float64), np.asarray(expected, np.float64))
    if not found.size:
        raise InputError(f"checked: '{claim}' compares nothing; expected at least one number")
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=claim)
    error = float(np.max(np.abs(found - expected)))
    relative = atol <= 0 and bool(np.any(expected))
    if relative:
        error /= float(np.max(np.abs(expected)))
    _say(claim, f"largest {'relative ' if relative else ''}error {error:.0e}" + (f" of {of}" if of else ""))


def checked_mean(claim: str, samples: Any, expected: float, *, sigmas: float = 5.0) -> None:
    """Assert that the mean of independent samples is within ``sigmas`` standard errors of what is expected.

    Args:
        claim: what is checked.
        samples: (n, ...) independent numbers.
        expected: their mean in the limit of many.

    Raises:
        InputError: fewer than two samples.
        AssertionError: the mean is further away.
    """
    samples = np.asarray(samples, np.float64).ravel()
    if samples.size < 2:
        raise InputError(f"checked_mean: '{claim}' has {samples.size} samples; expected at least 2")
    error = samples.std(ddof=1) / math.sqrt(samples.size)
    off = abs(samples.mean() - expected)
    assert off <= sigmas * error, f"{claim}: mean {samples.mean()}, expected {expected}, standard error {error}"
    _say(claim, f"{off / error if error else 0.0:.1f} standard errors off in {samples.size:,} draws")


def checked_that(claim: str, holds: Any, by: str) -> None:
    """Assert that a claim holds, everywhere if it is an array, and print by how much.

    Args:
        claim: a statement, such as "the linear start is ahead on every seed".
        by: the number that shows it, such as "least lead 0.0049".

    Raises:
        AssertionError: it does not hold.
    """
    assert np.all(holds), f"{claim}: not so; {by}"
    _say(claim, by)


def _say(claim: str, found: str) -> None:
    print(f"checked: {claim}, {found}")


# --- Seeds -------------------------------------------------------------------------------------------------------


def over_seeds(evaluations: Sequence[Mapping[str, Any]], key: str = "excess_bpd") -> Seeds:
    """Mean and standard deviation of one number over the evaluations of several seeds.

    Raises:
        InputError: no evaluation.

    >>> over_seeds([{"excess_bpd": 0.01}, {"excess_bpd": 0.03}, {"excess_bpd": 0.02}])
    Seeds(mean=0.02, sd=0.01, count=3)
    """
    if not evaluations:
        raise InputError("over_seeds: no evaluation; expected at least one")
    values = np.array([evaluation[key] for evaluation in evaluations], np.float64)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return Seeds(float(values.mean()), sd, len(values))


# --- Tables ------------------------------------------------------------------------------------------------------


class Table:
    """A table in Markdown, which a notebook shows as one. Made by :func:`table`."""

    def __init__(self, markdown: str) -> None:
        self.markdown = markdown

    def _repr_markdown_(self) -> str:
        return self.markdown

    def __repr__(self) -> str:
        return self.markdown


def table(
    rows: Mapping[str, Sequence[Entry]],
    columns: Mapping[str, Literal["low", "high"] | None],
    *,
    digits: int | Sequence[int] = 3,
    yardsticks: int = 0,
    corner: str = "",
) -> Table:
    """Results side by side: an arrow in the head says which direction is good, the best value of a column is bold.

    Args:
        rows: by name, an entry for each column. A pair is a value and its standard error; :class:`Seeds` show their
            mean, and in brackets the standard deviation of several.
        columns: by head, whether 'low' or 'high' is good; None for neither.
        digits: after the point, for all columns or one for each.
        yardsticks: the first rows that others are held against; in italics, and never marked as best.
        corner: head of the first column.

    Raises:
        InputError: a row that is shorter or longer than the columns, or digits for another number of columns.

    >>> print(table({"PNG": [3.29], "`pixel`": [2.314]}, {"bits": "low"}, digits=2, yardsticks=1))
    |  | bits ↓ |
    |---|---:|
    | *PNG* | *3.29* |
    | `pixel` | **2.31** |
    """
    places = [digits] * len(columns) if isinstance(digits, int) else list(digits)
    if len(places) != len(columns):
        raise InputError(f"digits: {len(places)} for {len(columns)} columns; expected one or as many as columns")
    for name, entries in rows.items():
        if len(entries) != len(columns):
            raise InputError(f"rows: '{name}' has {len(entries)} entries; expected {len(columns)}")
    texts = [[_text(entry, place) for entry, place in zip(entries, places, strict=True)] for entries in rows.values()]
    models = list(rows.values())[yardsticks:]
    for column, good in enumerate(columns.values()):
        values = [round(_value(entries[column]), places[column]) for entries in models]
        known = [value for value in values if not math.isnan(value)]
        if good is None or len(known) < 1 or len(rows) < 2:
            continue
        best = min(known) if good == "low" else max(known)
        for row, value in enumerate(values, yardsticks):
            if value == best:
                texts[row][column] = f"**{texts[row][column]}**"
    for row in range(yardsticks):
        texts[row] = [f"*{text}*" if text else "" for text in texts[row]]
    names = [f"*{name}*" if row < yardsticks else name for row, name in enumerate(rows)]
    heads = [corner, *(head + _ARROWS[good] for head, good in columns.items())]
    rules = ["---", *("---:" if _numeric(rows, column) else "---" for column in range(len(columns)))]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join([name, *entries])} |" for name, entries in zip(names, texts, strict=True)]
    return Table("\n".join(lines))


def _value(entry: Entry) -> float:
    """The number that is compared; not a number for a text or nothing."""
    if isinstance(entry, tuple):
        return float(entry[0])
    return math.nan if entry is None or isinstance(entry, str) else float(entry)


def _text(entry: Entry, digits: int) -> str:
    if entry is None:
        return ""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Seeds):
        if entry.sd is None:
            return _number(entry.mean, digits)
        least = 10.0**-digits
        spread = f"< {least:.{digits}f}" if entry.sd < least / 2 else f"{entry.sd:.{digits}f}"
        return f"{_number(entry.mean, digits)} (SD {spread})"
    if isinstance(entry, tuple):
        return f"{_number(entry[0], digits)} ± {entry[1]:.{digits}f}"
    return _number(entry, digits)


def _number(value: float, digits: int) -> str:
    """With thousands apart, and a minus sign that is as wide as a plus."""
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _numeric(rows: Mapping[str, Sequence[Entry]], column: int) -> bool:
    return any(not math.isnan(_value(entries[column])) for entries in rows.values())


# --- Figures that move --------------------------------------------------------------------------------------------


class Interactive:
    """A figure that the book's pages let a reader move, and a picture elsewhere. Made by :func:`interactive`."""

    def __init__(self, markup: str, alt: str) -> None:
        self.markup, self.alt = markup, alt

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.markup, "text/plain": self.alt}


def interactive(kind: str, data: Mapping[str, Any], figure: Any, *, alt: str) -> Interactive:
    """A figure with its data, which ``book/_static/moving/KIND.js`` draws on a page of the book.

    Where no script runs (Colab, print) the figure stands there as a picture. The data are computed by the cell, so the
    check that stored outputs are fresh covers them.

    Args:
        kind: the name of the script, in small letters.
        data: JSON, in which arrays of floats are lists of seven digits, and uint8 arrays (n, h, w) are gray images.
        figure: what matplotlib has drawn, for where nothing moves.
        alt: what is to be seen, for those who cannot see it.

    Raises:
        InputError: a kind that is no name, an alt text of less than ten letters, or a number that is not finite.
    """
    if not (kind.isascii() and kind.isalpha() and kind.islower()):
        raise InputError(f"kind: '{kind}'; expected the name of a script, such as 'noise'")
    if len(alt.strip()) < 10:
        raise InputError(f"alt: '{alt}'; expected a sentence that says what is to be seen")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    still = _png(Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE))
    text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return Interactive(
        f'<div class="moving" data-moving="{kind}"><img class="moving-still" src="{still}" alt="{html.escape(alt)}">'
        f'<script type="application/json">{text}</script></div>',
        alt,
    )


def _plain(value: Any) -> Any:
    """What JSON can say of arrays and numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    array = np.asarray(value)
    if array.dtype == np.uint8:
        if array.ndim != 3:
            raise InputError(f"gray images: shape {array.shape}; expected (n, h, w)")
        n, height, width = array.shape
        sheet = _png(Image.fromarray(array.reshape(n * height, width)))  # below one another
        return {"png": sheet, "count": n, "height": height, "width": width}
    if array.ndim:
        return [_plain(one) for one in array]
    if not np.isfinite(array):
        raise InputError(f"a number of the data is {array}; expected finite numbers")
    return float(f"{float(array):.7g}") if array.dtype.kind == "f" else int(array)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
