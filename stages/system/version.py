"""Say which version of this project runs, and from which commit where that is known."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PROJECT = "genai-quant"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version of genai-quant."""

    number: str
    commit: str | None = None
    """None where it is neither a clone nor was installed from one."""


def this_version(root: Path = _ROOT) -> Version:
    """Return the version that runs; ``root`` is the folder that holds its packages."""
    try:
        installed = distribution(PROJECT)
    except PackageNotFoundError:  # a clone on the path
        return Version(number="unknown", commit=_commit_of_clone(root))
    return Version(number=installed.version, commit=_commit_of_clone(root) or _commit_installed(installed))


def _commit_of_clone(root: Path) -> str | None:
    # Git itself would also find a repository of somebody else's further up.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit_installed(installed: Distribution) -> str | None:
    """Return what pip keeps where it installs from a repository."""
    try:
        source = json.loads(installed.read_text("direct_url.json") or "{}")
        return str(source["vcs_info"]["commit_id"])
    except (ValueError, KeyError, TypeError):
        return None
