"""Options read by tyro; what it has against them is said in one plain line."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from medvdm.errors import InputError, nearest

T = TypeVar("T")


def parse(kind: type[T], argv: list[str], command: str, default: T | None = None, **more: Any) -> Any:
    """Parse a command's options with tyro; its boxed complaint becomes one line, an InputError."""
    import tyro

    if argv and argv[0].replace("_", "-").startswith("--tyro-"):  # completion scripts, which assert their arguments
        raise InputError(f"{argv[0]}: unknown; expected an option of medvdm {command} (see medvdm {command} --help)")
    tyro_cli = functools.partial(
        tyro.cli,
        kind,
        args=argv,
        prog=f"medvdm {command}",
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=_registry(),
        **more,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro_cli()
    except SystemExit as stop:
        if stop.code in (0, None):  # the help has been printed
            raise
    raise InputError(f"{_complaint(tyro_cli, argv)} (see medvdm {command} --help)")


def _registry() -> Any:
    """Tyro's rules, but the text 'None' is a text: folders and classes may bear that name."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def text_or_nothing(info: Any) -> Any:
        if set(typing.get_args(info.type)) != {str, type(None)}:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: value is None or isinstance(value, str),
            str_from_instance=lambda value: ["none" if value is None else value],
        )

    return registry


def _complaint(tyro_cli: Callable[[], Any], argv: list[str]) -> str:
    """What tyro has against the options, in one line; it prints a box that is broken at the terminal's width."""
    said = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # no name is broken
    try:
        with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            tyro_cli()
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    words = "".join(" " if "\u2500" <= c <= "\u259f" else c for c in said.getvalue()).split()
    text = " ".join(w for w in words if set(w) - set("-+|"))
    text = re.split(r" (?:For full helptext|Argument helptext:)", text)[0].strip()
    titles = "Parsing error|Value error|Unrecognized options|Missing argument|Required options|Invalid choice"
    text = re.sub(rf"^({titles})\s+(?=\S)", "", text)
    for pattern, plain in _PLAIN.items():
        if found := re.match(pattern, text):
            return plain(found, argv)
    return re.sub(r"^Error parsing \w[\w.-]*: ", "", text)


def _choice(found: re.Match[str], argv: list[str]) -> str:
    value, option, choices = found.groups()
    words = re.findall(r"'([^']*)'", choices)
    return f"{option}: '{value}'; {nearest(value, words)}"


def _number(kind: str) -> Callable[[re.Match[str], list[str]], str]:
    return lambda found, argv: f"{found[1]}: {found[2]}; expected {kind}"


def _union(found: re.Match[str], argv: list[str]) -> str:
    option, kinds, value = found.groups()
    names = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text"}
    return f"{option}: {value}; expected {' or '.join(names.get(k, k.strip('{}')) for k in kinds.split('|'))}"


def _no_value(found: re.Match[str], argv: list[str]) -> str:
    name = found[1]
    if name.startswith("--"):
        return f"{name}: no value; expected one (one that begins with '-' is written {name}=VALUE)"
    return f"{name.upper()}: missing; expected one (one that begins with '-' comes after '--')"


def _unknown(found: re.Match[str], argv: list[str]) -> str:
    words, meant = found.groups()
    for flag in (w.partition("=")[0] for w in argv if w.startswith("--") and w.endswith(f"={words}")):
        return f"{flag}: '{words}'; expected no value after {flag}"
    return f"{words}: unknown" + (f"; did you mean '{meant}'?" if meant else "; expected an option of the command")


#: What tyro says, and what is said instead.
_PLAIN: dict[str, Callable[[re.Match[str], list[str]], str]] = {
    r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\.$": _choice,
    r"Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.*?)\]\. Got": _union,
    r"Error parsing (\S+): invalid literal for int.*?: ('.*')$": _number("a whole number"),
    r"Error parsing (\S+): could not convert string to float: ('.*')$": _number("a number"),
    r"Missing value for argument '(\S+)'": _no_value,
    r"Missing from [\w ]+: (\S+) (?:[A-Z]+ )?(.*?)\.? \(required\)": lambda m, _: (
        f"{m[1]}: missing; expected the {m[2][0].lower()}{m[2][1:]}"
    ),
    r"Unrecognized options: (.*?)(?: Perhaps you meant: (--[\w-]+).*)?$": _unknown,
}
