"""Stage one where it is needed, stage two and the export, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from scripts.calibration_folder import calibration_folder
from scripts.graph_decides import answers
from scripts.layer_patterns import past_the_end
from scripts.options import DropInConfig
from stages import quantize
from stages.base_graph import parse_graph
from stages.calibrate_run import calibrate
from stages.calibration_table import calibration_table
from stages.errors import CacheMismatch
from stages.fingerprint import fingerprint_model
from stages.graph.sites import find_groups
from stages.model_directory import locate_model
from stages.observe.cache import CalibrationCache, open_cache
from stages.preview_table import preview_table
from stages.screen import Section

_LOGGER = logging.getLogger(__name__)


def calibrate_and_quantize(config: DropInConfig) -> Iterator[Section]:
    """Quantize and export the model that ``config`` describes, with statistics of an earlier call where they fit."""
    config.validate()
    model = parse_graph(locate_model(config.onnx_path))
    config = _without_missing_layers(config, model)
    if config.dry_run:
        found = quantize.preview(_with_found_cache(config), config)
        yield Section(name="plan", table=preview_table(found), record=found)
        return
    quantize.check_before_calibration(config)
    for line in answers(config, model):
        _LOGGER.info("%s", line)
    if config.needs_cache:
        config = replace(config, cache_dir=(yield from _calibrated(config)))
    else:
        _LOGGER.info("%s rounds without calibration data: stage one is left out.", config.algo)
    # The output was checked above: what this replaces unasked are at most weights whose output is gone.
    yield from quantize.command(replace(config, overwrite=config.overwrite or config.weights_path is None))
    _say_next(config)


def _without_missing_layers(config: DropInConfig, model: ir.Model) -> DropInConfig:
    names = [site.name for group in find_groups(model) for site in group.sites]
    patterns, beyond, last = past_the_end(config.layers_8bit, names)
    if beyond:
        _LOGGER.info("--layers_8bit: %s left out, the model ends at layers.%s.", ", ".join(beyond), last)
    return replace(config, layers_8bit=patterns)


def _with_found_cache(config: DropInConfig) -> DropInConfig:
    """``config`` with the folder that a run would look for statistics in; its name needs the weights."""
    if config.cache_dir is not None:
        return config
    try:
        return replace(config, cache_dir=calibration_folder(config))
    except OSError:  # the preview says what is missing
        return config


def _calibrated(config: DropInConfig) -> Generator[Section, None, Path]:
    """Return the folder of a cache that fits ``config``; stage one fills it where no earlier call has."""
    if config.cache_dir is not None:
        yield _calibration(config)
        return config.cache_dir
    folder = calibration_folder(config)
    cache = _earlier_cache(folder, config)
    if cache is None:
        yield _calibration(replace(config, cache_dir=folder, overwrite=True))
    else:
        _LOGGER.info("stage one is skipped: %s is there from an earlier call.", _description(cache))
    return folder


def _calibration(config: DropInConfig) -> Section:
    summary = calibrate(config)
    return Section(name="calibration", table=calibration_table(summary), record=summary)


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


def _say_next(config: DropInConfig) -> None:
    base, output = locate_model(config.onnx_path), locate_model(config.output_path)
    _LOGGER.info("next: python -m stages.evaluate --base %s --model %s", base.onnx_file, output.onnx_file)
    if output.has_genai_config:
        _LOGGER.info("      python -m scripts.generate --model %s", output.folder)
