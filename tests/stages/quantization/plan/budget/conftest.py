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
    folder = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    return open_cache(folder, fingerprint_model(locate_model(tiny_model)))
