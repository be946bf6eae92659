"""Translate Olive workflows into sections of a run file, and tell Olive itself of our pass.

The schema is that of Olive 0.13 (``olive run --config``): input_model, systems, passes, and the engine's keys beside
them or in ``engine``. A workflow must have one pass: ``GenaiQuant``, with the options of both stages, or Olive's own
``OnnxBlockWiseRtnQuantization``. What has no counterpart here is an error, never guessed.

``python -m genai_quant.olive passes.json`` writes the file with which Olive finds the pass ``GenaiQuant``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from genai_quant.run_options import option_names, unknown
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.options import CommandOptions, default_folder
from stages.commands.output import Section
from stages.commands.quantize_options import QuantizeConfig
from stages.commands.run import run_command
from stages.errors import UserError, with_class_name
from stages.records.quantities import counted

_LOGGER = logging.getLogger(__name__)
Sections = dict[str, dict[str, Any]]

_READ = {"input_model", "systems", "passes", "target", "output_dir", "cache_dir", "engine"}
_WITHOUT_EFFECT = {
    "clean_cache",
    "clean_evaluation_cache",
    "evaluate_input_model",
    "host",
    "log_severity_level",
    "log_to_file",
    "no_artifacts",
    "ort_log_severity_level",
    "ort_py_log_severity_level",
    "plot_pareto_frontier",
    "workflow_id",
}
"""Keys about how Olive itself works; they don't change the model."""
_NOTHING: tuple[object, ...] = (None, False, [], {})
"""Values with which a key asks for nothing."""
_PLACES = frozenset({"onnx_path", "output_path"})
"""Options of both stages that a workflow gives by its model and its output_dir."""
_OF_BOTH = frozenset({"cache_dir", "device", "overwrite"})
"""Options that both stages need; the others that both know are about the text, which stage one reads."""
_PROVIDERS = {
    "CPUExecutionProvider": ("cpu", "cpu"),
    "CUDAExecutionProvider": ("cuda", "cuda,cpu"),
    "DmlExecutionProvider": ("dml", "dml,cpu"),
    "NvTensorRTRTXExecutionProvider": ("trt-rtx", "NvTensorRtRtx,cuda,cpu"),
    "QNNExecutionProvider": ("qnn", "cpu"),
    "WebGpuExecutionProvider": ("webgpu", "cpu"),
}
"""Execution provider -> (--target, --calibration_eps)."""
_PROVIDER_OF_DEVICE = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}
"""What Olive takes for a device that is named alone."""
_OURS, _ROUNDING = "GenaiQuant", "OnnxBlockWiseRtnQuantization"
_OUR_CLASS = "genai_quant.olive_pass.GenaiQuant"
_IN_OLIVE = "run it with Olive, which can take our pass too (docs/reference/run-files.md)"
_ONE_FILE = {"save_as_external_data": True, "all_tensors_to_one_file": True}
"""The only way in which weights are stored here."""


def is_olive(content: Mapping[str, Any]) -> bool:
    """Return whether a run file is an Olive workflow."""
    return bool({"input_model", "passes"} & set(content))


def sections_of_olive(content: Mapping[str, Any], file: Path) -> Sections:
    """Return the sections calibrate and quantize that make the workflow's model.

    Raises:
        UserError: a key, model, system or pass has no counterpart here.
    """
    keys = _keys(content, file)
    places: dict[str, Any] = {"onnx_path": _model(keys, file)}
    if "output_dir" not in keys:
        raise UserError(f"{file} has no output_dir; name the folder for the quantized model.")
    target, providers = _target(keys, file)
    if "cache_dir" in keys:
        own = keys["cache_dir"][0] if isinstance(keys["cache_dir"], list) else keys["cache_dir"]
        places["cache_dir"] = Path(str(own)) / default_folder(Path(places["onnx_path"]), ".calibration").name
    calibrate = places | {"calibration_eps": providers}
    quantize = places | {"output_path": keys["output_dir"], "target": target}
    name, kind, options = _only_pass(keys, file)
    place = f"{file}: pass {name}"
    if kind == _ROUNDING:
        return {"quantize": quantize | _rounding(options, place)}
    mine = sections_of_pass(options, place)
    return {"calibrate": calibrate | mine["calibrate"], "quantize": quantize | mine["quantize"]}


