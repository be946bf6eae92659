"""Two runs that need .venv at once: one installs, the other waits for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

VENV = Path(__file__).parents[3] / "scripts" / "environment" / "venv.sh"
PYTHON = """\
#!/bin/bash
echo "$*" >>"$LOG"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
if [ "$1 $2 $3" = "-m pip install" ]; then sleep 0.5; fi
"""


@pytest.mark.skipif(shutil.which("flock") is None or shutil.which("bash") is None, reason="needs flock and bash")
def test_one_of_two_runs_installs(tmp_path: Path) -> None:
    (tmp_path / "scripts" / "environment").mkdir(parents=True)
    script = shutil.copy(VENV, tmp_path / "scripts" / "environment")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"LOG": str(tmp_path / "log"), "PYTHON": str(python)}
    command = ["bash", "-euc", f'extras=dev; source "{script}"']
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate()[1] for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    assert sorted("waiting for another run" in each for each in said) == [False, True]
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum(line.startswith("-m venv") for line in lines) == 1
    assert sum(" -e .[dev]" in line for line in lines) == 1
