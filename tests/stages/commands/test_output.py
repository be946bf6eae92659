"""Results as tables, as one JSON document, or not at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from stages.commands.output import JsonOutput, LastingConsole, Section, TablePrinter, open_output, unwrapped


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    size: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    path: Path
    colour: Colour
    parts: tuple[Part, ...]
    by_name: dict[str, float | None]


RECORD = Record(
    path=Path("a/b"),
    colour=Colour.RED,
    parts=(Part(size=1, loss=float("nan")), Part(size=2, loss=0.5)),
    by_name={"x": None, "y": float("inf")},
)


def section(name: str = "search", record: object = RECORD) -> Section:
    table = Table(title="found")
    table.add_column("number")
    table.add_row("1234567890" * 11)
    return Section(name=name, table=table, record=record)


def test_the_document_is_json_with_all_sections_and_no_error() -> None:
    page = io.StringIO()
    document = JsonOutput("python -m stages.quantize", page.write)
    document.show(section())
    document.show(section("export", [RECORD]))
    assert page.getvalue() == "", "nothing before the end"
    document.end(None)
    found = json.loads(page.getvalue())
    record = {
        "path": "a/b",
        "colour": "red",
        "parts": [{"size": 1, "loss": None}, {"size": 2, "loss": 0.5}],
        "by_name": {"x": None, "y": None},
    }
    assert found == {
        "format": 1,
        "command": "python -m stages.quantize",
        "search": record,
        "export": [record],
        "error": None,
    }


def test_an_error_is_a_key_beside_what_was_found_before_it() -> None:
    page = io.StringIO()
    document = JsonOutput("c", page.write)
    document.show(section())
    document.end("--output_path x already exists; choose another.")
    found = json.loads(page.getvalue())
    assert found["error"] == "--output_path x already exists; choose another."
    assert "search" in found


def test_tables_are_printed_at_once_and_whole_where_no_terminal_has_a_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    TablePrinter(Console()).show(section())
    assert "1234567890" * 11 in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    TablePrinter(Console()).show(section())
    assert "1234567890" * 11 not in capsys.readouterr().out
    TablePrinter(Console()).show(Section(name="s", table=unwrapped("1234567890" * 11), record=None))
    assert "1234567890" * 11 in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [False, True])
def test_json_is_printed_even_if_nothing_else_is(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    output = open_output("c", as_json=True, quiet=quiet)
    output.show(section())
    output.end(None)
    assert json.loads(capsys.readouterr().out)["command"] == "c"


def test_a_reader_that_left_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from stages.commands.output import write_out; write_out('the answer')"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("quiet", [False, True])
def test_tables_are_printed_unless_quiet(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    output = open_output("c", as_json=False, quiet=quiet)
    output.show(section())
    output.end("an error")
    assert ("found" in capsys.readouterr().out) != quiet


@pytest.mark.parametrize("verbose", [False, True])
def test_details_are_printed_where_asked_for_and_are_always_in_the_json(
    verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    detail = replace(section(), detail=True)
    open_output("c", as_json=False, quiet=False, verbose=verbose).show(detail)
    assert ("found" in capsys.readouterr().out) == verbose
    document = open_output("c", as_json=True, quiet=False, verbose=verbose)
    document.show(detail)
    document.end(None)
    assert "search" in json.loads(capsys.readouterr().out)


def test_work_goes_on_where_the_reader_of_a_pipe_goes_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        console = LastingConsole(file=pipe)
        for _ in range(2):
            console.print("a table")
    assert console.quiet
