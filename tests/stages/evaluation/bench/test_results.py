"""The Pareto front, and the tables of models that were measured, weren't scored, or failed."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from stages.errors import UserError
from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.results import (
    TextResults,
    mean_results,
    means_table,
    measured_models,
    pareto_front,
    publish,
    raise_failures,
    results_table,
)
from stages.evaluation.bench.runs import Record, RunFolder, Search
from stages.system.measured_process import Cost


def accuracy(divergence: float) -> Accuracy:
    return Accuracy(tokens=100, perplexity=20.5, mean_divergence=divergence, top1_agreement=0.75)


def record(
    size: int | None, divergence: float | None, *, loss: float | None = None, failure: str | None = None
) -> Record:
    search = Search(seconds=3.0, bits_per_weight=4.25, held_out_loss=loss) if loss is not None else None
    return Record(
        command=("x",),
        inputs="i",
        bytes=size,
        search=search,
        cost=Cost(seconds=12.5, peak_bytes=7_000_000) if size is not None else None,
        failure=failure,
        accuracy={} if divergence is None else {"key": accuracy(divergence)},
    )


def results_of(notes: dict[str, str] | None = None, **records: Record) -> TextResults:
    commands = {name: f"make {name}" for name in records}
    return TextResults(text="title", base=None, models=measured_models(commands, records, "key", notes or {}))


def front(results: TextResults) -> list[str]:
    return [model.name for model in results.models if model.unbeaten]


def shown(results: TextResults) -> list[str]:
    page = io.StringIO()
    Console(file=page, width=300).print(results_table(results))
    return page.getvalue().splitlines()


def line_of(name: str, lines: list[str]) -> list[str]:
    return next(line.split() for line in lines if name in line)


def test_the_front_is_sorted_points_that_lower_the_loss() -> None:
    generator = random.Random(0)
    for _ in range(50):
        points = [(generator.randrange(8), generator.randrange(8) / 4) for _ in range(12)]
        # Another way: walk by size, then loss; a point is on the front where it is below all smaller ones.
        expected: set[tuple[int, float]] = set()
        lowest = float("inf")
        for size, loss in sorted(set(points)):
            if loss < lowest:
                expected.add((size, loss))
                lowest = loss
        assert pareto_front(points) == [point in expected for point in points]


def test_a_few_bytes_do_not_save_a_worse_model() -> None:
    assert pareto_front([(100_000, 0.5), (100_090, 0.4)]) == [False, True]
    assert pareto_front([(100_000, 0.5), (100_200, 0.4)]) == [True, True]
    assert pareto_front([(100_000, 0.5), (100_001, 0.5)]) == [True, False]
    assert pareto_front([(100_000, 0.5), (100_000, 0.5)]) == [True, True]


def test_unknown_points_are_never_on_the_front_and_beat_nothing() -> None:
    assert pareto_front([None, (1, 1.0), None]) == [False, True, False]


def test_the_front_weighs_kl_against_bytes() -> None:
    results = results_of(small=record(10, 0.5), beaten=record(20, 0.6), large=record(30, 0.1))
    assert front(results) == ["small", "large"]
    assert [model.command for model in results.models] == ["make small", "make beaten", "make large"]
    lines = shown(results)
    assert line_of("small", lines) == ["small", "*", "0.0", "0.50000", "20.500", "75.00%", "12.5", "7"]
    assert line_of("beaten", lines)[0] == "beaten"


def test_without_text_the_held_out_loss_is_weighed() -> None:
    results = results_of(good=record(10, None, loss=0.01), bad=record(10, None, loss=0.02), rounded=record(9, None))
    assert front(results) == ["good"]
    assert [model.loss for model in results.models] == [0.01, 0.02, None]
    lines = shown(results)
    assert not any("KL" in line or "perplexity" in line for line in lines)
    assert line_of("good", lines) == ["good", "*", "0.0", "4.250", "0.01000", "3.0", "12.5", "7"]


@pytest.mark.parametrize("divergence", [0.001, None])
def test_a_failure_is_a_row_with_its_reason_and_not_on_the_front(divergence: float | None) -> None:
    broken = record(9, divergence, failure="it can't be done")
    results = results_of({"fine": "8 windows"}, fine=record(10, 0.5), broken=broken)
    assert front(results) == ["fine"]
    assert [model.remark for model in results.models] == ["8 windows", "it can't be done"]
    assert " ".join(line_of("broken", shown(results))).endswith("it can't be done")
    assert " ".join(line_of("fine", shown(results))).endswith("8 windows")


def test_runs_without_a_record_have_no_result() -> None:
    assert [
        model.name for model in measured_models({"made": "x", "other": "y"}, {"made": record(1, 1.0)}, "key", {})
    ] == ["made"]


def test_what_is_published_is_in_the_folder_too(tmp_path: Path) -> None:
    folder = RunFolder(folder=tmp_path, inputs="i", retry_failed=False)
    results = [results_of(small=record(10, 0.5)), results_of(small=record(10, 0.25))]
    table, commands = publish(folder, results)
    assert table.record == results
    assert commands.record == {"small": "make small"}
    assert commands.detail
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("title", "mean"))] == ["title", "title", "mean of 2 texts"]
    assert lines[-1] == "small: make small"
    rows = [line.split("|")[3].strip() for line in lines if line.startswith("| small *")]
    assert rows == ["0.50000", "0.25000", "0.50000"]


def test_means_are_those_of_all_texts_and_decide_about_the_front() -> None:
    one = results_of(small=record(10, 0.5), even=record(10, 0.3), broken=record(9, None, failure="why"))
    other = results_of(small=record(10, 0.1), even=record(10, 0.2), broken=record(9, None, failure="why"))
    assert (front(one), front(other)) == (["even"], ["small"])
    small, even, broken = mean_results([one, other]).models
    assert [model.accuracy and model.accuracy.mean_divergence for model in (small, even, broken)] == [0.3, 0.25, None]
    assert (small.unbeaten, even.unbeaten, broken.unbeaten) == (False, True, False)
    lines = means_table([one, other]).as_markdown().splitlines()
    assert lines[0] == "| model | MB | KL, title | KL, title | mean KL | perplexity | same top-1 |"
    assert lines[2] == "| small | 0.0 | 0.50000 | 0.10000 | 0.30000 | 20.500 | 75.00% |"
    assert lines[4] == "| broken | 0.0 | - | - | - | - | - |"


def test_failed_runs_are_named() -> None:
    raise_failures({"fine": record(1, 1.0)})
    with pytest.raises(UserError, match=r"1 of 2 failed \(broken\)"):
        raise_failures({"fine": record(1, 1.0), "broken": record(1, 1.0, failure="why")})
