"""Quantize one model in many ways on one cache: ``python -m stages.sweep --base DIR --output DIR --algo ...``.

Each point is made by stages.quantize in a process of its own, whose seconds and peak memory the operating system
reports; then all are compared with the base on the same text at accuracy level 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.cli import run_command
from stages.config import Keep, SweepConfig
from stages.screen import Section

if TYPE_CHECKING:
    from stages.evaluation.bench import Record, Run, Yardstick


def command(config: SweepConfig) -> Iterator[Section]:
    """Make and judge every point that isn't there, and print the table.

    Raises:
        UserError: at once where options or texts can't be used; after everything else where points failed.
    """
    from stages.evaluation.bench import measure
    from stages.evaluation.points import points_of
    from stages.evaluation.workplace import open_bench, publish, raise_failures, read_yardsticks
    from stages.page.document import write_report
    from stages.page.from_sweep import sweep_document
    from stages.page.render import render
    from stages.progress import progress_bar

    runs = [point.run(config.base, config.output, config.cache_path) for point in points_of(config)]
    bench = open_bench(config)
    yardsticks = () if config.no_evaluation else read_yardsticks(config)
    tidy = _tidying(config.keep, runs, yardsticks)
    with progress_bar() as progress:
        records = measure(bench, runs, yardsticks, progress, tidy)
    yield publish(bench, runs, records, yardsticks, {})
    write_report(sweep_document(bench, runs, records, yardsticks, {}), render, bench.folder)
    raise_failures(records)


def _tidying(
    keep: Keep, runs: Sequence[Run], yardsticks: Sequence[Yardstick]
) -> Callable[[Mapping[str, Record]], None]:
    """Return what deletes models after each point, given the records so far."""
    from stages.evaluation.bench import remove_model

    def tidy(records: Mapping[str, Record]) -> None:
        wanted = set() if keep == "none" else _best(runs, records, yardsticks)
        for run in runs:
            if run.name in records and run.name not in wanted:
                remove_model(run)

    return (lambda _: None) if keep == "all" else tidy


def _best(runs: Sequence[Run], records: Mapping[str, Record], yardsticks: Sequence[Yardstick]) -> set[str]:
    """Return the names of the points that no other one beats in bytes and loss, on one text at least."""
    from stages.evaluation.results import on_front
    from stages.evaluation.workplace import results_of

    best: set[str] = set()
    for yardstick in yardsticks or (None,):
        results = results_of(runs, records, yardstick, {})
        best |= {result.name for result, is_best in zip(results, on_front(results), strict=True) if is_best}
    return best


if __name__ == "__main__":
    run_command(SweepConfig, command, "python -m stages.sweep")
