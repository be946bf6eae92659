"""Make a virtual environment of exactly the pinned packages, for a competitor that must not touch ours."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from stages.errors import UserError
from stages.system.measured_process import CommandFailed, run_measured

_MARKER = "installed.txt"


def python_of(folder: Path) -> Path:
    """Return the interpreter of the virtual environment in ``folder``."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pinned_version(requirements: Path, package: str) -> str:
    """Return the version of ``package`` that ``requirements`` pin."""
    (version,) = re.findall(rf"^{package}==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    return str(version)


def ensure_environment(folder: Path, requirements: Path) -> None:
    """Make the environment in ``folder`` unless it was made from the same ``requirements``.

    Raises:
        UserError: a package can't be installed; what pip said is in FOLDER.log.
    """
    wanted = requirements.read_text(encoding="utf-8")
    marker = folder / _MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    try:
        run_measured((sys.executable, "-m", "venv", "--clear", str(folder)), log)
        run_measured((str(python_of(folder)), "-m", "pip", "install", "-r", str(requirements)), log)
    except CommandFailed as error:
        raise UserError(f"{requirements.name} can't be installed ({error}); {log} has what pip said.") from error
    marker.write_text(wanted, encoding="utf-8")
