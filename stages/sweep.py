"""Quantize one model in many ways from one cache and compare the results: ``python -m stages.sweep``.

Each point is made by stages.quantize in a process of its own, whose seconds and peak memory are measured; then all are
compared with the base on the same text, each at the accuracy level that it ships with.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.commands.evaluate_options import Keep, SweepConfig
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.errors import UserError
from stages.records.quantities import counted, duration

if TYPE_CHECKING:
    from stages.evaluation.bench.grid import Point
    from stages.evaluation.bench.runs import EvaluationText, Record, Run, RunFolder
    from stages.quantization.preview.table import Preview

_LOGGER = logging.getLogger(__name__)
_START_SECONDS = 10.0
"""What a process of stages.quantize takes besides its search."""


def command(config: SweepConfig) -> Iterator[Section]:
    """Make and evaluate every missing point, and compare all.

    Raises:
        UserError: at once where options or texts can't be used or another run writes there; after everything else where
            points failed.
    """
    from stages.system.atomic import require_creatable
    from stages.system.lock import exclusive

    require_creatable(config.output, option="--output")
    with exclusive(config.output, option="--output"):
        yield from _sweep(config)


def _sweep(config: SweepConfig) -> Iterator[Section]:
    from stages.calibration.cache import find_cache
    from stages.commands.progress import progress_bar
    from stages.evaluation.bench.grid import points_of
    from stages.evaluation.bench.results import publish, raise_failures, text_results
    from stages.evaluation.bench.runs import measure
    from stages.evaluation.bench.setup import open_run_folder, read_evaluation_texts, refuse_calibrated
    from stages.model.directory import locate_model
    from stages.report.document import log_report, write_report
    from stages.report.from_runs import origin_of, sweep_report
    from stages.report.render import render

    points = points_of(config)
    runs = [point.run(config.base, config.output, config.cache_path) for point in points]
    wanted = [point.config(config.base, config.output, config.cache_path) for point in points]
    run_folder = open_run_folder(config)
    texts = () if config.no_evaluation else read_evaluation_texts(config)
    if any(each.needs_cache for each in wanted) and find_cache(config.cache_path) is None:
        yield _calibrate(config)
        run_folder = open_run_folder(config)  # its records are of one calibration
        for text in texts:
            refuse_calibrated(text.text, text.base.windows, config.cache_path)
    _announce(config, [point for point, run in zip(points, runs, strict=True) if not run_folder.find(run, texts)])
    tidy = _tidying(config.keep, run_folder, runs, texts)
    with progress_bar() as progress:
        records = measure(run_folder, runs, texts, progress, tidy)
    results = text_results(run_folder, runs, records, texts, {})
    yield from publish(run_folder, results)
    origin = origin_of("genai-quant sweep", config, locate_model(config.base).folder)
    write_report(sweep_report(run_folder.folder.name, results, origin), render, run_folder.folder)
    log_report(run_folder.folder)
    raise_failures(records)


def _calibrate(config: SweepConfig) -> Section:
    """Make the cache that all points share."""
    from stages.calibration.run import calibrate
    from stages.calibration.summary import calibration_section
    from stages.commands.calibrate_options import CalibrateConfig

    text = CalibrateConfig(onnx_path=config.base, cache_dir=config.cache_path, model_name=config.model_name)
    return calibration_section(calibrate(text))


def _announce(config: SweepConfig, missing: Sequence[Point]) -> None:
    """Say how many models are made, and about how long and how large: of one point of each algorithm, for all of it."""
    from stages.commands.progress import status

    if not missing:
        return
    counts, seconds, sizes = Counter(point.algo for point in missing), 0.0, list[int]()
    with status("estimating time and space"):
        for algorithm, count in counts.items():
            known = (_forecast(config, point) for point in missing if point.algo == algorithm)
            found = next(filter(None, known), None)
            if found is not None:
                seconds += count * (found.search.seconds + _START_SECONDS)
                codes = sum(site.in_features * site.out_features for site in found.sites if site.bits is not None)
                sizes += [found.bytes_after + codes] * count
    room = sum(sizes) if config.keep == "all" else max(sizes, default=0)
    kept = {"all": "", "best": " for each model that is kept", "none": " at a time (--keep none)"}[config.keep]
    _LOGGER.info(
        "%s to make, one after the other: about %s of search, and %.1f GB in %s%s%s.",
        counted(len(missing), "model"), duration(seconds), room / 1e9, config.output, kept,
        "" if config.no_evaluation else "; each is also run on the text",
    )  # fmt: skip


def _forecast(config: SweepConfig, point: Point) -> Preview | None:
    """Return what making ``point`` takes; None where it can't be made, which its row will say."""
    from stages.quantize import preview

    try:
        return preview(point.config(config.base, config.output, config.cache_path))
    except UserError:
        return None


def _tidying(
    keep: Keep, run_folder: RunFolder, runs: Sequence[Run], texts: Sequence[EvaluationText]
) -> Callable[[Mapping[str, Record]], None]:
    """Return the function that deletes models after each point, given the records so far."""
    from stages.evaluation.bench.runs import remove_model

    def tidy(records: Mapping[str, Record]) -> None:
        wanted = set() if keep == "none" else _best(run_folder, runs, records, texts)
        for run in runs:
            if run.name in records and run.name not in wanted:
                remove_model(run)

    return (lambda _: None) if keep == "all" else tidy


def _best(
    run_folder: RunFolder, runs: Sequence[Run], records: Mapping[str, Record], texts: Sequence[EvaluationText]
) -> set[str]:
    """Return the names of the points that no other one beats in bytes and loss, on one text at least."""
    from stages.evaluation.bench.results import text_results

    results = text_results(run_folder, runs, records, texts, {})
    return {model.name for each in results for model in each.models if model.unbeaten}


if __name__ == "__main__":
    run_command(SweepConfig, command, "python -m stages.sweep")
