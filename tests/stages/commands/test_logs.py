"""Log records on a console and in a file: what is seen at which level, and that nothing stays behind."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from stages.commands.logs import logging_to
from stages.commands.options import OutputOptions
from stages.errors import UserError

COMMAND = "python -m stages.quantize --onnx_path models/base --output_path models/int4"
OURS = logging.getLogger("stages.somewhere")
ENTRY = logging.getLogger("__main__")
THEIRS = logging.getLogger("a_library.module")
PROGRESS = logging.getLogger("stages.commands.progress")


@dataclass
class Shown:
    file: io.StringIO

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


@contextmanager
def said(
    options: OutputOptions, *, terminal: bool = False, errors_only: bool = False, program: str = "python -m x"
) -> Iterator[Shown]:
    file = io.StringIO()
    console = Console(file=file, width=40, force_terminal=terminal, color_system=None)
    with logging_to(console, options, program, errors_only=errors_only):
        yield Shown(file)


def speak() -> None:
    for logger in (OURS, THEIRS):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(level, "%s of [bold]%s[/]", logging.getLevelName(level).lower(), logger.name)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OutputOptions(), ["info of", "warning: warning of", "error: error of"]),
        (OutputOptions(log_level="debug"), ["debug of", "info of", "warning: warning of", "error: error of"]),
        (OutputOptions(log_level="error"), ["error: error of"]),
        (OutputOptions(quiet=True), ["warning: warning of", "error: error of"]),
        (OutputOptions(quiet=True, log_level="debug"), ["warning: warning of", "error: error of"]),
        (OutputOptions(quiet=True, log_level="error"), ["error: error of"]),
    ],
)
def test_levels(options: OutputOptions, expected: list[str]) -> None:
    with said(options) as shown:
        speak()
    ours = [line for line in shown.lines if "stages.somewhere" in line]
    assert ours == [f"{start} [bold]stages.somewhere[/]" for start in expected]
    # Libraries speak from warnings on, and are named.
    theirs = [line for line in shown.lines if "a_library" in line]
    assert all(": a_library.module: " in line for line in theirs)
    assert not any("debug of" in line or "info of" in line for line in theirs)


def test_the_first_process_speaks_for_all_but_errors_are_everyones(tmp_path: Path) -> None:
    with said(OutputOptions(log_file=tmp_path / "log"), errors_only=True) as shown:
        speak()
    assert [line.split()[0] for line in shown.lines] == ["error:", "error:"]
    assert not (tmp_path / "log").exists()


def test_entry_points_are_ours_and_long_lines_are_not_cut() -> None:
    with said(OutputOptions()) as shown:
        ENTRY.info("next: %s", COMMAND)
    assert shown.lines == [f"next: {COMMAND}"]


def test_on_a_terminal_lines_break_between_words_and_paths_and_commands_stay_whole() -> None:
    with said(OutputOptions(), terminal=True) as shown:
        OURS.warning(
            "the model is finished, but its report in /a/rather/long/folder/of/somebody/else is not: %s", COMMAND
        )
    assert shown.lines == [
        "warning: the model is finished, but its",
        "report in",
        "/a/rather/long/folder/of/somebody/else",
        "is not:",
        COMMAND,
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_of_progress_are_for_what_is_no_terminal(terminal: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with said(OutputOptions(log_file=log), terminal=terminal) as shown:
        PROGRESS.info("search: 1 of 2 groups")
    assert ("search" in shown.file.getvalue()) == (not terminal)
    assert "search: 1 of 2 groups" in log.read_text()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("genai-quant quantize", "run genai-quant calibrate, genai-quant export; /tmp/stages.quantize/x stays"),
        ("python -m stages.quantize", "run python -m stages.calibrate, python -m export; /tmp/stages.quantize/x stays"),
    ],
)
def test_commands_are_spelled_as_the_program_was_called(program: str, expected: str, tmp_path: Path) -> None:
    with said(OutputOptions(log_file=tmp_path / "log"), program=program) as shown:
        OURS.info("run stages.calibrate, python -m export; /tmp/stages.quantize/x stays")
    assert shown.lines == [expected]
    assert expected in (tmp_path / "log").read_text()


def test_the_file_has_times_and_is_appended_to(tmp_path: Path) -> None:
    options = OutputOptions(quiet=True, log_file=tmp_path / "log")
    for _ in range(2):
        with said(options):
            OURS.info("found")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(" INFO stages.somewhere: found")
    assert lines[0][:2] == "20"


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    with (
        pytest.raises(UserError, match=r"--log_file .*/nowhere/log can't be written"),
        said(OutputOptions(log_file=tmp_path / "nowhere" / "log")),
    ):
        pytest.fail("went on")
    assert logging.getLogger().handlers == handlers


def test_everything_is_as_before_afterwards() -> None:
    def state() -> tuple[object, ...]:
        return tuple(logging.getLogger().handlers), logging.getLogger("stages").level, ENTRY.level

    before = state()
    with said(OutputOptions(log_level="debug")) as shown:
        assert state() != before
    assert state() == before
    OURS.warning("unheard")
    assert shown.lines == []
