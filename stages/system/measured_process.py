"""Run a command in a process of its own and measure its seconds and peak memory, or say why it failed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError

_LAUNCHER = Path(__file__).with_name("launcher.py")
_ROOT = _LAUNCHER.parents[2]
"""Where our packages lie."""
_ERROR_PREFIX = re.compile(r"^(error: |ERROR: |\w*(Error|Exception): )")
_SIGNALS = 128
"""Exit codes above it are the number of a signal more."""
_SIGKILL = 9


class CommandFailed(UserError):
    """A command ended with an error; the message is its last line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time and memory that a whole process took."""

    seconds: float
    peak_bytes: int | None
    """Peak memory; None on Windows, which doesn't report it."""


def run_measured(command: Sequence[str], log: Path) -> Cost:
    """Run ``command`` to its end; its output replaces the file ``log``.

    Raises:
        CommandFailed: there is no such program, or it ends with an exit code other than 0.
    """
    if shutil.which(command[0]) is None:
        raise CommandFailed(f"{command[0]} is not a program that can be run")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        report = Path(scratch) / "peak_bytes"
        started = time.perf_counter()
        code = _run((sys.executable, "-I", str(_LAUNCHER), str(report), *command), log, _safe_environment(command[0]))
        seconds = time.perf_counter() - started
        if code != 0:
            raise CommandFailed(_reason(code, log))
        return Cost(seconds=seconds, peak_bytes=int(report.read_text("ascii")) if report.is_file() else None)


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Return the exit code of ``command``; if this process is interrupted, end it and what it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            return process.wait()
        except BaseException:
            _kill(process)
            raise


def _safe_environment(program: str) -> dict[str, str]:
    """Return the environment for ``program`` in which Python imports nothing from the current folder.

    Where our own packages come from there, as in a clone that isn't installed, this Python is told where they are.
    """
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}
    if program == sys.executable and sys.path[0] == str(_ROOT):
        safe["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return safe


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(code: int, log: Path) -> str:
    """Return the last line that a failed command printed; a traceback ends with the error itself."""
    if code > _SIGNALS:
        number = code - _SIGNALS
        return f"ended by signal {number}" + (", as when memory runs out" if number == _SIGKILL else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"ended with exit code {code} and said nothing")
    return _ERROR_PREFIX.sub("", last)