def sections_of_pass(options: Mapping[str, Any], place: str) -> Sections:
    """Return the options of a pass ``GenaiQuant``, sorted into the sections calibrate and quantize.

    Args:
        options: those given; null is not given.
        place: the pass, for messages.

    Raises:
        UserError: an option is neither stage's, or names a place that the workflow itself names.
    """
    of_calibrate, known = option_names(CalibrateConfig), pass_options()
    kinds = {"calibrate": of_calibrate, "quantize": (known - of_calibrate) | _OF_BOTH}
    for key in options:
        if key not in known:
            raise unknown(place, "option", key, known, "its options are those of both stages.")
    given = {key: value for key, value in options.items() if value is not None}
    return {name: {key: given[key] for key in given if key in names} for name, names in kinds.items()}


def pass_options() -> frozenset[str]:
    """Return the options of the pass ``GenaiQuant``."""
    return (option_names(CalibrateConfig) | option_names(QuantizeConfig)) - _PLACES


def target_of(provider: str, place: str) -> tuple[str, str]:
    """Return the --target and --calibration_eps for an execution provider.

    Raises:
        UserError: it is no target; ``place`` is what names it.
    """
    if provider not in _PROVIDERS:
        raise UserError(f"{place} has the execution provider {provider}; choose from {', '.join(_PROVIDERS)}.")
    return _PROVIDERS[provider]


def package_config() -> dict[str, Any]:
    """Return the passes of the installed Olive and ours, as ``olive run --package-config`` reads them.

    Raises:
        UserError: Olive can't be imported.
    """
    try:
        from olive.package_config import OlivePackageConfig
    except ImportError as error:
        raise UserError(
            f"Olive can't be imported ({with_class_name(error)}); install it with 'pip install olive-ai requests'."
        ) from error
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    anything = ["*"]
    config["passes"][_OURS] = {
        "module_path": _OUR_CLASS,
        "supported_providers": anything,
        "supported_accelerators": anything,
        "supported_precisions": ["int4", "int8"],
    }
    return config


