"""Print a command's results on standard output: tables for people, or one JSON document for programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.text import Text

FORMAT = 1
"""Version of the JSON document: as long as it stays, so do the keys and their meaning."""
_COMMAND = re.compile(
    r"(?<![\w./\\-])"
    r"(?:(?:python -m )?stages\.(calibrate|quantize|chat|evaluate|sweep|inspect|report)|python -m (export))\b"
)
_UNBROKEN = re.compile(r"(?<=: )(?:genai-quant|python -m) .*$|\S+")
"""What stays in one line of a message: a command at its end, any word."""
_FILE_WIDTH = 120
"""Columns where there is no terminal."""


class LastingConsole(Console):
    """A console that falls silent where its reader goes away, as ``head`` does: the command's work goes on."""

    def on_broken_pipe(self) -> None:
        """Send what is still written nowhere, so that Python's own flush at the end doesn't fail either."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One result in two forms."""

    name: str
    """The record's key in the JSON document."""
    table: RenderableType | Callable[[str], RenderableType]
    """For people; what names commands is a function of the program that they typed."""
    record: object
    """For programs: the same in dataclasses and plain values."""
    detail: bool = False
    """Whether people see it only with --verbose; programs always get it."""


@dataclass(frozen=True, slots=True)
class TablePrinter:
    """Prints each table as soon as its section is there."""

    console: Console
    verbose: bool = False
    """Whether details are printed too."""
    program: str = ""
    """What people typed."""

    def show(self, section: Section) -> None:
        """Print the table of ``section``, unless it is a detail and those aren't wanted."""
        if section.detail and not self.verbose:
            return
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = _FILE_WIDTH
        table = section.table(self.program) if callable(section.table) else section.table
        self.console.print(Group(table), crop=False)  # rich wraps a Text outside a group even if it says no_wrap

    def end(self, error: str | None) -> None:
        """Do nothing: the error stands in the log."""


@dataclass(frozen=True, slots=True)
class JsonOutput:
    """Collects the records and prints them at the end as one JSON object, ``error`` among its keys."""

    command: str
    write: Callable[[str], object]
    _records: dict[str, Any] = field(default_factory=dict)

    def show(self, section: Section) -> None:
        """Keep the record of ``section``."""
        # Through JSON text: infinities and NaN become null, paths and enums become text.
        self._records[section.name] = json.loads(to_json(section.record, inf_nan_mode="null"))

    def end(self, error: str | None) -> None:
        """Print the document; ``error`` is the sentence that the command ended with."""
        sentence = None if error is None else as_called(error, self.command)
        document = {"format": FORMAT, "command": self.command, **self._records, "error": sentence}
        self.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


Output = TablePrinter | JsonOutput


def open_output(command: str, *, as_json: bool, quiet: bool, verbose: bool = False) -> Output:
    """Return the printer for the results of ``command``.

    Args:
        command: what people typed.
        as_json: print a JSON document, also where ``quiet``.
        quiet: print no tables.
        verbose: print details too.
    """
    if as_json:
        return JsonOutput(command, write_out)
    return TablePrinter(LastingConsole(quiet=quiet), verbose, command)


def write_out(text: str) -> None:
    """Write to standard output at once; leave as rich does where its reader has left (``| head``)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        Console().on_broken_pipe()


def as_called(text: str, program: str) -> str:
    """Return ``text`` with our commands, which messages call ``stages.NAME``, spelled as ``program`` was called.

    ``genai-quant NAME`` where ``program`` begins with genai-quant, else ``python -m stages.NAME``. Messages call export
    ``python -m export``.
    """
    if not program.startswith("genai-quant"):
        return _COMMAND.sub(lambda found: found[0] if found[2] else f"python -m stages.{found[1]}", text)
    return _COMMAND.sub(lambda found: f"genai-quant {found[1] or found[2]}", text)


def print_message(console: Console, message: Text) -> None:
    """Print a message: on a terminal in lines that break between words, elsewhere in one.

    A command at its end and words such as paths stay whole, so that they can be copied.
    """
    breaks, start = list[int](), 0
    for word in _UNBROKEN.finditer(message.plain) if console.is_terminal else ():
        if start < word.start() and cell_len(message.plain[start : word.end()]) > console.width:
            breaks.append(start := word.start())
    for line in message.divide(breaks):
        line.rstrip()
        console.print(line, highlight=False, soft_wrap=True)


def unwrapped(text: str) -> Text:
    """Return text whose lines stay whole however narrow the terminal, so that they can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")
