"""Run a command and write its peak memory to a file: ``python -I launcher.py FILE COMMAND ...``.

A small process of its own, because on Linux a process's peak memory includes what its parent held when it started it.
It exits with the command's exit code, or with 128 plus the number of the signal that ended it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(report: str, *command: str) -> int:
    """Run ``command`` and return its exit code; write its peak memory in bytes to ``report``, except on Windows."""
    process = subprocess.Popen(command)
    if sys.platform == "win32":
        return process.wait()
    _, status, usage = os.wait4(process.pid, 0)
    # Popen doesn't notice that wait4 has already waited.
    process.returncode = os.waitstatus_to_exitcode(status)
    Path(report).write_text(str(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)), encoding="ascii")
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