def _keys(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the workflow's keys, with those of ``engine`` among them, without null and empty ones."""
    keys = dict(content) | dict(_dictionary(content.get("engine") or {}, f"{file}: engine"))
    keys = {key: value for key, value in keys.items() if value not in _NOTHING and key != "engine"}
    for key in keys:
        if key not in _READ | _WITHOUT_EFFECT:
            raise UserError(f"{file}: {key} has no counterpart here; leave it out, or {_IN_OLIVE}.")
    if ignored := sorted(set(keys) & _WITHOUT_EFFECT):
        _LOGGER.info("%s: ignored here: %s.", file, ", ".join(ignored))
    return keys


def _dictionary(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place} is not a dictionary; write it as in Olive's documentation.")
    return value


def _flat(value: object, place: str) -> dict[str, Any]:
    """Return options from either place that Olive allows: beside ``type``, or in ``config``."""
    outside = dict(_dictionary(value, place))
    return outside | dict(_dictionary(outside.pop("config", None) or {}, f"{place}: config"))


def _model(keys: Mapping[str, Any], file: Path) -> str:
    place = f"{file}: input_model"
    model = _flat(keys.get("input_model") or {}, place)
    kind, path = str(model.pop("type", "")), model.pop("model_path", None)
    if kind.lower() != "onnxmodel":
        raise UserError(
            f"{place} is of type {kind or 'none'}, and only OnnxModel can be quantized; build the model with "
            "onnxruntime-genai's builder first and name its folder as model_path."
        )
    name = model.pop("onnx_file_name", None)
    model.pop("model_attributes", None)
    model = {key: value for key, value in model.items() if value not in _NOTHING}
    if model:
        raise UserError(f"{place} has {next(iter(model))}, which has no counterpart here; leave it out.")
    if not isinstance(path, str):
        raise UserError(f"{place} lacks model_path; name the base model's folder or .onnx file.")
    return path if name is None else str(Path(path) / str(name))


def _target(keys: Mapping[str, Any], file: Path) -> tuple[str | None, str]:
    """Return the --target and --calibration_eps of the target system; no target where there is no system."""
    named = keys.get("target")
    if named is None:
        return None, CalibrateConfig.calibration_eps
    place = f"{file}: target" if isinstance(named, dict) else f"{file}: system {named}"
    systems = _dictionary(keys.get("systems", {}), f"{file}: systems")
    if not isinstance(named, dict) and named not in systems:
        raise unknown(str(file), "system", str(named), systems, "add it to systems.")
    system = _flat(named if isinstance(named, dict) else systems[named], place)
    if str(system.get("type")).lower() != "localsystem":
        raise UserError(f"{place} is of type {system.get('type')}; only LocalSystem runs here.")
    accelerators = system.get("accelerators") or []
    if not accelerators:
        return None, CalibrateConfig.calibration_eps
    if len(accelerators) > 1:
        raise UserError(
            f"{place} has {counted(len(accelerators), 'accelerator')}; a model is made for one, so leave one."
        )
    return _provider(_dictionary(accelerators[0], place), place)


def _provider(accelerator: Mapping[str, Any], place: str) -> tuple[str, str]:
    device = str(accelerator.get("device", "")).lower()
    providers = accelerator.get("execution_providers") or _PROVIDER_OF_DEVICE.get(device)
    if not providers:
        raise UserError(f"{place} names no execution_providers; name one of {', '.join(_PROVIDERS)}.")
    first = [providers] if isinstance(providers, str) else providers[0]
    return target_of(first[0] if isinstance(first, list) else str(first), place)


def _only_pass(keys: Mapping[str, Any], file: Path) -> tuple[str, str, dict[str, Any]]:
    """Return the name, type and options of the only pass."""
    passes = _dictionary(keys.get("passes") or {}, f"{file}: passes")
    runs = [(name, one) for name, run in passes.items() for one in (run if isinstance(run, list) else [run])]
    if len(runs) != 1:
        raise UserError(
            f"{file} has {counted(len(runs), 'pass', 'passes')}; leave one, of type {_OURS} or "
            f"{_ROUNDING}, or {_IN_OLIVE}."
        )
    name, run = runs[0]
    options = _flat(run, f"{file}: pass {name}")
    options.pop("host", None)
    kind = options.pop("type", None)
    for known in (_OURS, _ROUNDING):
        if str(kind).lower() == known.lower():
            return name, known, options
    raise UserError(f"{file}: pass {name} is of type {kind}; use {_OURS} or {_ROUNDING}, or {_IN_OLIVE}.")


def _rounding(options: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return options that round as Olive does: every MatMul, lm_head too, and the embedding along each token's row.

    Olive 0.13 takes ``axis`` and doesn't use it.
    """
    options = {key: value for key, value in options.items() if value is not None}
    for key, always in _ONE_FILE.items():
        if options.get(key, always) is not always:
            raise UserError(
                f"{place}: {key} can't be {options[key]}; weights are always stored in one file beside the graph."
            )
    left = set(options) - {*_ONE_FILE, "bits", "block_size", "axis", "is_symmetric", "accuracy_level"}
    if left - {"nodes_to_exclude"}:
        raise UserError(f"{place}: {min(left - {'nodes_to_exclude'})} has no counterpart here; leave it out.")
    if options.get("bits", 4) != 4:
        raise UserError(f"{place}: bits can't be {options['bits']}; use the pass {_OURS} with layers_8bit for INT8.")
    excluded = options.get("nodes_to_exclude", [])
    return {
        "algo": "rtn_dq",
        "weight_operator": "matmul_nbits",
        "block_size": options.get("block_size", 128),
        "gather_quantize_axis": 1,
        "gather_block_size": options.get("block_size", 128),
        "use_zero_point": not options.get("is_symmetric", True),
        "accuracy_level": options.get("accuracy_level") or None,
        "exclude": ",".join(excluded),
        "lm_head": None if any("lm_head" in name for name in excluded) else "4",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _PassesConfig(CommandOptions):
    """Write the passes of the installed Olive and GenaiQuant into a file for olive run --package-config."""

    output: Annotated[Path, tyro.conf.Positional]
    """The file; it is replaced."""


def _write_passes(config: _PassesConfig) -> Iterator[Section]:
    try:
        config.output.write_text(json.dumps(package_config(), indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{config.output} can't be written ({error.strerror}); name another file.") from error
    _LOGGER.info("Olive finds %s with: olive run --config WORKFLOW --package-config %s", _OURS, config.output)
    yield from ()


if __name__ == "__main__":
    run_command(_PassesConfig, _write_passes, "python -m genai_quant.olive")
