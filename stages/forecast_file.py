"""Forecasts kept in the cache's folder, so that another budget on the same statistics starts at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stages.atomic import whole_file
from stages.errors import UserError
from stages.records import QuantSpec, SiteForecast

FILE = "forecast.json"
_FILES = TypeAdapter(dict[str, SiteForecast])


def forecast_key(spec: QuantSpec) -> str:
    """A format's name in a forecast: its label, and whether codes have a zero point."""
    return spec.label if spec.symmetric else f"{spec.label}z"


def read_forecasts(folder: Path) -> dict[str, SiteForecast]:
    """By site; nothing where there is no readable file."""
    try:
        return _FILES.validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return {}


def write_forecasts(folder: Path, forecasts: Mapping[str, SiteForecast]) -> None:
    """Keep ``forecasts``.

    Raises:
        UserError: the folder can't be written.
    """
    try:
        with whole_file(folder / FILE) as partial:
            partial.write_bytes(_FILES.dump_json(dict(forecasts), indent=1))
    except OSError as error:
        raise UserError(
            f"{folder / FILE} can't be written ({error.strerror}): a budget's forecasts are kept there; choose a "
            "--cache_dir that can be written."
        ) from error
