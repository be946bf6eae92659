"""Errors that a person can act on: each message says in one sentence what is wrong, where, and how to fix it."""

from __future__ import annotations

import textwrap

_LENGTH = 200


class UserError(Exception):
    """Bad input or environment; the command line prints only the message and exits with code 2."""


class GraphError(UserError):
    """The base model can't be read, or holds nothing that can be quantized."""


class CacheMismatch(UserError):
    """A calibration cache or a folder of quantized weights belongs to something else."""


class OptionError(UserError):
    """The requested algorithm, bit widths or patterns don't fit this model."""


class SolveError(UserError):
    """The statistics or weights of a site can't be used (NaN or infinite values, for example)."""


def in_one_line(error: BaseException) -> str:
    """Return the error's own words in one line, or its class where it has none."""
    return _words(error) or type(error).__name__


def with_class_name(error: BaseException) -> str:
    """Return the error's class and words in one line: a library's message often means little without its class."""
    return ": ".join(filter(None, (type(error).__name__, _words(error))))


def _words(error: BaseException) -> str:
    # The system's own words without its number; our sentences name the file.
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return textwrap.shorten(said, _LENGTH, placeholder="...")


def sentence_of(error: BaseException) -> str:
    """Return our own sentence, printable: names in damaged files may hold line breaks and half characters."""
    return " ".join(str(error).splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")
