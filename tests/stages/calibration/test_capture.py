"""Calibration in partitions gives the statistics of one pass, from sessions that hold a part of the model each."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from stages.calibration.cache import open_cache
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, load_graph
from stages.model.sites import find_groups
from stages.runtime.tap import ActivationTap
from tests.support.commands import Commands
from tests.support.written import cache_times


def calibrate(commands: Commands, base: Path, text: Path, cache: Path, *more: object) -> str:
    code, printed = commands.calibrate(
        "--onnx_path", base, "--dataset", text, "--calib_size", 12, "--seq_len", 32, "--batch_size", 5,
        "--calibration_eps", "cpu", "--cache_dir", cache, *more,
    )  # fmt: skip
    assert code == 0, printed
    return printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("tiny_model", 1e-5),
        # Fused or not, float16 results differ by their rounding, 2^-11.
        ("tiny_model_dml", 4e-3),
        ("tiny_model_bf16", 1e-5),
    ],
)
def test_parts_give_the_statistics_of_the_whole(
    kind: str,
    tolerance: float,
    request: pytest.FixtureRequest,
    tiny_text: Path,
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = request.getfixturevalue(kind)
    calibrate(commands, base, tiny_text, tmp_path / "whole")
    sessions: list[ActivationTap] = []
    original = ActivationTap.run

    def counted(self: ActivationTap, tokens: object, boundary: object) -> object:
        sessions.append(self)
        return original(self, tokens, boundary)

    monkeypatch.setattr(ActivationTap, "run", counted)
    printed = calibrate(commands, base, tiny_text, tmp_path / "parts", "--max_memory", "300kB")
    parts = len({id(session) for session in sessions})
    assert parts >= 3
    assert f"the model ran in {parts} parts" in printed
    # One window held out and eleven to search with, five at a time: four batches for each part.
    assert len(sessions) == 4 * parts
    whole, in_parts = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "parts"))
    assert in_parts == whole
    fingerprint = fingerprint_model(locate_model(base))
    caches = [open_cache(tmp_path / name, fingerprint) for name in ("whole", "parts")]
    for group in find_groups(load_graph(locate_model(base))):
        expected, found = (cache.read(group.activation) for cache in caches)
        for part in ("calibration", "held_out"):
            one, other = getattr(expected, part), getattr(found, part)
            assert one.num_tokens == other.num_tokens
            size = one.abs_mean.abs().max()
            torch.testing.assert_close(other.abs_mean, one.abs_mean, rtol=0, atol=float(tolerance * size))
            for kept, again in ((one.gram, other.gram), (one.rows, other.rows)):
                assert (kept is None) == (again is None)
                if kept is not None and again is not None:
                    torch.testing.assert_close(again, kept, rtol=0, atol=float(tolerance * kept.abs().max()))


@pytest.mark.slow
def test_no_session_outlives_its_part(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[ort.InferenceSession]] = []
    alive: list[int] = []
    original = ActivationTap.run

    def watched(self: ActivationTap, tokens: object, boundary: object) -> object:
        if not any(session() is self.feeds.session for session in opened):
            opened.append(weakref.ref(self.feeds.session))
        gc.collect()
        alive.append(sum(session() is not None for session in opened))
        return original(self, tokens, boundary)

    monkeypatch.setattr(ActivationTap, "run", watched)
    calibrate(commands, tiny_model, tiny_text, tmp_path / "parts", "--max_memory", "300kB")
    assert len(opened) >= 3
    assert set(alive) == {1}


def test_one_part_where_everything_fits(tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands) -> None:
    printed = calibrate(commands, tiny_model, tiny_text, tmp_path / "cache", "--max_memory", "1GB")
    assert "parts" not in printed


def test_the_same_windows_in_parts_are_the_same_calibration(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    calibrate(commands, tiny_model, tiny_text, tmp_path / "cache")
    times = cache_times(tmp_path)
    assert times
    calibrate(commands, tiny_model, tiny_text, tmp_path / "cache", "--max_memory", "300kB")
    assert cache_times(tmp_path) == times


def test_no_size_is_a_message(tiny_model: Path, tmp_path: Path, commands: Commands) -> None:
    code, printed = commands.calibrate("--onnx_path", tiny_model, "--max_memory", "much", "--cache_dir", tmp_path / "c")
    assert code == 2
    assert "--max_memory 'much' is no size" in printed


def test_the_table_says_how_statistics_are_kept(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    """64 and 96 channels; 352 tokens to search with, so Gram matrices; 32 held out, which are kept as rows."""
    printed = calibrate(commands, tiny_model, tiny_text, tmp_path / "cache")
    assert "9 Gram matrices (packed triangles), 0 as the tokens' own rows" in printed
    file = load_file(tmp_path / "cache" / "0000.safetensors")
    assert file["calibration.gram_triangle"].shape == (32, 65)
    assert file["held_out.rows"].shape == (32, 64)
