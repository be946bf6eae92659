"""Print what a command returns: tables for people, or one JSON document for programs, on standard output."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from rich.console import Console, Group, RenderableType
from rich.text import Text

FORMAT = 1
"""Version of the JSON document; a key that is there stays and keeps its meaning as long as this stays."""
_COMMAND = re.compile(r"(?<![\w./\\-])(?:python -m )?stages\.(calibrate|quantize|evaluate|sweep|inspect|report)\b")
_FILE_WIDTH = 160
"""Columns where no terminal has a width: numbers stand in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A result twice: a table for people, and a record of dataclasses and plain values that says the same to programs.

    ``name`` is the record's key in the JSON document.
    """

    name: str
    table: RenderableType
    record: object


@dataclass(frozen=True, slots=True)
class TablePrinter:
    """Print each table as soon as its section is there."""

    console: Console

    def show(self, section: Section) -> None:
        """Print the table of ``section``."""
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = _FILE_WIDTH
        self.console.print(Group(section.table), crop=False)  # a text by itself would be wrapped whatever it says

    def end(self, error: str | None) -> None:
        """Do nothing: the error stands in the log."""


@dataclass(frozen=True, slots=True)
class JsonOutput:
    """Collect the records and print them at the end as one JSON object, ``error`` among its keys."""

    command: str
    write: Callable[[str], object]
    _records: dict[str, Any] = field(default_factory=dict)

    def show(self, section: Section) -> None:
        """Keep the record of ``section``."""
        # By way of JSON text: numbers that JSON doesn't have become null, paths and enums text.
        self._records[section.name] = json.loads(to_json(section.record, inf_nan_mode="null"))

    def end(self, error: str | None) -> None:
        """Print the document; ``error`` is the sentence that the command ended with."""
        said = None if error is None else as_called(error, self.command)
        document = {"format": FORMAT, "command": self.command, **self._records, "error": said}
        self.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


Output = TablePrinter | JsonOutput


def open_output(command: str, *, as_json: bool, quiet: bool) -> Output:
    """Return where the results of ``command`` go; ``--json`` asks for a document, so ``--quiet`` doesn't silence it."""
    return JsonOutput(command, sys.stdout.write) if as_json else TablePrinter(Console(quiet=quiet))


def as_called(text: str, program: str) -> str:
    """Spell our commands in ``text`` as the person who started ``program`` does: messages say only ``stages.NAME``.

    ``genai-quant NAME`` where ``program`` begins so, else ``python -m stages.NAME``.
    """
    spelled = r"genai-quant \1" if program.startswith("genai-quant") else r"python -m stages.\1"
    return _COMMAND.sub(spelled, text)


def unwrapped(text: str) -> Text:
    """Return text whose lines stay whole however narrow the terminal, so that they can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")
