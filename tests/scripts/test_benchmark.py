"""The benchmark's arithmetic, and one whole run on a tiny model."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from scripts.base_models.synthetic_llama import LlamaShape
from scripts.benchmark import benchmark
from scripts.benchmarks import growth
from scripts.benchmarks.figures import (
    Benchmark,
    CaptureFigure,
    CommandFigure,
    GrowthFigure,
    GrowthPoint,
    Machine,
    SearchFigure,
)
from scripts.benchmarks.plot import growth_plot
from scripts.benchmarks.tables import benchmark_tables
from scripts.options import BenchmarkConfig
from stages.commands.output import TablePrinter

MACHINE = Machine(processor="p", cores=2, threads=2, gpu=None, versions={})
TINY = LlamaShape(layers=1, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocabulary=300, context=512)


def points(power: float) -> GrowthFigure:
    return GrowthFigure(
        axis="tokens",
        points=tuple(
            GrowthPoint(size=size, calibrate_seconds=3 * size**power, search_seconds=7.0) for size in (100, 200, 400)
        ),
    )


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_finds_the_power_that_times_follow(power: float) -> None:
    assert points(power).exponents == pytest.approx((power, 0.0))


def test_ratios() -> None:
    capture = CaptureFigure(tokens=512, plain=600.0, tapped=500.0, observed=400.0, provider="cpu")
    assert capture.ratio == 1.5
    search = SearchFigure(
        group="mlp", in_features=8, out_features=8, algorithm="rtn", flops=10**9, seconds=0.5,
        matmul_flops_per_second=8e9, device_peak_bytes=None,
    )  # fmt: skip
    assert search.share_of_matmul == 0.25


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


def test_the_plot_holds_every_time() -> None:
    page = ET.fromstring(growth_plot([points(1.0), points(2.0)]))
    titles = [node.text for node in page.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(
        [f"search, {size}: 7.00 s" for size in (100, 200, 400)] * 2
        + [f"calibrate, {size}: {3 * size**power:.2f} s" for size in (100, 200, 400) for power in (1, 2)]
    )
    assert len(list(page.iter("{http://www.w3.org/2000/svg}polyline"))) == 4


@pytest.mark.slow
def test_a_whole_run(
    tiny_model: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(growth, "_SHAPE", TINY)
    monkeypatch.setattr(growth, "_LENGTH", 16)
    monkeypatch.setattr("scripts.benchmarks.search._PRODUCT_SECONDS", 0.01)
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
    # packed qkv, o_proj, gate and up, down_proj: four shapes, each searched with products of its own.
    assert sorted((figure.in_features, figure.out_features) for figure in found.search) == [
        (64, 64),
        (64, 128),
        (64, 192),
        (96, 64),
    ]
    assert all(figure.flops > 0 for figure in found.search)
    assert found.writing is not None
    assert found.writing.bytes == (tmp_path / "bench" / "awq_full" / "model.onnx.data").stat().st_size
    assert [figure.axis for figure in found.growth] == ["tokens", "layers", "inputs of a layer (K)"]
    ET.parse(tmp_path / "bench" / "growth.svg")
    left = sorted(path.name for path in (tmp_path / "bench").iterdir())
    assert left == [
        "awq_full", "awq_full.weights", "benchmark.json", "calibrate.log", "calibration", "growth.svg",
        "quantize-awq_full.log",
    ]  # fmt: skip
    assert "against plain inference" in capsys.readouterr().out
    json.loads((tmp_path / "bench" / "benchmark.json").read_text())
