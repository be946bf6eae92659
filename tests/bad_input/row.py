"""Define a row of the table of bad input, and the work folder that it spoils."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Command = Literal["calibrate", "quantize", "export", "sweep"]
Spoil = Callable[[Path], None]

_TEXT = ("--dataset", "text.txt", "--calib_size", "4", "--seq_len", "16")
_JUDGED = ("--text", "text.txt", "--windows", "1", "--seq_len", "16")
USUAL: dict[Command, tuple[str, ...]] = {
    "calibrate": ("--onnx_path", "base", *_TEXT, "--cache_dir", "new"),
    "quantize": ("--onnx_path", "base", "--output_path", "out", "--algo", "rtn_dq"),
    "export": ("--onnx_path", "base", "--weights_path", "weights", "--output_path", "out"),
    "sweep": ("--base", "base", "--output", "swept", "--algo", "rtn_dq", "--block_size", "32", *_JUDGED),
}
"""What each command is given first; it works in an unspoiled work folder. Later arguments win."""


def nothing(_: Path) -> None:
    """Spoil nothing: the arguments are what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadInput:
    """One case: damage to the work folder (the current one), the command, and the words of its answer."""

    name: str
    command: Command
    arguments: tuple[str, ...] = ()
    """Added to the usual ones."""
    words: tuple[str, ...]
    """All must be in the sentence: the file or option, and what is wrong."""
    spoil: Spoil = nothing
    largest_file: int | None = None
    """Bytes that a file can have: a disk that is full."""
    stays: tuple[str, ...] = ()
    """Folders that may be new afterwards: finished weights, with which the same command goes on."""
    by_parser: bool = False
    """Whether the library that parses options answers, in a frame of several lines."""


def tree(folder: Path) -> dict[str, str]:
    """Everything below ``folder``: kind, rights, and what is in it."""
    return {str(path.relative_to(folder)): _fingerprint(path) for path in sorted(folder.rglob("*"))}


def _fingerprint(path: Path) -> str:
    rights = stat.S_IMODE(path.lstat().st_mode)
    if path.is_symlink():
        return f"link {os.readlink(path)}"  # noqa: PTH115 (Path.readlink would normalize it)
    if path.is_dir():
        return f"folder {rights:o}"
    return f"file {rights:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
