"""Many points on one cache: ``python -m stages.sweep --base DIR --output DIR --algo ... --block_size ...``.

Each point is made by stages.quantize in a process of its own, whose seconds and peak memory the operating system
reports; then all are compared with the base on the same text at accuracy level 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from stages.cli import run_command
from stages.config import Keep, SweepConfig
from stages.evaluation.bench import Record, Run, Yardstick, measure, remove_model
from stages.evaluation.points import points_of
from stages.evaluation.results import on_front
from stages.evaluation.workplace import open_bench, publish, raise_failures, read_yardsticks, results_of
from stages.page.document import write_report
from stages.page.from_sweep import sweep_document
from stages.page.render import render
from stages.progress import progress_bar
from stages.screen import Screen


def sweep(config: SweepConfig, screen: Screen) -> None:
    """Make and judge every point that isn't there, and show the table.

    Raises:
        UserError: at once where options or texts can't be used; after everything else where points failed.
    """
    runs = [point.run(config.base, config.output, config.cache_path) for point in points_of(config)]
    bench = open_bench(config)
    yardsticks = () if config.no_evaluation else read_yardsticks(config)
    tidy = _tidying(config.keep, runs, yardsticks)
    with progress_bar(screen.console) as progress:
        records = measure(bench, runs, yardsticks, progress, tidy)
    publish(bench, runs, records, yardsticks, {}, screen)
    write_report(sweep_document(bench, runs, records, yardsticks, {}), render, bench.folder)
    raise_failures(records)


def _tidying(
    keep: Keep, runs: Sequence[Run], yardsticks: Sequence[Yardstick]
) -> Callable[[Mapping[str, Record]], None]:
    """What is deleted after each point, given the records so far."""

    def tidy(records: Mapping[str, Record]) -> None:
        wanted = set() if keep == "none" else _best(runs, records, yardsticks)
        for run in runs:
            if run.name in records and run.name not in wanted:
                remove_model(run)

    return (lambda _: None) if keep == "all" else tidy


def _best(runs: Sequence[Run], records: Mapping[str, Record], yardsticks: Sequence[Yardstick]) -> set[str]:
    """Names of the points that no other one beats in bytes and loss, on one text at least."""
    best: set[str] = set()
    for yardstick in yardsticks or (None,):
        results = results_of(runs, records, yardstick, {})
        best |= {result.name for result, is_best in zip(results, on_front(results), strict=True) if is_best}
    return best


if __name__ == "__main__":
    run_command(SweepConfig, sweep, "python -m stages.sweep")
