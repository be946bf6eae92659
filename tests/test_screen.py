"""Findings as tables, as one document, or not at all."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest
from rich.table import Table

from stages.screen import Document, Finding, Nothing, Screen, Tables, findings_of, silent_screen, unwrapped


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


def finding(section: str = "search", record: object = RECORD) -> Finding:
    table = Table(title="found")
    table.add_column("number")
    table.add_row("1234567890" * 12)
    return Finding(section=section, table=table, record=record)


def test_the_document_is_json_with_all_sections_and_no_error() -> None:
    page = io.StringIO()
    document = Document("python -m stages.quantize", page.write)
    document.show(finding())
    document.show(finding("export", [RECORD]))
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
    document = Document("c", page.write)
    document.show(finding())
    document.end("--output_path x already exists; choose another.")
    found = json.loads(page.getvalue())
    assert found["error"] == "--output_path x already exists; choose another."
    assert "search" in found


def test_tables_are_printed_at_once_and_whole_where_no_terminal_has_a_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    Tables().show(finding())
    assert "1234567890" * 12 in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    Tables().show(finding())
    assert "1234567890" * 12 not in capsys.readouterr().out
    Tables().show(Finding(section="s", table=unwrapped("1234567890" * 12), record=None))
    assert "1234567890" * 12 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("as_json", "quiet", "kind"),
    [(False, False, Tables), (False, True, Nothing), (True, False, Document), (True, True, Document)],
)
def test_what_is_asked_for(as_json: bool, quiet: bool, kind: type) -> None:
    assert isinstance(findings_of("c", as_json=as_json, quiet=quiet), kind)


def test_a_silent_screen_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    screen: Screen = silent_screen()
    screen.console.print("hello")
    screen.show("search", Table(), RECORD)
    screen.findings.end("an error")
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
