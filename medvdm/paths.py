"""Paths as users write them: ``~`` is expanded, and what is no path of a file system is refused before any work."""

from __future__ import annotations

import os
import re
from pathlib import Path

from medvdm.errors import InputError

#: 'gs://bucket/run'; also 'gs:/bucket/run', which is what :class:`pathlib.Path` makes of it.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | Path, what: str) -> Path:
    """A path as given by a user, with ``~`` and ``~user`` expanded; a folder that is really called so is ``./~``.

    Args:
        path: a file or folder, there or not.
        what: the argument that it came from, for the error.

    Raises:
        InputError: empty, a URL, a home folder of nobody, or a name with a line break or another control character.
    """
    text = os.fspath(path)
    if not text:
        raise InputError(f"{what}: ''; expected a path")
    # Bytes that are not UTF-8 are lone surrogates in Python: no pretty name, but one that the file system knows.
    if not "".join(c for c in text if not "\ud800" <= c <= "\udfff").isprintable():
        raise InputError(f"{what}: {text!a}; expected a path without control characters")
    if _URL.match(text):
        raise InputError(f"{what}: '{text}' is a URL; expected a path on a local or mounted file system")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise InputError(f"{what}: '{text}': no such user; expected a path (./~name where a name begins so)")
    found = Path(expanded)
    return found.absolute() if str(found).startswith("~") else found  # './~' loses its dot, and stays what it is
