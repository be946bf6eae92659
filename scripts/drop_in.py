"""Stage one where it is needed, stage two and the export, one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from rich.console import Console

from scripts.calibration_folder import calibration_folder
from scripts.graph_decides import answers
from scripts.layer_patterns import past_the_end
from scripts.options import DropInConfig
from stages.base_graph import load_graph
from stages.calibrate import calibrate
from stages.errors import CacheMismatch
from stages.fingerprint import fingerprint_model
from stages.graph.sites import find_groups
from stages.model_directory import locate_model
from stages.observe.cache import CalibrationCache, open_cache
from stages.quantize import check_before_calibration, quantize


def quantize_in_one_go(config: DropInConfig, console: Console) -> None:
    """Quantize and export the model that ``config`` describes, with statistics of an earlier call where they fit."""
    config.validate()
    model = load_graph(locate_model(config.onnx_path))
    config = _without_missing_layers(config, model, console)
    check_before_calibration(config)
    for line in answers(config, model):
        _say(line, console)
    if config.needs_cache:
        config = replace(config, cache_dir=_calibrated(config, console))
    else:
        _say(f"{config.algo} rounds without calibration data: stage one is left out.", console)
    # The output was checked above: what this replaces unasked are at most weights whose output is gone.
    quantize(replace(config, overwrite=config.overwrite or config.weights_path is None), console)
    _say_next(config, console)


def _say(line: str, console: Console) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _without_missing_layers(config: DropInConfig, model: ir.Model, console: Console) -> DropInConfig:
    names = [site.name for group in find_groups(model) for site in group.sites]
    patterns, beyond, last = past_the_end(config.layers_8bit, names)
    if beyond:
        _say(f"--layers_8bit: {', '.join(beyond)} left out, the model ends at layers.{last}.", console)
    return replace(config, layers_8bit=patterns)


def _calibrated(config: DropInConfig, console: Console) -> Path:
    """The folder of a cache that fits ``config``; stage one fills it where no earlier call has."""
    if config.cache_dir is not None:
        calibrate(config, console)
        return config.cache_dir
    folder = calibration_folder(config)
    cache = _earlier_cache(folder, config)
    if cache is None:
        calibrate(replace(config, cache_dir=folder, overwrite=True), console)
    else:
        _say(f"stage one is skipped: {_description(cache)} is there from an earlier call.", console)
    return folder


def _earlier_cache(folder: Path, config: DropInConfig) -> CalibrationCache | None:
    try:
        return open_cache(folder, fingerprint_model(locate_model(config.onnx_path)))
    except CacheMismatch:  # there is none, or another version wrote it
        return None


def _description(cache: CalibrationCache) -> str:
    key = cache.manifest.key
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    windows = f"{key.calibration_windows} + {key.held_out_windows} windows of {key.seq_len} tokens"
    return f"{cache.folder} ({size / 1e6:.1f} MB: {key.source}, {windows})"


def _say_next(config: DropInConfig, console: Console) -> None:
    base, output = locate_model(config.onnx_path), locate_model(config.output_path)
    _say(f"next: python -m scripts.evaluate --base {base.onnx_file} --model {output.onnx_file}", console)
    if output.has_genai_config:
        _say(f"      python -m scripts.generate --model {output.folder}", console)
