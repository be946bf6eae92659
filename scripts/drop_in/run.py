"""Run ModelOpt-Windows' command line: stage one where it is needed, then stage two and the export."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from scripts.drop_in.calibration_folder import calibration_folder
from scripts.drop_in.ignored_options import answers
from scripts.options import DropInConfig
from stages import quantize
from stages.calibration.cache import CalibrationCache, open_cache
from stages.calibration.run import calibrate
from stages.calibration.summary import calibration_section
from stages.commands.output import Section
from stages.errors import CacheMismatch
from stages.model.directory import locate_model
from stages.model.load import fingerprint_model, parse_graph
from stages.model.sites import find_groups
from stages.model.unquantized import require_float_base
from stages.quantization.preview.table import preview_table
from stages.records.sites import layer_of, within_layer

_LOGGER = logging.getLogger(__name__)


def calibrate_and_quantize(config: DropInConfig) -> Iterator[Section]:
    """Quantize and export the model that ``config`` describes, with statistics of an earlier call where they fit."""
    config.validate()
    directory = locate_model(config.onnx_path)
    model = parse_graph(directory)
    require_float_base(model, directory)
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


def _without_missing_layers(config: DropInConfig, model: ir.Model) -> DropInConfig:
    names = [site.name for group in find_groups(model) for site in group.sites]
    patterns, beyond, last = past_the_end(config.layers_8bit, names)
    if beyond:
        _LOGGER.info("--layers_8bit: %s left out, the model ends at layers.%s.", ", ".join(beyond), last)
    return replace(config, layers_8bit=patterns)


def past_the_end(patterns: str, site_names: Iterable[str]) -> tuple[str, tuple[str, ...], int]:
    """Return ``--layers_8bit`` without its layer numbers past the last layer, those numbers, and the last layer.

    Nothing is left out where no layer would remain, or no site has a number: then the plan refuses the pattern.
    """
    last = max((layer for name in site_names if (layer := layer_of(name)) is not None), default=None)
    parts = [part for part in (part.strip() for part in patterns.split(",")) if part]
    beyond = tuple(part for part in parts if last is not None and _is_past(part, last))
    if last is None or not beyond or len(beyond) == len(parts):
        return patterns, (), last or 0
    return ",".join(part for part in parts if part not in beyond), beyond, last


def _is_past(pattern: str, last: int) -> bool:
    layer = layer_of(pattern)
    return layer is not None and layer > last and not within_layer(pattern)


def _with_found_cache(config: DropInConfig) -> DropInConfig:
    """Return ``config`` with the folder that a run would look for statistics in; its name needs the weights."""
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
    return calibration_section(calibrate(config))


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
