"""What the tests of budgets share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stages.calibration.cache import CalibrationCache, open_cache
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model


@pytest.fixture
def cache(tiny_model: Path, tiny_cache: Path, tmp_path: Path) -> CalibrationCache:
    """Return a copy, since forecasts and sensitivities are kept in it."""
    return _copied(tiny_model, tiny_cache, tmp_path)


@pytest.fixture(scope="module")
def forecast_once(tiny_model: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationCache:
    """Return a copy in which what one test forecasts serves the next."""
    return _copied(tiny_model, tiny_cache, tmp_path_factory.mktemp("forecast"))


def _copied(model: Path, cache: Path, folder: Path) -> CalibrationCache:
    return open_cache(Path(shutil.copytree(cache, folder / "cache")), fingerprint_model(locate_model(model)))
