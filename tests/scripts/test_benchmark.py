"""Compute a benchmark's ratios, and run one whole on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from scripts.benchmark import benchmark
from scripts.benchmarks.figures import Benchmark, CaptureFigure, CommandFigure, Machine
from scripts.benchmarks.tables import benchmark_tables
from scripts.options import BenchmarkConfig
from stages.commands.output import TablePrinter

MACHINE = Machine(processor="p", cores=2, threads=2, gpu=None, versions={})


def test_calibration_is_compared_with_plain_inference() -> None:
    capture = CaptureFigure(tokens=512, plain=600.0, tapped=500.0, observed=400.0, provider="cpu")
    assert capture.ratio == 1.5


def text_of(found: Benchmark) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in benchmark_tables(found):
        console.print(table)
    return console.export_text()


def command(name: str, seconds: float | None, failure: str | None = None) -> CommandFigure:
    return CommandFigure(name=name, command="c", seconds=seconds, peak_bytes=10**8, failure=failure)


def test_the_competitor_is_compared_with_both_stages_together() -> None:
    ours = (command("calibrate", 30.0), command("quantize awq_full", 10.0))
    found = Benchmark(machine=MACHINE, base="b", commands=(*ours, command("competitor (x)", 1000.0)))
    assert "25.0 x faster, calibration included" in text_of(found)


def test_a_competitor_that_fails_says_why_and_nothing_is_compared() -> None:
    ours = (command("calibrate", 30.0), command("quantize awq_full", 10.0))
    found = Benchmark(machine=MACHINE, base="b", commands=(*ours, command("competitor (x)", None, "no wheel")))
    assert "competitor (x): no wheel" in text_of(found)
    assert "faster" not in text_of(found)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_whole_run(
    tiny_model: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "long.txt"
    text.write_text(tiny_text.read_text() * 4)
    config = BenchmarkConfig(
        base=tiny_model, output=tmp_path / "bench", algo=("awq_full",), block_size=16, dataset=str(text), calib_size=3,
        calibration_eps="cpu", device="cpu", rounds=1, no_competitor=True,
    )  # fmt: skip
    for section in benchmark(config):
        TablePrinter(Console()).show(section)
    found = TypeAdapter(Benchmark).validate_json((tmp_path / "bench" / "benchmark.json").read_bytes())
    assert [command.name for command in found.commands] == ["calibrate", "quantize awq_full"]
    assert all(command.failure is None and command.seconds and command.peak_bytes for command in found.commands)
    assert found.capture is not None
    assert 0 < found.capture.observed <= found.capture.tapped
    # Packed qkv, o_proj, gate and up, down_proj, lm_head: five shapes.
    assert sorted((figure.in_features, figure.out_features) for figure in found.search) == [
        (64, 64),
        (64, 128),
        (64, 192),
        (64, 300),
        (96, 64),
    ]
    assert all(figure.seconds > 0 for figure in found.search)
    assert found.writing is not None
    assert found.writing.bytes == (tmp_path / "bench" / "awq_full" / "model.onnx.data").stat().st_size
    left = sorted(path.name for path in (tmp_path / "bench").iterdir())
    assert left == [
        "awq_full", "awq_full.weights", "benchmark.json", "calibrate.log", "calibration", "quantize-awq_full.log",
    ]  # fmt: skip
    assert "against plain inference" in capsys.readouterr().out
    json.loads((tmp_path / "bench" / "benchmark.json").read_text())
