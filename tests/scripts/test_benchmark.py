"""Compute a benchmark's ratios, and run one whole on a tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from scripts.benchmark import benchmark
from scripts.benchmarks.figures import Benchmark, CaptureFigure, CommandFigure, KernelFigure, Machine
from scripts.benchmarks.tables import benchmark_tables
from scripts.options import BenchmarkConfig
from stages.commands.output import TablePrinter

MACHINE = Machine(processor="p", cores=2, threads=2, gpu=None, versions={})


def test_calibration_is_compared_with_plain_inference() -> None:
    capture = CaptureFigure(tokens=512, plain=600.0, tapped=500.0, observed=400.0, provider="cpu")
    assert capture.ratio == 1.5


def test_the_whole_calibration_is_compared_with_plain_inference_of_its_tokens() -> None:
    capture = CaptureFigure(tokens=512, plain=600.0, tapped=500.0, observed=400.0, provider="cpu")
    found = Benchmark(
        machine=MACHINE, base="b", commands=(command("calibrate", 30.0),), calibration_tokens=12000, capture=capture
    )
    assert re.search(r"the whole command, against plain inference .*1\.50 x", text_of(found))


def test_kernels_are_parts_of_a_plain_product_and_say_how_they_grow() -> None:
    def figure(size: int, growth: float) -> KernelFigure:
        return KernelFigure(
            in_features=size,
            out_features=size,
            product=0.1 * growth,
            factoring=0.2 * growth,
            gptq=0.2 * growth,
            descent=0.4,
        )

    shown = text_of(Benchmark(machine=MACHINE, base="b", commands=(), kernels=(figure(64, 1.0), figure(128, 8.0))))
    assert "0.2000 (0.50)" in shown
    assert "1.6000 (0.50); K^3.0" in shown
    assert "0.4000 (2.00); K^0.0" in shown


def test_a_search_is_compared_with_a_copy_of_its_files() -> None:
    copied = replace(command("quantize rtn_dq", 10.0), copy_seconds=4.0)
    assert "2.5 x its time" in text_of(Benchmark(machine=MACHINE, base="b", commands=(copied,)))


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


def test_rounding_needs_no_calibration() -> None:
    ours = (command("calibrate", 30.0), command("quantize rtn_dq", 10.0))
    shown = text_of(Benchmark(machine=MACHINE, base="b", commands=(*ours, command("competitor (x)", 1000.0))))
    assert "100.0 x faster" in shown
    assert "calibration included" not in shown


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
    assert [figure.in_features for figure in found.kernels][:2] == [512, 1024]
    assert {(figure.in_features, figure.out_features) for figure in found.kernels} > {(64, 300), (96, 64)}
    assert all(min(figure.product, figure.factoring, figure.gptq, figure.descent) > 0 for figure in found.kernels)
    assert found.commands[1].copy_seconds is not None
    assert found.calibration_tokens == 3 * 512
    assert found.writing is not None
    assert found.writing.bytes == (tmp_path / "bench" / "awq_full" / "model.onnx.data").stat().st_size
    left = sorted(path.name for path in (tmp_path / "bench").iterdir())
    assert left == [
        "awq_full", "awq_full.weights", "benchmark.json", "calibrate.log", "calibration", "quantize-awq_full.log",
    ]  # fmt: skip
    assert "against plain inference" in capsys.readouterr().out
    json.loads((tmp_path / "bench" / "benchmark.json").read_text())
