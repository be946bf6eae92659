"""Stage one where it is needed, stage two and the export, one after the other."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from scripts.calibration_folder import calibration_folder
from scripts.graph_decides import answers
from scripts.layer_patterns import past_the_end
from scripts.options import DropInConfig
from stages.base_graph import parse_graph
from stages.calibrate import calibrate
from stages.errors import CacheMismatch
from stages.fingerprint import fingerprint_model
from stages.graph.sites import find_groups
from stages.model_directory import locate_model
from stages.observe.cache import CalibrationCache, open_cache
from stages.quantize import check_before_calibration, quantize, show_preview
from stages.screen import Screen

_LOGGER = logging.getLogger(__name__)


def quantize_in_one_go(config: DropInConfig, screen: Screen) -> None:
    """Quantize and export the model that ``config`` describes, with statistics of an earlier call where they fit."""
    config.validate()
    model = parse_graph(locate_model(config.onnx_path))
    config = _without_missing_layers(config, model)
    if config.dry_run:
        show_preview(_with_found_cache(config), config, screen)
        return
    check_before_calibration(config)
    for line in answers(config, model):
        _LOGGER.info("%s", line)
    if config.needs_cache:
        config = replace(config, cache_dir=_calibrated(config, screen))
    else:
        _LOGGER.info("%s rounds without calibration data: stage one is left out.", config.algo)
    # The output was checked above: what this replaces unasked are at most weights whose output is gone.
    quantize(replace(config, overwrite=config.overwrite or config.weights_path is None), screen)
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


def _calibrated(config: DropInConfig, screen: Screen) -> Path:
    """The folder of a cache that fits ``config``; stage one fills it where no earlier call has."""
    if config.cache_dir is not None:
        calibrate(config, screen)
        return config.cache_dir
    folder = calibration_folder(config)
    cache = _earlier_cache(folder, config)
    if cache is None:
        calibrate(replace(config, cache_dir=folder, overwrite=True), screen)
    else:
        _LOGGER.info("stage one is skipped: %s is there from an earlier call.", _description(cache))
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


def _say_next(config: DropInConfig) -> None:
    base, output = locate_model(config.onnx_path), locate_model(config.output_path)
    _LOGGER.info("next: python -m stages.evaluate --base %s --model %s", base.onnx_file, output.onnx_file)
    if output.has_genai_config:
        _LOGGER.info("      python -m scripts.generate --model %s", output.folder)
