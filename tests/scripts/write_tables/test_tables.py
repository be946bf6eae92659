"""Tables show the numbers of their results, and the README the best of each tool."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.benchmarks.figures import Benchmark, CommandFigure, Machine
from scripts.peers.comparison import Comparison
from scripts.write_tables.results import BenchmarkResult, ComparisonResult, FamiliesResult, Provenance
from scripts.write_tables.tables import NOTHING, accuracy, cost, families, readme_results, readme_times
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.results import MeasuredModel, TextResults
from stages.evaluation.records import ModelRow, ModelSpeed, Rate, SpeedTest
from stages.system.measured_process import Cost

HERE = Provenance(date="2026-01-02", commit="abc", versions=("onnxruntime 1", "torch 2"), machine="a machine")


def scores(divergence: float, perplexity: float) -> Accuracy:
    return Accuracy(tokens=100, perplexity=perplexity, mean_divergence=divergence, top1_agreement=0.875)


def measured(name: str, divergence: float | None, *, failure: str | None = None, note: str = "") -> MeasuredModel:
    return MeasuredModel(
        name=name,
        command="python -m secret",
        unbeaten=False,
        note=note,
        failure=failure,
        bytes=None if divergence is None else 90_000_000,
        cost=None if divergence is None else Cost(seconds=12.3, peak_bytes=1_500_000_000),
        search=None,
        accuracy=None if divergence is None else scores(divergence, 20 + divergence),
    )


def speed(name: str, rate: float) -> ModelSpeed:
    prompt, decode = (Rate(median=each, slowest=each, fastest=each) for each in (10 * rate, rate))
    return ModelSpeed(model=name, prompt=prompt, decode=decode, load_seconds=1.0, peak_bytes=None, accuracy_level="4")


def comparison(title: str = "SmolLM2-135M-Instruct") -> ComparisonResult:
    models = (
        measured("rtn_dq", 0.5),
        measured("awq_gptq", 0.1),
        measured("awq_gptq-b16", 0.01),
        measured("awq_gptq-target_size-90MB", 0.02),
        measured("builder-k_quant_mixed", 0.4, note="from smollm2"),
        measured("builder-int4", 0.6),
        measured("modelopt-awq_lite-b32", 0.3),
        measured("modelopt-awq_full-b32", 0.2),
        measured("modelopt-rtn_dq-b32", None, failure="no | wheel"),
    )
    base = ModelRow(name="base", bytes=500_000_000, accuracy=scores(0.0, 20.0))
    rates = (speed("base", 30.0), *(speed(model.name, 60.0) for model in models if model.failure is None))
    test = SpeedTest(machine="m", runtime="r", threads=2, rounds=5, prompt_tokens=128, new_tokens=64, models=rates)
    elsewhere = tuple(
        replace(model, accuracy=scores(2 * model.accuracy.mean_divergence, 9.0)) if model.accuracy else model
        for model in models
    )
    texts = (
        TextResults(text="offline", base=base, models=models),
        TextResults(text="some/news.txt", base=base, models=elsewhere),
    )
    return ComparisonResult(title=title, provenance=HERE, comparison=Comparison(texts=texts, speed=test))


@pytest.mark.parametrize("block", [readme_results, readme_times, accuracy, cost, families])
def test_a_table_without_results_says_so(block) -> None:
    assert block([]) == NOTHING


def test_the_readme_shows_what_each_tool_makes_by_default_and_the_most_accurate_of_its_methods() -> None:
    assert readme_results([comparison()]).splitlines() == [
        "| SmolLM2-135M-Instruct | MB | KL, documentation | KL, news | mean KL | perplexity | prompt tokens/s | "
        "decoding tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| base model | 500.0 | 0 | 0 | 0 | 20.000 | 300 | 30.0 |",
        "| genai-quant | 90.0 | 0.1000 | 0.2000 | 0.1500 | 13.450 | 600 | 60.0 |",
        "| genai-quant, `--target_size 90MB` | 90.0 | 0.0200 | 0.0400 | 0.0300 | 13.423 | 600 | 60.0 |",
        "| onnxruntime-genai, `-p int4` | 90.0 | 0.6000 | 1.2000 | 0.9000 | 13.616 | 600 | 60.0 |",
        "| onnxruntime-genai, `k_quant_mixed` | 90.0 | 0.4000 | 0.8000 | 0.6000 | 13.550 | 600 | 60.0 |",
        "| NVIDIA ModelOpt, `awq_full` | 90.0 | 0.2000 | 0.4000 | 0.3000 | 13.483 | 600 | 60.0 |",
        "",
        "Measured on 2026-01-02 at commit abc with onnxruntime 1, torch 2; a machine.",
    ]


def test_of_many_texts_the_readme_shows_the_mean() -> None:
    result = comparison()
    texts = tuple(replace(result.comparison.texts[0], text=f"{name}.txt") for name in "abcd")
    rows = readme_results([replace(result, comparison=replace(result.comparison, texts=texts))]).splitlines()
    assert rows[0] == "| SmolLM2-135M-Instruct | MB | mean KL | perplexity | prompt tokens/s | decoding tokens/s |"
    assert rows[2:4] == [
        "| base model | 500.0 | 0 | 20.000 | 300 | 30.0 |",
        "| genai-quant | 90.0 | 0.1000 | 20.100 | 600 | 60.0 |",
    ]


def test_a_single_text_has_no_mean() -> None:
    result = comparison()
    texts = result.comparison.texts[1:]
    page = accuracy([replace(result, comparison=replace(result.comparison, texts=texts))])
    assert "| model | MB | KL, news | perplexity | same top-1 |" in page
    assert "| base model | 500.0 | 0 | 20.000 | - | 300 | 30.0 | - |  |" in page
    assert "| `awq_gptq` | 90.0 | 0.2000 | 9.000 | 87.50% | 600 | 60.0 | - |  |" in page


def test_every_model_of_a_comparison_has_a_row_and_no_command() -> None:
    page = accuracy([comparison()])
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 1 + 9
    assert "| base model | 500.0 | 0 | 0 | 0 | 20.000 | - | 300 | 30.0 | - |  |" in rows
    assert (
        "| `builder-k_quant_mixed` | 90.0 | 0.4000 | 0.8000 | 0.6000 | 13.550 | 87.50% | 600 | 60.0 | - "
        "| from smollm2 |"
    ) in rows
    assert r"| `modelopt-rtn_dq-b32` | - | - | - | - | - | - | - | - | - | no \| wheel |" in rows
    assert "### SmolLM2-135M-Instruct" in page
    assert "secret" not in page


def test_a_benchmark_has_a_heading_for_each_model() -> None:
    machine = Machine(processor="CPU X", cores=2, threads=2, gpu=None, versions={})
    figure = CommandFigure(name="calibrate", command="c", seconds=30.0, peak_bytes=10**8)
    page = cost(
        [
            BenchmarkResult(
                title=title, provenance=HERE, benchmark=Benchmark(machine=machine, base="b", commands=(figure,))
            )
            for title in ("A", "B")
        ]
    )
    assert [line for line in page.splitlines() if line.startswith("###")] == ["### A", "### B"]
    assert "Whole commands on CPU X, 2 cores, 2 threads:" in page
    assert next([cell.strip() for cell in row.split("|")] for row in page.splitlines() if "calibrate" in row) == [
        "", "calibrate", "30.0", "100", "",
    ]  # fmt: skip


def test_families_have_a_head() -> None:
    assert families([FamiliesResult(provenance=HERE, families=())]).startswith("Measured on 2026-01-02")
