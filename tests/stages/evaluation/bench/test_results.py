"""The Pareto front, and what a table says of models that were measured, not judged, or failed."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from stages.evaluation.accuracy import Accuracy
from stages.evaluation.bench.results import Result, on_front, pareto_front, results_table
from stages.evaluation.bench.runs import Record, Search
from stages.system.measured_process import Cost


def accuracy(divergence: float) -> Accuracy:
    return Accuracy(tokens=100, perplexity=20.5, mean_divergence=divergence, top1_agreement=0.75)


def result(name: str, size: int | None, divergence: float | None, *, loss: float | None = None, **more: str) -> Result:
    search = Search(seconds=3.0, bits_per_weight=4.25, held_out_loss=loss) if loss is not None else None
    record = Record(
        command=("x",),
        inputs="i",
        bytes=size,
        search=search,
        cost=Cost(seconds=12.5, peak_bytes=7_000_000) if size is not None else None,
        failure=more.get("failure"),
    )
    judged = None if divergence is None else accuracy(divergence)
    return Result(name=name, record=record, accuracy=judged, note=more.get("note", ""))


def shown(results: list[Result]) -> list[str]:
    page = io.StringIO()
    Console(file=page, width=300).print(results_table("title", results))
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
    results = [result("small", 10, 0.5), result("beaten", 20, 0.6), result("large", 30, 0.1)]
    assert on_front(results) == [True, False, True]
    lines = shown(results)
    assert line_of("small", lines) == ["*", "small", "-", "12.5", "7", "-", "0.0", "-", "20.500", "0.50000", "75.00%"]
    assert line_of("beaten", lines)[0] == "beaten"


def test_without_text_the_held_out_loss_is_weighed() -> None:
    results = [result("good", 10, None, loss=0.01), result("bad", 10, None, loss=0.02), result("rounded", 9, None)]
    assert on_front(results) == [True, False, False]
    lines = shown(results)
    assert not any("KL" in line or "perplexity" in line for line in lines)
    assert line_of("good", lines) == ["*", "good", "3.0", "12.5", "7", "4.250", "0.0", "0.01000"]


@pytest.mark.parametrize("judged", [0.001, None])
def test_a_failure_is_a_row_with_its_sentence_and_not_on_the_front(judged: float | None) -> None:
    results = [result("fine", 10, 0.5, note="8 windows"), result("broken", 9, judged, failure="it can't be done")]
    lines = shown(results)
    assert on_front(results) == [True, False]
    assert " ".join(line_of("broken", lines)).endswith("it can't be done")
    assert " ".join(line_of("fine", lines)).endswith("8 windows")
