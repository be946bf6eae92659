"""Run a command in a process of its own: its seconds, its peak memory, or the sentence that it failed with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError

_LAUNCHER = Path(__file__).with_name("launcher.py")
_MARK = re.compile(r"^(error: |ERROR: |\w*(Error|Exception): )")
_SIGNALS = 128
_KILLED = 9


class CommandFailed(UserError):
    """A command ended with an error; the message is its last line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a whole process took."""

    seconds: float
    peak_bytes: int | None
    """Most memory that it held at once; None where the operating system doesn't tell (Windows)."""


def run_measured(command: Sequence[str], log: Path) -> Cost:
    """Run ``command`` to its end; what it prints goes to the file ``log``, which is replaced.

    Raises:
        CommandFailed: there is no such program, or it ends with another exit code than 0.
    """
    if shutil.which(command[0]) is None:
        raise CommandFailed(f"{command[0]} is no program that can be run")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        report = Path(scratch) / "peak_bytes"
        started = time.perf_counter()
        code = _run((sys.executable, "-I", str(_LAUNCHER), str(report), *command), log)
        seconds = time.perf_counter() - started
        if code != 0:
            raise CommandFailed(_reason(code, log))
        return Cost(seconds=seconds, peak_bytes=int(report.read_text("ascii")) if report.is_file() else None)


def _run(command: Sequence[str], log: Path) -> int:
    """The exit code of ``command``; it and what it started end with this process's interruption."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(code: int, log: Path) -> str:
    """The last line of what a failed command printed; a traceback ends with the error itself."""
    if code > _SIGNALS:
        number = code - _SIGNALS
        return f"ended by signal {number}" + (", as when memory runs out" if number == _KILLED else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"ended with exit code {code} and said nothing")
    return _MARK.sub("", last)
