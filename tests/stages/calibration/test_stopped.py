"""A calibration that is stopped, wherever it is, goes on from there and ends with the bytes of one that wasn't."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.calibration import capture, run
from stages.calibration.end_loss import back_pass
from stages.calibration.end_loss.back_pass import EndLossPass
from stages.calibration.on_disk import unfinished
from stages.calibration.run import calibrate
from stages.commands.calibrate_options import CalibrateConfig
from stages.errors import UserError
from stages.runtime.blocks.stream import BlockRunner
from stages.runtime.tap import ActivationTap
from tests.support.encoders import CHANNELS, SIDE, save_vision
from tests.support.written import contents

STEPS = {"run": (ActivationTap, "run"), "complete": (BlockRunner, "over"), "back": (EndLossPass, "_batch_back")}


@pytest.fixture
def config(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> CalibrateConfig:
    """One window that is held out, and five others, one at a time; two layers and a head."""
    return CalibrateConfig(
        onnx_path=tiny_model, dataset=str(tiny_text), calib_size=6, seq_len=16, calibration_eps="cpu", batch_size=1,
        cache_dir=tmp_path / "cache", kv_scales="per_channel",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (capture, back_pass):
        monkeypatch.setattr(module, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(unfinished, "_COST", 0.0)


@contextmanager
def counted(step: str, most: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> Iterator[list[int]]:
    """Count the steps of a kind; after ``most`` of them the next one raises ``error``."""
    owner, name = STEPS[step]
    original, steps = getattr(owner, name), list[int]()

    def once_more(*arguments: object) -> object:
        if len(steps) == most:
            raise error
        steps.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, once_more)
        yield steps


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("max_memory", "step", "most", "again", "words"),
    [
        # The pass of each kind of window, and two runs of what is in front of the first layer for the way back.
        ("1GB", "run", 1, 5 + 7, "about 1 window"),
        ("1GB", "run", 4, 2 + 7, "about 4 windows"),
        ("1GB", "complete", 2, 6, "all windows; tokens are weighed in 0 of 3 layers"),
        ("1GB", "back", 8, 6 + 6, "all windows; tokens are weighed in 1 of 3 layers"),
        ("1GB", "back", 12, 6, "all windows; tokens are weighed in 2 of 3 layers"),
        ("150kB", "run", 15, None, "about 3 windows of part 3 of"),
    ],
)
def test_it_goes_on_with_the_same_bytes(
    max_memory: str,
    step: str,
    most: int,
    again: int | None,
    words: str,
    config: CalibrateConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = replace(config, max_memory=max_memory)
    calibrate(replace(config, cache_dir=tmp_path / "whole"))
    with counted(step, most), pytest.raises(KeyboardInterrupt):
        calibrate(config)
    assert not config.cache_path.exists()
    with caplog.at_level(logging.INFO), counted(step) as steps:
        calibrate(config)
    assert f"going on with a calibration that was stopped after {words}" in caplog.text
    assert again is None or len(steps) == again
    assert contents(config.cache_path) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "whole"]


@pytest.mark.slow
@pytest.mark.thorough
def test_it_can_be_stopped_again_and_again(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where less memory is free the next time, but enough to cut the graph as before."""
    calibrate(replace(config, cache_dir=tmp_path / "whole"))
    for step, most, memory in (("run", 4, 8e9), ("back", 7, 1e9)):
        monkeypatch.setattr(run, "memory_limit", lambda *_, memory=memory: int(memory))
        with counted(step, most), pytest.raises(KeyboardInterrupt):
            calibrate(config)
    with counted("back") as steps:
        calibrate(config)
    assert len(steps) == 2 * 6, "the layers of six windows that were not run back yet"
    assert contents(config.cache_path) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.thorough
def test_other_options_begin_anew(config: CalibrateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calibrate(replace(config, cache_dir=tmp_path / "whole", seed=1))
    with counted("back", 8), pytest.raises(KeyboardInterrupt):
        calibrate(config)
    calibrate(replace(config, seed=1))
    assert "going on" not in caplog.text
    assert contents(config.cache_path) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "whole"]


def test_an_error_before_anything_is_finished_leaves_nothing(config: CalibrateConfig, tmp_path: Path) -> None:
    with counted("run", 0, error=UserError), pytest.raises(UserError):
        calibrate(config)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_sum_is_named(config: CalibrateConfig, tmp_path: Path) -> None:
    with counted("run", 3), pytest.raises(KeyboardInterrupt):
        calibrate(config)
    (tmp_path / ".cache.unfinished" / "sums-0-3" / "0000.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"0000\.safetensors, which a calibration that was stopped has left, is damaged"
    ):
        calibrate(config)


def test_samples_are_counted_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_vision(tmp_path / "model")
    images = np.random.default_rng(0).random((12, CHANNELS, SIDE, SIDE), np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=images)
    config = CalibrateConfig(
        onnx_path=tmp_path / "model", samples=str(tmp_path / "images.npz"), calibration_eps="cpu", batch_size=4,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    with counted("run", 2), pytest.raises(KeyboardInterrupt):
        calibrate(config)
    with caplog.at_level(logging.INFO):
        calibrate(config)
    assert "stopped after about 2 samples" in caplog.text
