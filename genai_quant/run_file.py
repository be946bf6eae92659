"""Run files: a whole run in one YAML or JSON file, with sections calibrate, quantize, export and evaluate.

An Olive workflow is understood too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export import __main__ as export
from export.finished import find_finished, is_exported, remember_export
from export.summary import export_table
from genai_quant.olive import is_olive, sections_of_olive
from genai_quant.run_options import read_mapping, read_options, unknown
from stages import evaluate, quantize
from stages.calibration.run import calibrate
from stages.calibration.summary import calibration_section
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig
from stages.commands.options import RunConfig
from stages.commands.output import Section
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.errors import OptionError, UserError
from stages.quantization.preview.table import preview_table
from stages.quantization.weights.store import REPORT_FOLDER
from stages.report.result import result_section
from stages.system.paths import from_here

_LOGGER = logging.getLogger(__name__)
_SECTIONS = ("calibrate", "quantize", "export", "evaluate")
_SHARED = ("onnx_path", "component", "cache_dir")
"""Options that mean the same place in both stages: given to one, they hold for the other too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """The steps of a run, in this order."""

    calibrate: CalibrateConfig | None
    """None: the statistics exist, or aren't needed."""
    quantize: QuantizeConfig
    export: ExportConfig | None
    """The same weights in another form; None: not wanted."""
    evaluate: EvaluateConfig | None


def read_run(file: Path) -> WholeRun:
    """Read and check a run file. Paths in it are as on the command line: relative to the current folder.

    Raises:
        UserError: it can't be read, or has an invalid section, option or value; the message names the closest one.
    """
    content = read_mapping(file)
    sections = sections_of_olive(content, file) if is_olive(content) else dict(_sections(content, file))
    if "quantize" not in sections:
        raise UserError(f"{file} has no section quantize; add it, with output_path in it.")
    shared = {key: sections[name][key] for name in ("quantize", "calibrate") for key in _shared_in(sections, name)}
    calibrate = None
    if "calibrate" in sections:
        calibrate = read_options(CalibrateConfig, shared | sections["calibrate"], file, "calibrate")
    quantize = read_options(QuantizeConfig, shared | sections["quantize"], file, "quantize")
    try:
        quantize.validate()
        if calibrate is not None:
            calibrate.validate()
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error
    return WholeRun(
        calibrate=calibrate,
        quantize=quantize,
        export=_export(sections, quantize, file),
        evaluate=_evaluate(sections, quantize, file),
    )


def run_whole(config: RunConfig) -> Iterator[Section]:
    """Do what the file of ``config`` says, or with ``dry_run`` say what that would be.

    Raises:
        UserError: the file can't be read or is invalid, or a step fails; impossible steps fail before the first one.
    """
    run = read_run(config.config)
    if config.dry_run or run.quantize.dry_run:
        planned = quantize.preview(replace(run.quantize, dry_run=True), run.calibrate)
        yield Section(name="plan", table=preview_table(planned), record=planned)
        return
    if find_finished(run.quantize) is None:
        quantize.check_before_calibration(run.quantize)
        yield from _calibrate(run)
    made = yield from quantize.run(run.quantize)
    if run.export is not None:
        yield from _export_again(run.export)
    if run.evaluate is not None:
        found = evaluate.evaluate(run.evaluate)
        yield from evaluate.evaluation_sections((found,), record=found)
        if made is not None and run.evaluate.model == (run.quantize.output_path,):
            made = replace(made, evaluations=(*made.evaluations, found))
            quantize.add_to_card(made.folder, made.evaluations)
    if made is not None:
        yield result_section(run.quantize, made)


def _export_again(config: ExportConfig) -> Iterator[Section]:
    """Export, unless a run that was stopped later did so."""
    if is_exported(config):
        _LOGGER.info("%s is there already, written with exactly these options.", from_here(config.output_path))
        return
    exported = export.export(config)
    remember_export(config)
    yield Section(name="export", table=export_table(exported), record=exported)


def _sections(content: Mapping[str, Any], file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, options in content.items():
        if name not in _SECTIONS:
            raise unknown(str(file), "section", name, _SECTIONS, f"its sections are {', '.join(_SECTIONS)}.")
        if not isinstance(options, dict | None):
            raise UserError(f"{file}: {name} holds no options; write each on a line below it, as name: value.")
        yield name, {str(key).replace("-", "_"): value for key, value in (options or {}).items()}


def _shared_in(sections: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, ...]:
    return tuple(key for key in _SHARED if key in sections.get(name, {}))


def _export(sections: Mapping[str, Mapping[str, Any]], quantize: QuantizeConfig, file: Path) -> ExportConfig | None:
    """Return options that write the weights of ``quantize`` in another form, unless the section names others."""
    if "export" not in sections:
        return None
    weights = {
        "onnx_path": quantize.onnx_path,
        "component": quantize.component,
        "weights_path": quantize.weights_folder,
    }
    return read_options(ExportConfig, weights | dict(sections["export"]), file, "export")


def _evaluate(sections: Mapping[str, Mapping[str, Any]], quantize: QuantizeConfig, file: Path) -> EvaluateConfig | None:
    """Return options that compare the quantized model with its base, unless the section names others."""
    if "evaluate" not in sections:
        return None
    report = quantize.weights_folder / REPORT_FOLDER
    models = {"base": quantize.onnx_path, "model": [quantize.output_path], "report": report}
    config = read_options(EvaluateConfig, models | dict(sections["evaluate"]), file, "evaluate")
    try:
        config.validate()
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from error
    return config


def _calibrate(run: WholeRun) -> Iterator[Section]:
    if run.calibrate is None:
        return
    if run.quantize.needs_cache:
        yield calibration_section(calibrate(run.calibrate))
    else:
        _LOGGER.info("%s rounds without calibration data: stage one is left out.", run.quantize.algo)
