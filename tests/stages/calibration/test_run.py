"""A calibration is made once, made again when asked, and never takes the place of something else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from stages.calibration.run import calibrate
from stages.commands.calibrate_options import CalibrateConfig
from stages.errors import CacheMismatch, GraphError, UserError
from tests.support.written import cache_times


@pytest.fixture
def config(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> CalibrateConfig:
    return CalibrateConfig(
        onnx_path=tiny_model,
        dataset=str(tiny_text),
        calib_size=4,
        seq_len=16,
        calibration_eps="cpu",
        cache_dir=tmp_path / "cache",
    )


def test_a_calibration_that_is_there_is_not_made_again(config: CalibrateConfig, tmp_path: Path) -> None:
    first = calibrate(config)
    assert first.made is not None
    assert first.bytes == sum(file.stat().st_size for file in config.cache_path.iterdir())
    times = cache_times(tmp_path)
    # How much memory it takes and how many windows run at a time change nothing about what it is.
    assert calibrate(replace(config, max_memory="300kB", batch_size=2)) == replace(first, made=None)
    assert cache_times(tmp_path) == times


def test_another_calibration_is_replaced_only_when_asked(config: CalibrateConfig) -> None:
    calibrate(config)
    with pytest.raises(
        CacheMismatch, match=r"holds another calibration: .*; choose another folder or pass --overwrite"
    ):
        calibrate(replace(config, seed=1))
    again = calibrate(replace(config, seed=1, overwrite=True))
    assert again.made is not None
    assert calibrate(replace(config, seed=1)).key == again.key


def test_a_folder_of_something_else_is_never_replaced(config: CalibrateConfig) -> None:
    config.cache_path.mkdir()
    (config.cache_path / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"is not a calibration cache \(it holds letters\.txt\) and is never replaced"):
        calibrate(replace(config, overwrite=True))


def test_a_cache_that_cannot_be_read_is_replaced_only_when_asked(config: CalibrateConfig) -> None:
    calibrate(config)
    (config.cache_path / "manifest.json").write_text("{")
    with pytest.raises(CacheMismatch, match=r"is damaged; run stages\.calibrate again with --overwrite"):
        calibrate(config)
    assert calibrate(replace(config, overwrite=True)).made is not None


def test_windows_longer_than_the_models_context_are_refused(config: CalibrateConfig) -> None:
    with pytest.raises(
        GraphError, match=r"--seq_len 100000 is longer than the context of .*; pass --seq_len \d+ or less"
    ):
        calibrate(replace(config, seq_len=100_000))


@pytest.mark.parametrize(("token_weights", "kilobytes"), [("none", 136), ("auto", 321)])
def test_a_disk_without_room_is_named_before_the_model_runs(
    token_weights: Literal["auto", "none"],
    kilobytes: int,
    config: CalibrateConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache has 136,064 bytes, twice as many with weights, and what enters the layers 49,152."""
    config = replace(config, token_weights=token_weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=kilobytes * 1000))
    with pytest.raises(UserError, match=rf"can't be written to {tmp_path}: it takes about .* and 0\.0 GB are free"):
        calibrate(config)
    assert list(tmp_path.iterdir()) == []
