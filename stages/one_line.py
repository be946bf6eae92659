"""What errors say, in one line: what libraries say is short enough for a place in a sentence."""

from __future__ import annotations

import textwrap

_LENGTH = 200


def in_one_line(error: BaseException) -> str:
    """The error's own words in one line, or its class where it has none."""
    return _words(error) or type(error).__name__


def named(error: BaseException) -> str:
    """The error's class and words in one line: what a library's error says often means little without its class."""
    return ": ".join(filter(None, (type(error).__name__, _words(error))))


def _words(error: BaseException) -> str:
    return textwrap.shorten(str(error), _LENGTH, placeholder="...")


def sentence_of(error: BaseException) -> str:
    """Our own sentence, printable: names in damaged files hold anything, lines and half characters too."""
    return " ".join(str(error).splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")
