"""Forecasts kept in the cache's folder, so that another budget on the same statistics starts at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter

from stages.json_file import explained, read_json, write_json
from stages.records import QuantSpec, SiteForecast

FILE = "forecast.json"
_FILES = TypeAdapter(dict[str, SiteForecast])


def forecast_key(spec: QuantSpec) -> str:
    """A format's name in a forecast: its label, and whether codes have a zero point."""
    return spec.label if spec.symmetric else f"{spec.label}z"


def read_forecasts(folder: Path) -> dict[str, SiteForecast]:
    """By site; nothing where there is no readable file."""
    return read_json(folder / FILE, _FILES) or {}


def write_forecasts(folder: Path, forecasts: Mapping[str, SiteForecast]) -> None:
    """Keep ``forecasts``.

    Raises:
        UserError: the folder can't be written.
    """
    failure = f"A budget's forecasts can't be kept in {folder / FILE}"
    with explained(failure, "choose a --cache_dir that can be written"):
        write_json(folder / FILE, _FILES, dict(forecasts))
