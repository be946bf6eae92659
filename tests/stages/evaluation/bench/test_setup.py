"""Text that was calibrated on is recognized, wherever its windows begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.calibration.cache import CacheKey, new_cache
from stages.errors import UserError
from stages.evaluation.bench.setup import common_share, refuse_calibrated

GENERATOR = np.random.default_rng(0)
CALIBRATION = GENERATOR.integers(1000, size=(6, 64))
OTHER = GENERATOR.integers(1000, size=(4, 64))


def slow_share(tokens: np.ndarray, others: np.ndarray) -> float:
    known = [list(other[i : i + 16]) for other in others for i in range(64 - 15)]
    runs = [list(window[i : i + 16]) for window in tokens for i in range(64 - 15)]
    return sum(run in known for run in runs) / len(runs)


def test_the_share_counts_runs_at_every_offset() -> None:
    shifted = CALIBRATION.reshape(-1)[40 : 40 + 4 * 64].reshape(4, 64)
    mixed = np.concatenate([shifted[:1], OTHER[:3]])
    for tokens in (CALIBRATION, shifted, OTHER, mixed):
        assert common_share(tokens, CALIBRATION) == slow_share(tokens, CALIBRATION)
    assert common_share(CALIBRATION, CALIBRATION) == 1
    assert common_share(OTHER, CALIBRATION) == 0
    # A window that lies across two of theirs has lost only the runs across the border.
    assert common_share(shifted, CALIBRATION) > 0.6


def test_windows_shorter_than_a_run_share_nothing() -> None:
    assert common_share(CALIBRATION[:, :10], CALIBRATION[:, :10]) == 0


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    key = CacheKey(
        model_fingerprint="m",
        token_fingerprint="t",
        source="s",
        calibration_windows=5,
        held_out_windows=1,
        seq_len=64,
        providers=(),
        token_weights="none",
    )
    folder = tmp_path / "cache"
    with new_cache(folder, key, (), overwrite=False) as writer:
        writer.write_tokens(CALIBRATION[:5], CALIBRATION[5:])
    return folder


def test_calibrated_and_held_out_text_is_refused(cache: Path) -> None:
    for tokens in (CALIBRATION[1:3], CALIBRATION[5:]):
        with pytest.raises(UserError, match=r"--text some\.txt: 100% of its runs of 16 tokens were calibrated on"):
            refuse_calibrated("some.txt", tokens, cache)
    refuse_calibrated("some.txt", OTHER, cache)


def test_a_quotation_is_tolerated_and_a_missing_cache_has_seen_nothing(cache: Path, tmp_path: Path) -> None:
    quoting = OTHER.copy()
    quoting[0, :20] = CALIBRATION[0, :20]
    assert 0 < common_share(quoting, CALIBRATION) < 0.05
    refuse_calibrated("some.txt", quoting, cache)
    refuse_calibrated("some.txt", CALIBRATION, tmp_path / "none")


def test_a_cache_without_its_tokens_is_an_error(cache: Path) -> None:
    (cache / "tokens.safetensors").unlink()
    with pytest.raises(UserError, match=r"tokens\.safetensors is missing or damaged"):
        refuse_calibrated("some.txt", OTHER, cache)
