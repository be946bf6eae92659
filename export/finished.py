"""Remember what made an output, so that the same command, run again, finds it finished and goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pydantic import TypeAdapter

from export.run import QuantizedModel
from stages.calibration.cache import find_cache
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.errors import UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import fingerprint_model
from stages.quantization.checkpoints.checkpoint import open_checkpoint
from stages.quantization.weights.store import RECIPE, open_store
from stages.system.json_file import read_json, write_json
from stages.system.paths import file_name

_LOGGER = logging.getLogger(__name__)
_WITHOUT_EFFECT = frozenset(
    {
        "batch_size", "cache_dir", "calibration_eps", "component", "device", "dry_run", "evaluate", "max_memory",
        "onnx_path", "output_path", "overwrite", "printing", "trust_remote_code", "weights_path",
    }
)  # fmt: skip
"""Options that don't change the output; a new option counts unless it is named here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedOutput:
    """A file among the weights of an output."""

    options: str
    """sha256 of the options and of what they are applied to."""
    calibration: str = ""
    """Digest of the cache's key; empty where none was needed."""
    output: str
    """Fingerprint of the output."""
    files: tuple[str, ...] = ()
    """What lay in the output's folder, by its path there; empty among the weights of earlier versions."""
    made: QuantizedModel | None = None
    """None where the weights of another output were written once more."""


_OUTPUTS = TypeAdapter(FinishedOutput)


def remember_output(config: QuantizeConfig, made: QuantizedModel) -> None:
    """Keep among the weights of ``made`` that exactly ``config`` made it; log a warning where that can't be."""
    options = _digest(config, open_store(made.weights).recipe.model_fingerprint)
    _remember(config, made.weights, options, calibration=_calibration(config) or "", made=made)


def find_finished(config: QuantizeConfig) -> QuantizedModel | None:
    """Return the output that an earlier run of exactly ``config`` made, if it is there unchanged.

    A calibration that is gone doesn't matter; another one does.
    """
    try:
        if config.overwrite or read_json(_file(config.weights_folder, config.output_path), _OUTPUTS) is None:
            return None  # before the base is parsed
        options = _digest(config, fingerprint_model(locate_model(config.onnx_path, config.component)))
        finished = _find(config, config.weights_folder, options)
        if finished is None or finished.made is None:
            return None
        if finished.calibration != (_calibration(config) or finished.calibration):
            return None
        directory = _output(config)
    except UserError:  # said when it is made
        return None
    onnx_file, made = directory.onnx_file, finished.made
    export = replace(made.export, onnx_file=onnx_file)
    return replace(made, folder=directory.folder, onnx_file=onnx_file, weights=config.weights_folder, export=export)


def was_made_otherwise(config: QuantizeConfig) -> bool:
    """Return whether an earlier run made the output, with other options than ``config`` or from another base.

    Raises:
        UserError: the base can't be read.
    """
    finished = read_json(_file(config.weights_folder, config.output_path), _OUTPUTS)
    if finished is None or finished.made is None:
        return False
    base = locate_model(config.onnx_path, config.component)
    return finished.options != _digest(config, fingerprint_model(base))


def remember_export(config: ExportConfig) -> None:
    """Keep among the weights that exactly ``config`` wrote its output; log a warning where that can't be."""
    _remember(config, config.weights_path, _export_digest(config))


def is_exported(config: ExportConfig) -> bool:
    """Return whether an earlier run of exactly ``config`` wrote its output, which is there unchanged."""
    try:
        return not config.overwrite and _find(config, config.weights_path, _export_digest(config)) is not None
    except UserError:
        return False


def _file(weights: Path, output: Path) -> Path:
    folder = output.absolute()
    return weights / f"output.{file_name((folder.parent if folder.suffix == '.onnx' else folder).name)}.json"


def _remember(
    config: QuantizeConfig | ExportConfig,
    weights: Path,
    options: str,
    *,
    calibration: str = "",
    made: QuantizedModel | None = None,
) -> None:
    path = _file(weights, config.output_path)
    try:
        directory = _output(config)
        files = (file for file in directory.folder.rglob("*") if file.is_file())
        finished = FinishedOutput(
            options=options,
            calibration=calibration,
            output=fingerprint_model(directory),
            files=tuple(sorted(file.relative_to(directory.folder).as_posix() for file in files)),
            made=made,
        )
        write_json(path, _OUTPUTS, finished)
    except (OSError, UserError) as error:
        _LOGGER.warning("%s can't be written (%s); the model is finished.", path, error)


def _output(config: QuantizeConfig | ExportConfig) -> ModelDirectory:
    """Return the output, and the component of its package that is quantized."""
    return locate_model(config.output_path, locate_model(config.onnx_path, config.component).component)


def _find(config: QuantizeConfig | ExportConfig, weights: Path, options: str) -> FinishedOutput | None:
    """Return what is kept of an output if ``options`` made it, and it is unchanged and complete.

    Args:
        config: names the output.
        weights: the folder of its weights.
        options: their digest.

    Raises:
        UserError: the output can't be read.
    """
    finished = read_json(_file(weights, config.output_path), _OUTPUTS)
    if finished is None or finished.options != options:
        return None
    directory = _output(config)
    if not all((directory.folder / name).exists() for name in finished.files):
        return None
    return finished if finished.output == fingerprint_model(directory) else None


def _digest(config: QuantizeConfig, base_fingerprint: str) -> str:
    options = {
        field.name: str(getattr(config, field.name)) for field in fields(config) if field.name not in _WITHOUT_EFFECT
    }
    options["base"] = base_fingerprint
    options["plan"] = "" if config.plan is None else _content(config.plan)
    options["checkpoint"] = "" if config.checkpoint is None else open_checkpoint(config.checkpoint).fingerprint()
    return _sha256(options)


def _export_digest(config: ExportConfig) -> str:
    options = {name: str(getattr(config, name)) for name in ("weight_operator", "accuracy_level", "verify")}
    return _sha256(options | {"recipe": _content(config.weights_path / RECIPE)})


def _sha256(options: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def _content(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _calibration(config: QuantizeConfig) -> str | None:
    """Return the digest of the cache that ``config`` needs; None where it needs none, or there is none."""
    cache = find_cache(config.cache_path) if config.needs_cache else None
    return None if cache is None else cache.manifest.key.digest()
