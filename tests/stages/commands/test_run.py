"""How a command ends: its exit code, its one line of error, and what goes where."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.text import Text

from stages.commands.options import CommandOptions, OutputOptions
from stages.commands.output import Section
from stages.commands.run import Command, run_command, run_parsed
from stages.errors import UserError

SECTION = Section(name="found", table=Text("a table"), record={"number": 3})


def raising(error: BaseException) -> Command[CommandOptions]:
    def command(_: CommandOptions) -> Iterator[Section]:
        yield SECTION
        raise error

    return command


def succeed(_: CommandOptions) -> Iterator[Section]:
    yield SECTION


def test_a_command_that_succeeds_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    run_command(CommandOptions, succeed, "program")
    assert tuple(capsys.readouterr()) == ("a table\n", "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("--x is wrong;\nwrite another."), 2, "error: --x is wrong; write another."),
        (MemoryError("of 3 GB"), 2, "error: Not enough memory (of 3 GB); use smaller sizes or close other programs."),
        (
            KeyboardInterrupt(),
            130,
            "warning: stopped; the same command goes on after the last step that was finished.",
        ),
    ],
    ids=["bad input", "memory", "Ctrl-C"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_command_that_fails_says_why_in_one_line(
    error: BaseException, code: int, words: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_parsed(CommandOptions(printing=OutputOptions(json=as_json)), raising(error), "program")
    assert stop.value.code == code
    printed = capsys.readouterr()
    assert printed.err == f"{words}\n"
    if as_json:
        document = json.loads(printed.out)
        assert document["found"] == {"number": 3}
        assert document["error"] == words.partition(": ")[2]
    else:
        assert printed.out == "a table\n"


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_parsed(CommandOptions(), raising(ZeroDivisionError()), "program")


def test_a_log_file_that_can_not_be_opened_is_an_error_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = OutputOptions(log_file=tmp_path / "missing" / "log", json=True)
    with pytest.raises(SystemExit) as stop:
        run_parsed(CommandOptions(printing=options), succeed, "program")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --log_file ")
    assert json.loads(printed.out)["error"].startswith("--log_file ")


def test_of_several_processes_only_the_first_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    run_parsed(CommandOptions(printing=OutputOptions(json=True)), succeed, "program")
    assert tuple(capsys.readouterr()) == ("", "")
    with pytest.raises(SystemExit):
        run_parsed(CommandOptions(), raising(UserError("no disk")), "program")
    assert tuple(capsys.readouterr()) == ("", "error: no disk\n")
