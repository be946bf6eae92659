"""Bad input: one sentence that names the culprit and the fix, exit code 2, nothing written, nothing overwritten."""

from __future__ import annotations

import os
import re
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from stages.system.lock import exclusive
from tests.bad_input.made import MADE
from tests.bad_input.models import MODELS
from tests.bad_input.options import OPTIONS
from tests.bad_input.places import PLACES
from tests.bad_input.row import USUAL, BadInput, tree
from tests.bad_input.texts import TEXTS
from tests.support.commands import Commands
from tests.support.full_disk import full_after

ROWS = (*OPTIONS, *MODELS, *MADE, *TEXTS, *PLACES)


def _named(row: BadInput) -> str:
    return f"{row.command}: {row.name}"[:80]


@pytest.mark.parametrize("row", [row for row in ROWS if row.largest_file is None], ids=_named)
def test_bad_input(row: BadInput, work_folder: Path, spoken: Commands) -> None:
    _check(row, work_folder, spoken)


@pytest.mark.parametrize("row", [row for row in ROWS if row.largest_file is not None], ids=_named)
def test_full_disk(row: BadInput, work_folder: Path, commands: Commands) -> None:
    """Fill the disk: what is heard through pytest's files would be cut as well, so native libraries aren't heard."""
    _check(row, work_folder, commands)


@pytest.mark.parametrize(
    ("command", "held", "option", "arguments"),
    [
        ("calibrate", "new", "--cache_dir", ()),
        ("quantize", "out", "--output_path", ("--overwrite",)),
        ("quantize", "out.weights", "--weights_path", ()),
        ("quantize", "new", "--cache_dir", ("--algo", "awq_lite", "--cache_dir", "new")),
        ("export", "out", "--output_path", ()),
        ("sweep", "swept", "--output", ()),
    ],
)
def test_a_place_that_another_run_writes_to(
    command: str, held: str, option: str, arguments: tuple[str, ...], work_folder: Path, commands: Commands
) -> None:
    before = tree(work_folder)
    with exclusive(work_folder / held, option="--x"):
        code, printed = getattr(commands, command)(*USUAL[command], *arguments)
    assert code == 2, printed
    said = _the_sentence(printed)
    assert f"{option} {work_folder / held} is being written by process {os.getpid()} on {socket.gethostname()};" in said
    assert tree(work_folder) == before


def _check(row: BadInput, work_folder: Path, programs: Commands) -> None:
    row.spoil(work_folder)
    before = tree(work_folder)
    with nullcontext() if row.largest_file is None else full_after(row.largest_file):
        code, printed = getattr(programs, row.command)(*USUAL[row.command], *row.arguments)
    assert code == 2, printed
    assert "Traceback" not in printed
    said = printed.replace("-", "_") if row.by_parser else _the_sentence(printed)
    for word in row.words:
        assert word in said, said
    after = tree(work_folder)
    assert {path: what for path, what in after.items() if path.split("/")[0] not in row.stays} == before


def _the_sentence(printed: str) -> str:
    """Return the one line of the error, which is the last: one sentence, but for what others said (in parentheses)."""
    lines = [line for line in printed.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], printed
    own = re.sub(r"\(.*\)", "", lines[-1])
    assert own.endswith("."), own
    assert not re.search(r"[.!?] [A-Z]", own), own
    return lines[-1]


def test_there_are_rows_for_every_command() -> None:
    commands = [row.command for row in ROWS]
    assert len({row.name for row in ROWS}) >= 60
    assert set(commands) == set(USUAL)
