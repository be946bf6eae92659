"""Quantize one model in many ways from one cache and compare the results: ``python -m stages.sweep``.

Each point is made by stages.quantize in a process of its own, whose seconds and peak memory are measured; then all are
compared with the base on the same text at accuracy level 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.commands.evaluate_options import Keep, SweepConfig
from stages.commands.output import Section
from stages.commands.run import run_command

if TYPE_CHECKING:
    from stages.evaluation.bench.runs import EvaluationText, Record, Run


def command(config: SweepConfig) -> Iterator[Section]:
    """Make and evaluate every missing point, and compare all.

    Raises:
        UserError: at once where options or texts can't be used; after everything else where points failed.
    """
    from stages.commands.progress import progress_bar
    from stages.evaluation.bench.grid import points_of
    from stages.evaluation.bench.runs import measure
    from stages.evaluation.bench.setup import open_run_folder, publish, raise_failures, read_evaluation_texts
    from stages.report.document import write_report
    from stages.report.from_runs import sweep_document
    from stages.report.render import render

    runs = [point.run(config.base, config.output, config.cache_path) for point in points_of(config)]
    run_folder = open_run_folder(config)
    evaluation_texts = () if config.no_evaluation else read_evaluation_texts(config)
    tidy = _tidying(config.keep, runs, evaluation_texts)
    with progress_bar() as progress:
        records = measure(run_folder, runs, evaluation_texts, progress, tidy)
    yield publish(run_folder, runs, records, evaluation_texts, {})
    write_report(sweep_document(run_folder, runs, records, evaluation_texts, {}), render, run_folder.folder)
    raise_failures(records)


def _tidying(
    keep: Keep, runs: Sequence[Run], evaluation_texts: Sequence[EvaluationText]
) -> Callable[[Mapping[str, Record]], None]:
    """Return the function that deletes models after each point, given the records so far."""
    from stages.evaluation.bench.runs import remove_model

    def tidy(records: Mapping[str, Record]) -> None:
        wanted = set() if keep == "none" else _best(runs, records, evaluation_texts)
        for run in runs:
            if run.name in records and run.name not in wanted:
                remove_model(run)

    return (lambda _: None) if keep == "all" else tidy


def _best(runs: Sequence[Run], records: Mapping[str, Record], evaluation_texts: Sequence[EvaluationText]) -> set[str]:
    """Return the names of the points that no other one beats in bytes and loss, on one text at least."""
    from stages.evaluation.bench.results import on_front
    from stages.evaluation.bench.setup import results_of

    best: set[str] = set()
    for evaluation_text in evaluation_texts or (None,):
        results = results_of(runs, records, evaluation_text, {})
        best |= {result.name for result, is_best in zip(results, on_front(results), strict=True) if is_best}
    return best


if __name__ == "__main__":
    run_command(SweepConfig, command, "python -m stages.sweep")
