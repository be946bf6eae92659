"""Names of files and folders that every system takes, Windows being the strictest."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import TypeVar

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


Place = TypeVar("Place", bound=PurePath)


_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names that mean a device on Windows, with any extension."""


_LONGEST_NAME = 120


_DIGITS = 8


_LONGEST_WINDOWS_PATH = 247
"""Characters of a folder's path without the prefix; files may have 12 more."""


_ROOM = len(".embedding.0000.") + 150 + len(".safetensors.partial")
"""The longest name that is written inside one of our folders, with a number before and a suffix behind it."""


_EXTENDED = "\\\\?\\"


def file_name(words: str, *, longest: int = _LONGEST_NAME) -> str:
    """``words``, made of letters, digits and ``.-_``, as a name that no system refuses or changes.

    Device names of Windows get a ``_`` in front, dots at the end go (Windows drops them silently), and what is longer
    than ``longest`` is cut and gets a part of its sha256, so that different words keep different names.
    """
    name = words.rstrip(".") or "_"
    if name.partition(".")[0].lower() in _DEVICES:
        name = f"_{name}"
    if len(name) <= longest:
        return name
    digest = hashlib.sha256(words.encode()).hexdigest()[:_DIGITS]
    return f"{name[: longest - _DIGITS - 1]}-{digest}"


def sibling_folder(folder: Place, suffix: str) -> Place:
    """``folder`` with ``suffix`` added to its name.

    Raises:
        ValueError: it is the root of a disk, and has no name.
    """
    if not folder.name:
        raise ValueError(f"{folder} is the root of a disk")
    return folder.with_name(folder.name + suffix)


def extended(path: PureWindowsPath) -> PureWindowsPath:
    r"""``path``, an absolute one without ``..``, with ``\\?\`` before it where files in it may pass Windows' 260
    characters; network paths get ``\\?\UNC\``."""
    text = str(path)
    if text.startswith(_EXTENDED) or len(text) + _ROOM <= _LONGEST_WINDOWS_PATH:
        return path
    if text.startswith("\\\\"):
        return PureWindowsPath(f"{_EXTENDED}UNC\\{text[2:]}")
    return PureWindowsPath(_EXTENDED + text)


def reachable(path: Path) -> Path:
    """``path`` in a form in which long names inside it work: as it is, except on Windows."""
    if not ON_WINDOWS:
        return path
    return Path(extended(PureWindowsPath(path.resolve())))
