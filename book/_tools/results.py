"""Numbers of the records in the text of a page: {result}`RECORD:path|format` stands for one value.

    {result}`floors:results.floors[split=test].floor_bpd|.3f`
    {result}`mean(paper-nih-b16, paper-nih-b16-s1, paper-nih-b16-s2):evaluations[split=test].excess_bpd|.4f`

RECORD is the name of a file in book/results, or mean(...) or sd(...) of several, such as the seeds of one row. The path
walks keys and, in lists, integers; [key=value] picks the first element of a list whose key has that value, and several
conditions are parted by commas. What follows | is a format of Python; without it the value is shown as it is. Two
values may be joined by +, - or /, with a space on either side.
"""

from __future__ import annotations

import json
import operator
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
SUMMARIES = {"mean": statistics.fmean, "sd": statistics.stdev}
OPERATIONS = {"+": operator.add, "-": operator.sub, "/": operator.truediv}
_ROLE = re.compile(r"\{result\}`([^`]+)`")
_PART = re.compile(r"\.?([^.\[\]=,]+)|\[([^\]]+)\]")


def resolve(reference: str, folder: Path = RESULTS) -> str:
    """The value that a reference names, as text; raises ValueError with one line where it names none."""
    address, _, spec = reference.partition("|")
    first, *rest = re.split(r" ([-+/]) ", address.strip())
    value = _term(first, folder, reference)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        other = _term(term, folder, reference)
        if not (_is_number(value) and _is_number(other)) or (sign == "/" and other == 0):
            raise ValueError(f"result '{reference}': cannot take {value!r} {sign} {other!r}")
        value = OPERATIONS[sign](value, other)
    try:
        text = format(value, spec.strip())
    except (ValueError, TypeError):
        raise ValueError(f"result '{reference}': '{spec.strip()}' is no format for {value!r}") from None
    return text.replace("-", "\N{MINUS SIGN}") if _is_number(value) and "e" not in text else text


def _term(address: str, folder: Path, reference: str) -> Any:
    """The value of RECORD:path, or of a summary of several records."""
    source, colon, path = address.strip().partition(":")
    if not colon or not path:
        raise ValueError(f"result '{reference}': expected RECORD:path, or RECORD:path|format")
    summary = re.fullmatch(r"(\w+)\((.+)\)", source)
    names = [name.strip() for name in summary[2].split(",")] if summary else [source]
    values = [_value(_record(name, folder, reference), path, reference) for name in names]
    if not summary:
        return values[0]
    if summary[1] not in SUMMARIES or len(values) < 2 or not all(map(_is_number, values)):
        raise ValueError(f"result '{reference}': expected mean(...) or sd(...) of two or more numbers")
    return SUMMARIES[summary[1]](values)


def references(text: str) -> list[str]:
    """What the roles of a page name, in order. In a table, a | inside a role is written \\|."""
    return [role.replace("\\|", "|") for role in _ROLE.findall(text)]


def _record(name: str, folder: Path, reference: str) -> dict[str, Any]:
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"result '{reference}': there is no record '{name}'")
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, _changed: int) -> dict[str, Any]:
    return json.loads(path.read_text("utf8"))


def _value(found: Any, path: str, reference: str) -> str | float:
    """Walk a path from the top of a record to one text or number."""
    at, where = 0, "the record"
    while at < len(path):
        part = _PART.match(path, at)
        if part is None:
            raise ValueError(f"result '{reference}': cannot read the path from '{path[at:]}'")
        try:
            found = _chosen(found, part[2]) if part[2] else _member(found, part[1])
        except (KeyError, IndexError):
            known = f", which has {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else ""
            raise ValueError(f"result '{reference}': no '{part[0].strip('.')}' in {where}{known}") from None
        at, where = part.end(), f"'{path[: part.end()]}'"
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise ValueError(f"result '{reference}': expected a number or a text, found {type(found).__name__}")
    return found


def _member(found: Any, key: str) -> Any:
    if isinstance(found, dict):
        return found[key]
    if isinstance(found, list) and key.lstrip("-").isdigit():
        return found[int(key)]
    raise KeyError(key)


def _chosen(found: Any, conditions: str) -> Any:
    """The first element of a list that meets every condition; an integer in brackets indexes."""
    if "=" not in conditions:
        return _member(found, conditions.strip())
    wanted = [[side.strip() for side in condition.split("=", 1)] for condition in conditions.split(",")]
    if not isinstance(found, list) or any(len(pair) != 2 for pair in wanted):
        raise KeyError(conditions)
    for element in found:
        if isinstance(element, dict) and all(_equals(element.get(key), text) for key, text in wanted):
            return element
    raise KeyError(conditions)


def _equals(value: Any, text: str) -> bool:
    if _is_number(value):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
