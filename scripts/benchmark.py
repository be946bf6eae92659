"""Benchmark both stages: ``python -m scripts.benchmark --base models/base --output models/benchmark``.

Times and memory of whole commands, of calibration and plain inference, of the search, of the export and a plain copy,
and of the competitor. All of it on one machine in one run, so that ratios mean something; absolute times are that
machine's. Nothing else should run on it meanwhile.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from rich.console import Group

from scripts.benchmarks.capture import measure_capture
from scripts.benchmarks.figures import Benchmark, CommandFigure, this_machine
from scripts.benchmarks.kernels import measure_kernels
from scripts.benchmarks.search import measure_search
from scripts.benchmarks.tables import benchmark_tables
from scripts.benchmarks.writing import copy_file, measure_writing
from scripts.options import BenchmarkConfig, PeerConfig
from scripts.peers.runs import peers_of
from stages.calibration.cache import open_cache
from stages.commands.options import default_folder
from stages.commands.output import Section
from stages.commands.progress import status
from stages.commands.quantize_options import Algorithm, QuantizeConfig
from stages.commands.run import run_command
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model
from stages.runtime.providers import choose_providers
from stages.system.atomic import atomic_file
from stages.system.hardware import choose_device
from stages.system.measured_process import Cost, run_measured
from stages.system.paths import shell_line

_LOGGER = logging.getLogger(__name__)
_FIGURES = TypeAdapter(Benchmark)
_CALIBRATE, _QUANTIZE, _PEER = "calibrate", "quantize", "competitor"


def benchmark(config: BenchmarkConfig) -> Iterator[Section]:
    """Measure, and write benchmark.json after every step: a stopped run leaves what it has.

    Raises:
        UserError: the base can't be used, or the calibration failed.
    """
    folder = config.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    begun = Benchmark(machine=this_machine(), base=str(config.base), commands=())
    for known in _steps(config, folder, begun):
        with atomic_file(folder / "benchmark.json") as file:
            file.write_bytes(_FIGURES.dump_json(known, indent=1))
    yield Section(name="benchmark", table=Group(*benchmark_tables(known)), record=known)
    _LOGGER.info("figures: %s", folder / "benchmark.json")


def _steps(config: BenchmarkConfig, folder: Path, found: Benchmark) -> Iterator[Benchmark]:
    """Yield what is known after each measurement."""
    cache = folder / "calibration"
    for figure in _our_commands(config, folder, cache):
        found = replace(found, commands=(*found.commands, figure))
        yield found
    directory, device = locate_model(config.base), choose_device(config.device)
    with status("plain inference and calibration's passes"):
        tokens, held_out = open_cache(cache, fingerprint_model(directory)).read_tokens()
        choice = choose_providers(config.calibration_eps)
        capture = measure_capture(directory, tokens[:1], choice, device, config.rounds)
        calibrated = int(tokens.size + held_out.size)
        yield (found := replace(found, calibration_tokens=calibrated, capture=capture))
    with status("search"), torch.no_grad():
        figures = [figure for algorithm in config.algo for figure in measure_search(_search(config, cache, algorithm))]
        yield (found := replace(found, search=tuple(figures)))
    with status("parts of GPTQ"):
        shapes = [(figure.in_features, figure.out_features) for figure in found.search]
        kernels = measure_kernels(shapes, config.block_size, device, config.rounds)
        yield (found := replace(found, kernels=tuple(kernels)))
    with status("export and a copy"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights = default_folder(folder / config.algo[0], ".weights")
        yield (found := replace(found, writing=measure_writing(config.base, weights, Path(scratch))))
    if not config.no_competitor:
        with status("the competitor, which takes long"):
            # It takes no held-out windows.
            windows = min(config.modelopt_windows, len(tokens))
            figure = _competitor(replace(config, modelopt_windows=windows), folder, cache)
            yield replace(found, commands=(*found.commands, figure))


def _our_commands(config: BenchmarkConfig, folder: Path, cache: Path) -> Iterator[CommandFigure]:
    """Run both stages as a user types them."""
    shared = ("--onnx_path", str(config.base), "--cache_dir", str(cache), "--device", config.device, "--overwrite")
    text = ("--dataset", config.dataset, "--calib_size", str(config.calib_size))
    passes = ("--token_weights", config.token_weights, "--calibration_eps", config.calibration_eps)
    command = ("stages.calibrate", *shared, *text, *passes)
    with status(_CALIBRATE):
        # A calibration that is there would be found and not made.
        for file in cache.iterdir() if cache.is_dir() else ():
            file.unlink()
        figure = _run(_CALIBRATE, command, folder)
        yield figure
    if figure.failure is not None:
        raise UserError(
            f"stages.calibrate failed: {figure.failure}; {folder / f'{_CALIBRATE}.log'} has what it printed."
        )
    for algorithm in config.algo:
        # One format for all, as the competitor's is.
        options = (
            "--algo",
            algorithm,
            "--block_size",
            str(config.block_size),
            "--no_use_zero_point",
            "--output_path",
            str(folder / algorithm),
        )
        with status(f"{_QUANTIZE} {algorithm}"):
            figure = _run(f"{_QUANTIZE} {algorithm}", ("stages.quantize", *shared, *options), folder)
            yield figure if figure.failure else replace(figure, copy_seconds=_copying(config.base, folder / algorithm))


def _copying(base: Path, output: Path) -> float:
    """Return the seconds of copying the files of both models."""
    folder = base if base.is_dir() else base.parent
    files = [file for place in (folder, output) for file in sorted(place.iterdir()) if file.is_file()]
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        started = time.perf_counter()
        for index, file in enumerate(files):
            copy_file(file, Path(scratch) / str(index))
        return time.perf_counter() - started


def _run(name: str, module: Sequence[str], folder: Path) -> CommandFigure:
    command = (sys.executable, "-m", *module)
    shown = shell_line(("python", *command[1:]))
    return _figure(name, shown, partial(run_measured, command, folder / f"{name.replace(' ', '-')}.log"))


def _figure(name: str, shown: str, run: Callable[[], Cost]) -> CommandFigure:
    """Return what ``run`` cost, or why it failed."""
    try:
        cost = run()
    except UserError as error:
        return CommandFigure(name=name, command=shown, seconds=None, peak_bytes=None, failure=str(error))
    return CommandFigure(name=name, command=shown, seconds=cost.seconds, peak_bytes=cost.peak_bytes)


def _competitor(config: BenchmarkConfig, folder: Path, cache: Path) -> CommandFigure:
    """Run NVIDIA ModelOpt's awq_lite on the first windows of the same calibration."""
    request = PeerConfig(
        base=config.base,
        output=folder,
        cache_dir=cache,
        block_size=(config.block_size,),
        use_zero_point=(False,),
        ort=(),
        modelopt=("awq_lite",),
        modelopt_windows=config.modelopt_windows,
        modelopt_environment=config.modelopt_environment,
    )
    (peer,) = peers_of(request)

    def run() -> Cost:
        peer.run.before()
        return run_measured(peer.run.command, folder / f"{_PEER}.log")

    return _figure(f"{_PEER} ({peer.note})", peer.run.shown_command, run)


def _search(config: BenchmarkConfig, cache: Path, algorithm: Algorithm) -> QuantizeConfig:
    return QuantizeConfig(
        onnx_path=config.base,
        output_path=config.output / "unused",
        cache_dir=cache,
        algo=algorithm,
        block_size=config.block_size,
        device=config.device,
    )


if __name__ == "__main__":
    run_command(BenchmarkConfig, benchmark, "python -m scripts.benchmark")
