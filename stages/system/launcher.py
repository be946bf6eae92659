"""A small process that runs a command and writes down the most memory that it held: ``python -I launcher.py OUT ...``.

It stands between because Linux counts for a new process what its parent held when it started it; this one holds hardly
anything. Its exit code is the command's, or 128 and the signal's number.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(report: str, *command: str) -> int:
    """Run ``command``; write its peak memory in bytes to the file ``report``, nothing where it isn't known."""
    process = subprocess.Popen(command)
    if sys.platform == "win32":
        return process.wait()
    _, status, usage = os.wait4(process.pid, 0)
    # Popen doesn't learn of a wait that isn't its own.
    process.returncode = os.waitstatus_to_exitcode(status)
    Path(report).write_text(str(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)), encoding="ascii")
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
