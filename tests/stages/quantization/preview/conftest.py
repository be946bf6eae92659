"""Spare previews the seconds in which they find out how fast this machine multiplies."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time products of the narrowest matrices only: what stage one takes is forecast from them, and not compared."""
    monkeypatch.setattr("stages.quantization.preview.sharing._WIDEST", 256)
