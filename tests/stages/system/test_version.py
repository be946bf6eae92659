"""The version that runs, and its commit where that is known."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

from stages.system.version import this_version


def test_a_clone_knows_its_commit_and_nothing_else_takes_one_of_a_folder_above(tmp_path: Path) -> None:
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = this_version(tmp_path)
    assert (found.number, found.commit) == (version("genai-quant"), head.stdout[:10])
    (inside := tmp_path / "site-packages").mkdir()
    assert this_version(inside).commit is None
