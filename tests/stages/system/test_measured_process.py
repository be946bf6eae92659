"""Measure a command, or say why it failed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.system.measured_process import CommandFailed, run_measured


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_seconds_and_memory_are_the_processes_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    small = run_measured(python("import time; time.sleep(0.3); print('done')"), log)
    assert log.read_text().strip() == "done"
    large = run_measured(python("x = bytearray(200_000_000)"), log)
    # The interpreter itself needs a few ten MB and some ten milliseconds.
    assert 0.3 <= small.seconds < 30
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    assert small.peak_bytes < 150e6
    assert 200e6 < large.peak_bytes < 350e6


def test_a_large_parent_is_not_counted(tmp_path: Path) -> None:
    held = bytearray(300_000_000)
    cost = run_measured(python("print('small')"), tmp_path / "log")
    assert len(held) == 300_000_000
    assert cost.peak_bytes is not None
    assert cost.peak_bytes < 150e6


def test_an_interruption_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    """A program that measures an endless command is interrupted, as by Ctrl-C; the command must not live on."""
    beats = tmp_path / "beats"
    endless = f"import time\nwhile True:\n    open({str(beats)!r}, 'a').write('x')\n    time.sleep(0.02)"
    measuring = (
        # A shell that starts the tests in the background makes programs ignore Ctrl-C.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from stages.system.measured_process import run_measured; "
        f"run_measured({python(endless)!r}, Path({str(tmp_path / 'log')!r}))"
    )
    program = subprocess.Popen(python(measuring), stderr=subprocess.PIPE)
    _wait_until(beats.exists)
    program.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in program.communicate(timeout=60)[1]
    counted = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == counted


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("raise ValueError('no such block')", "no such block"),
        ("import sys; print('error: --algo is wrong'); sys.exit(2)", "--algo is wrong"),
        ("import sys; print('50%\\r100%\\rlast line'); sys.exit(3)", "last line"),
        ("import sys; sys.exit(4)", "ended with exit code 4 and said nothing"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9, as when memory runs out"),
    ],
)
def test_a_failure_is_its_last_line(tmp_path: Path, code: str, sentence: str) -> None:
    with pytest.raises(CommandFailed) as failure:
        run_measured(python(code), tmp_path / "log")
    assert str(failure.value) == sentence


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="nothing is not a program that can be run"):
        run_measured((str(tmp_path / "nothing"),), tmp_path / "log")
