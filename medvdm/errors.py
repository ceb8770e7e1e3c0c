"""Errors that are part of the interface.

Every problem that a user can cause or meet is raised as a :class:`MedvdmError`: one line that names the
file or argument, what was found and what was expected. The command line prints that line and exits with
the class's ``exit_code``; from Python each class is also the built-in exception one would expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedvdmError(Exception):
    """Base class: a problem stated in one line, with the exit code that the command line uses for it."""

    exit_code = 2


class InputError(MedvdmError, ValueError):
    """A setting, argument or array has a value that cannot be used."""


class InputTypeError(MedvdmError, TypeError):
    """An array has a data type that cannot be used."""


class DataError(MedvdmError, ValueError):
    """An image, a label file or a data folder cannot be used as it is."""


class MissingFileError(MedvdmError, FileNotFoundError):
    """A file or folder that was named, or that the format requires, is not there."""


class RunError(MedvdmError, ValueError):
    """A run folder or its checkpoint cannot be used: missing, damaged, finished, or of another config."""


class NotSavedError(RunError):
    """What training saved does not read back. The settings were good; the disk, or what lies on it, is not."""

    exit_code = 1


class DivergedError(MedvdmError, FloatingPointError):
    """Training or sampling produced a value that is not finite. The last good checkpoint is intact."""

    exit_code = 1


class StoppedError(MedvdmError, RuntimeError):
    """Training was asked to stop (SIGTERM, Ctrl-C); its state is saved. The exit code is the signal's, 128 + n."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class MissingPackageError(MedvdmError, ImportError):
    """An optional package is needed for what was asked."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the end of an error sentence: the nearest choice if there is one, then all choices.

    >>> nearest("phantm", ["phantom", "nih"])
    "did you mean 'phantom'? (choices: phantom, nih)"
    """
    choices = list(choices)
    folded = {c.casefold(): c for c in choices}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    listed = f"(choices: {', '.join(choices)})"
    return f"did you mean '{folded[close[0]]}'? {listed}" if close else listed
