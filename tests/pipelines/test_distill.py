"""``--distill`` through the whole command: scales move, codes stay, and answers come nearer to the base's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import stages.quantization.blocks.distill
from stages.quantization.weights.store import QuantizedStore, open_store
from tests.pipelines.test_block_tuning import _quantize
from tests.support.commands import Commands

_TEXT = ("--use_random_calib", "--seq_len", 16, "--calib_size", 64)
_SEARCH = ("--algo", "awq_lite", "--block_size", 16, "--lm_head", 8, *_TEXT)
_DISTILL = ("--distill", 60)


def _same(first: QuantizedStore, second: QuantizedStore) -> tuple[list[bool], list[bool]]:
    """Return for every site whether the codes are the same, and whether the scales are."""
    pairs = [
        pair
        for index in range(len(first.recipe.groups))
        for pair in zip(first.read_group(index).weights, second.read_group(index).weights, strict=True)
    ]
    codes = [torch.equal(one.codes, other.codes) for one, other in pairs]
    return codes, [torch.equal(one.scales, other.scales) for one, other in pairs]


def test_scales_are_trained_codes_stay_and_a_stopped_run_goes_on(
    tiny_model: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for output, more in (("plain", ()), ("whole", _DISTILL)):
        code, printed = _quantize(commands, tiny_model, cache, tmp_path / output, *_SEARCH, *more)
        assert code == 0, printed
    assert "awq_lite distilled INT4" in printed
    moved = re.search(r"held-out windows (\d\.\d+) -> (\d\.\d+) nats", printed)
    assert moved is not None
    assert float(moved[2]) < float(moved[1])
    whole = open_store(tmp_path / "whole.weights")
    codes, scales = _same(open_store(tmp_path / "plain.weights"), whole)
    assert all(codes)
    assert [index for index, same in enumerate(scales) if same] == [len(scales) - 1]  # lm_head lies in no layer
    assert {report.algorithm for report in whole.reports()} == {"distill", "awq_lite"}

    steps: list[int] = []
    step = stages.quantization.blocks.distill.Distiller._step

    def stopped(self: object, *arguments: object) -> None:
        steps.append(1)
        if len(steps) == 9:
            raise KeyboardInterrupt
        step(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(stages.quantization.blocks.distill.Distiller, "_step", stopped)
        code, _ = _quantize(commands, tiny_model, cache, tmp_path / "stopped", *_SEARCH, *_DISTILL)
    assert code != 0
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(stages.quantization.blocks.distill.Distiller, "_step", lambda *a: (steps.append(1), step(*a))[1])
        code, printed = _quantize(commands, tiny_model, cache, tmp_path / "stopped", *_SEARCH, *_DISTILL)
    assert code == 0, printed
    assert len(steps) == 14 - 7  # the state is kept at every eighth of the fourteen steps
    assert all(map(all, _same(whole, open_store(tmp_path / "stopped.weights"))))
    assert {path.name for path in (tmp_path / "stopped.weights").iterdir() if path.is_dir()} == {"report"}
    assert not list((tmp_path / "stopped.weights").glob("*.pt"))
