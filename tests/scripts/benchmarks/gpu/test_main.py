"""The GPU check on the CPU with tiny shapes: every step is taken, and what fails is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from scripts.benchmarks.figures import Machine
from scripts.benchmarks.gpu import __main__ as command
from scripts.benchmarks.gpu.figures import GpuCheck, WholeFigure
from scripts.benchmarks.gpu.models import TINY
from scripts.benchmarks.gpu.steps import Room, place, search
from scripts.benchmarks.gpu.tables import check_table
from scripts.options import GpuCheckConfig

EMPTY = GpuCheck(machine=Machine(processor="p", cores=2, threads=2, gpu=None, versions={}), size="tiny")


def shown(found: GpuCheck) -> str:
    return " ".join(" ".join(line.plain for line in check_table(found).lines(120)).split())


@pytest.mark.slow
def test_steps_run_on_the_cpu(tmp_path: Path) -> None:
    room = Room(folder=tmp_path, sizes=TINY)
    found = search(place(EMPTY, room), room)
    assert found.placement is not None
    assert (found.placement.provider, found.placement.outputs) == ("CPUExecutionProvider", "cpu")
    assert [(layer.in_features, layer.out_features) for layer in found.layers] == [
        (64, 128), (64, 64), (64, 192), (96, 64), (64, 512),
    ]  # fmt: skip
    statistics, searched = found.wholes
    inside, head = sum(layer.seconds for layer in found.layers[:-1]), found.layers[-1].seconds
    assert searched.seconds == pytest.approx(4 * inside + 2 * head)
    assert statistics.seconds > 0
    assert "activations stay on cpu" in shown(found)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_whole_check(tmp_path: Path) -> None:
    output = tmp_path / "check"
    (section,) = command.gpu_check(GpuCheckConfig(output=output, size="tiny"))
    found = TypeAdapter(GpuCheck).validate_json((output / "gpu_check.json").read_bytes())
    assert section.record == found
    assert [path.name for path in output.iterdir()] == ["gpu_check.json"]
    assert found.not_done == ()
    assert len(found.fusion) == 14
    assert all(fusion.fused == fusion.sites >= 10 for fusion in found.fusion)
    assert found.same_bits
    assert found.speed is not None
    assert [model.model for model in found.speed.models] == ["whole", "whole-int4"]
    assert "two searches the same bits" in shown(found)


def test_a_step_that_fails_or_comes_too_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(found: GpuCheck, room: Room) -> GpuCheck:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(command, "_STEPS", {"placement": fails})
    (section,) = command.gpu_check(GpuCheckConfig(output=tmp_path, size="tiny"))
    assert section.record is not None
    assert json.loads((tmp_path / "gpu_check.json").read_text())["not_done"] == [
        ["placement", "RuntimeError: CUDA error: out of memory"]
    ]
    (section,) = command.gpu_check(GpuCheckConfig(output=tmp_path, size="tiny", seconds=-1))
    assert isinstance(section.record, GpuCheck)
    assert "not done placement: -1 s were over" in shown(section.record)


def test_figures_stand_beside_the_aims() -> None:
    whole = WholeFigure(name="search", seconds=80.0, aim=90.0, how="32 times")
    slow = WholeFigure(name="statistics", seconds=31.0, aim=30.0, how="16 times")
    found = GpuCheck(machine=EMPTY.machine, size="full", wholes=(whole, slow))
    assert "80.0 s, aim 90 s: met: search (32 times)" in shown(found)
    assert "31.0 s, aim 30 s: missed: statistics (16 times)" in shown(found)
