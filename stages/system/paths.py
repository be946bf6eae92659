"""Names of files and folders that every system accepts, Windows being the strictest, and quoting for its shells."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import TypeVar

ON_WINDOWS = os.name == "nt"

AnyPath = TypeVar("AnyPath", bound=PurePath)

_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names that mean a device on Windows, with any extension."""
_LONGEST_NAME = 120
_DIGEST_DIGITS = 8
_LONGEST_WINDOWS_PATH = 247
"""Characters of a folder's path without the prefix; files may have 12 more."""
_LONGEST_INNER_NAME = len(".embedding.0000.") + 150 + len(".safetensors.partial")
"""Characters of the longest name that is written inside our folders, with a number before and a suffix behind it."""
_LONG_PREFIX = "\\\\?\\"


def file_name(words: str, *, longest: int = _LONGEST_NAME) -> str:
    """Return ``words``, made of letters, digits and ``.-_``, as a name that no system refuses or changes.

    Device names of Windows get a ``_`` in front, dots at the end are dropped, as Windows would silently do, and a name
    of more than ``longest`` characters is cut and gets a part of its sha256, so that different words keep different
    names.
    """
    name = words.rstrip(".") or "_"
    if name.partition(".")[0].lower() in _DEVICES:
        name = f"_{name}"
    if len(name) <= longest:
        return name
    digest = hashlib.sha256(words.encode()).hexdigest()[:_DIGEST_DIGITS]
    return f"{name[: longest - _DIGEST_DIGITS - 1]}-{digest}"


def sibling_folder(folder: AnyPath, suffix: str) -> AnyPath:
    """Return ``folder`` with ``suffix`` added to its name.

    Raises:
        ValueError: it is the root of a disk, and has no name.
    """
    if not folder.name:
        raise ValueError(f"{folder} is the root of a disk")
    return folder.with_name(folder.name + suffix)


def from_here(path: Path) -> Path:
    """Return ``path`` relative to the current folder if it lies below it, as people type it; else as it is."""
    here = Path.cwd()
    return path.relative_to(here) if path != here and path.is_relative_to(here) else path


def reachable(path: Path) -> Path:
    """Return ``path`` in a form in which long names inside it work: as it is, except on Windows."""
    return Path(extended(PureWindowsPath(path.resolve()))) if ON_WINDOWS else path


def extended(path: PureWindowsPath) -> PureWindowsPath:
    r"""Return ``path`` with ``\\?\`` before it where files in it may pass Windows' 260 characters.

    The path must be absolute and without ``..``; network paths get ``\\?\UNC\``.
    """
    text = str(path)
    if text.startswith(_LONG_PREFIX) or len(text) + _LONGEST_INNER_NAME <= _LONGEST_WINDOWS_PATH:
        return path
    if text.startswith("\\\\"):
        return PureWindowsPath(f"{_LONG_PREFIX}UNC\\{text[2:]}")
    return PureWindowsPath(_LONG_PREFIX + text)


def shell_line(arguments: Sequence[str], *, windows: bool = ON_WINDOWS) -> str:
    """Return one line that gives a program these ``arguments``, for cmd or PowerShell on Windows, elsewhere for sh."""
    return subprocess.list2cmdline(arguments) if windows else shlex.join(arguments)


def split_line(text: str, *, windows: bool = ON_WINDOWS) -> list[str]:
    r"""Split ``text`` into words as a shell does; on Windows a backslash is part of a path (``C:\models\plan.toml``).

    Raises:
        ValueError: a quotation mark has no partner.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if windows:
        lexer.escape = ""
    return list(lexer)
