"""Compare our algorithms with other quantizers: ``python -m scripts.compare_with_peer --base DIR --output DIR``.

Each quantizes the same base model in a process of its own, whose seconds and peak memory the operating system reports;
then all run through the same evaluation, each at the accuracy level that it ships. A competitor that can't be
installed, or fails, gets a row that says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from scripts.options import PeerConfig
from scripts.peers.comparison import Comparison, save_comparison
from scripts.peers.runs import peers_of
from scripts.peers.speed import measure_speeds, speed_table
from stages.commands.output import Section
from stages.commands.progress import progress_bar
from stages.commands.run import run_command
from stages.evaluation.bench.grid import points_of
from stages.evaluation.bench.results import publish, raise_failures, text_results
from stages.evaluation.bench.runs import measure
from stages.evaluation.bench.setup import open_run_folder, read_evaluation_texts
from stages.model.directory import locate_model
from stages.report.document import log_report, write_report
from stages.report.from_runs import origin_of, sweep_report
from stages.report.render import render
from stages.runtime.genai import require_genai
from stages.system.atomic import require_creatable
from stages.system.lock import exclusive


def compare_with_peer(config: PeerConfig) -> Iterator[Section]:
    """Quantize and evaluate everything that isn't there yet, and show the tables.

    Raises:
        UserError: at once where options or texts can't be used or another run writes there; after everything else where
            our own runs failed.
    """
    require_creatable(config.output, option="--output")
    with exclusive(config.output, option="--output"):
        yield from _compare(config)


def _compare(config: PeerConfig) -> Iterator[Section]:
    ours = [point.run(config.base, config.output, config.cache_path) for point in points_of(config)]
    peers = peers_of(config)
    runs = [*ours, *(peer.run for peer in peers)]
    run_folder, evaluation_texts = open_run_folder(config), read_evaluation_texts(config)
    if config.speed:
        require_genai([locate_model(config.base).folder], "--speed")
    with progress_bar() as progress:
        records = measure(run_folder, runs, evaluation_texts, progress, lambda _: None)
    notes = {peer.run.name: peer.note for peer in peers}
    results = text_results(run_folder, runs, records, evaluation_texts, notes)
    yield from publish(run_folder, results)
    origin = origin_of("python -m scripts.compare_with_peer", config, locate_model(config.base).folder)
    write_report(sweep_report(run_folder.folder.name, results, origin), render, run_folder.folder)
    log_report(run_folder.folder)
    speed = None
    if config.speed:
        # Other runtimes have no accuracy level, and aren't measured by onnxruntime-genai.
        ran = [run for run in runs if run.runtime is None and records[run.name].failure is None]
        models = [run.model for run in ran if run.model.is_dir()]
        with progress_bar() as progress:
            speed = measure_speeds(config, models, evaluation_texts[0], progress)
        yield Section(name="speed", table=speed_table(speed), record=speed)
    save_comparison(Comparison(texts=tuple(results), speed=speed), run_folder.folder)
    raise_failures({run.name: records[run.name] for run in ours})


if __name__ == "__main__":
    run_command(PeerConfig, compare_with_peer, "python -m scripts.compare_with_peer")
