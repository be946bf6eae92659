"""Commands as the line that a person types: each system's shell quotes in its own way."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

ON_WINDOWS = os.name == "nt"


def shell_line(arguments: Sequence[str], *, windows: bool = ON_WINDOWS) -> str:
    """One line that gives a program these ``arguments``, for cmd or PowerShell on Windows, elsewhere for sh."""
    return subprocess.list2cmdline(arguments) if windows else shlex.join(arguments)


def split_line(text: str, *, windows: bool = ON_WINDOWS) -> list[str]:
    r"""The words of ``text``; on Windows a backslash is a part of a path (``plan=C:\models\plan.toml``).

    Raises:
        ValueError: a quotation mark has no partner.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if windows:
        lexer.escape = ""
    return list(lexer)
