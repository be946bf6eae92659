"""Keep what a comparison found in its folder, for the pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from stages.evaluation.bench.results import TextResults
from stages.evaluation.records import SpeedTest
from stages.system.json_file import explained, write_json

_FILE = "comparison.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Our models and the competitors' on some texts."""

    texts: tuple[TextResults, ...]
    speed: SpeedTest | None
    """The base first; None where it wasn't asked for."""


_COMPARISONS = TypeAdapter(Comparison)


def save_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison`` into ``folder``."""
    write_json(folder / _FILE, _COMPARISONS, comparison)


def read_comparison(folder: Path) -> Comparison:
    """Read the comparison in ``folder``.

    Raises:
        UserError: there is none, or it can't be read.
    """
    with explained(f"{folder / _FILE} can't be read", "pass the --output of scripts.compare_with_peer"):
        return _COMPARISONS.validate_json((folder / _FILE).read_bytes())
