"""Share a shorter wait between the tests that read tables."""

from __future__ import annotations

import pytest


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let datasets sleep less than its 5 s after each parquet stream, which pyarrow's threads need at exit."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2)
