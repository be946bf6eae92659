"""What a command shows: progress on standard error, what it found on standard output, as tables or as one document."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pydantic_core import to_json
from rich.console import Console, Group, RenderableType
from rich.text import Text

FORMAT = 1
"""Version of the JSON document; a key that is there stays and keeps its meaning as long as this stays."""
_FILE_WIDTH = 160
"""Columns where no terminal has a width: numbers stand in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A result twice: a table for people, and a record of dataclasses and plain values that says the same to programs.

    ``section`` is the record's key in the document.
    """

    section: str
    table: RenderableType
    record: object


@runtime_checkable
class Findings(Protocol):
    """Takes what a command finds."""

    def show(self, finding: Finding) -> None:
        """Take one result."""

    def end(self, error: str | None) -> None:
        """Nothing more comes; ``error`` is the sentence that the command ended with."""


class Tables:
    """Prints each table at once."""

    def show(self, finding: Finding) -> None:
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = _FILE_WIDTH
        console.print(Group(finding.table), crop=False)  # alone, text would be wrapped whatever it says

    def end(self, error: str | None) -> None:
        pass


class Nothing:
    """Shows nothing."""

    def show(self, finding: Finding) -> None:
        pass

    def end(self, error: str | None) -> None:
        pass


class Document:
    """Collects the records and prints them at the end as one JSON object, ``error`` among its keys."""

    def __init__(self, command: str, write: Callable[[str], object]) -> None:
        self._content: dict[str, Any] = {"format": FORMAT, "command": command}
        self._write = write

    def show(self, finding: Finding) -> None:
        # By way of JSON text: numbers that JSON doesn't have become null, paths and enums text.
        self._content[finding.section] = json.loads(to_json(finding.record, inf_nan_mode="null"))

    def end(self, error: str | None) -> None:
        self._write(json.dumps(self._content | {"error": error}, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Where a command shows what it does (``console``, standard error) and what it found (standard output)."""

    console: Console
    findings: Findings

    def show(self, section: str, table: RenderableType, record: object) -> None:
        """Show a result; see ``Finding``."""
        self.findings.show(Finding(section=section, table=table, record=record))


def unwrapped(text: str) -> Text:
    """Text whose lines stay whole however narrow the terminal, so that they can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def silent_screen() -> Screen:
    """A screen on which nothing is seen."""
    return Screen(console=Console(quiet=True), findings=Nothing())


def findings_of(command: str, *, as_json: bool, quiet: bool) -> Findings:
    """Where the results of ``command`` go; a document is asked for in so many words, so it is printed quietly too."""
    if as_json:
        return Document(command, sys.stdout.write)
    return Nothing() if quiet else Tables()
