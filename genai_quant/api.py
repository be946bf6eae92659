"""The stages as functions: a configuration in, files on disk and a frozen result out. Nothing is printed.

Bad input raises UserError with the sentence that the command line would print; options keep the names they have there.
What is there already is not made again, and an interrupted call goes on where it was, as with the commands. For several
processes use the commands under ``accelerate launch``.
"""

from __future__ import annotations

from rich.console import Console

from export import __main__ as export_command
from export.export_model import ExportSummary
from genai_quant.results import Gathered, QuantizedModel
from stages import calibrate as calibrate_command
from stages import evaluate as evaluate_command
from stages import quantize as quantize_command
from stages.calibration_table import CalibrationSummary
from stages.config import CalibrateConfig, EvaluateConfig, ExportConfig, QuantizeConfig
from stages.errors import UserError
from stages.evaluation.findings import Evaluation
from stages.preview_table import Preview
from stages.report import SearchSummary
from stages.screen import Screen


def calibrate(config: CalibrateConfig, *, console: Console | None = None) -> CalibrationSummary:
    """Run the base model once per batch and keep the statistics in ``config.cache_path``.

    Args:
        console: where progress is drawn; default: nowhere.

    Raises:
        UserError: an option, the model or the text can't be used, or the cache folder holds something else.
    """
    gathered = Gathered()
    calibrate_command.calibrate(config, _screen(gathered, console))
    return gathered.of_type(CalibrationSummary)


def quantize(config: QuantizeConfig, *, console: Console | None = None) -> QuantizedModel:
    """Search quantized weights and export the model to ``config.output_path``.

    Args:
        console: where progress is drawn; default: nowhere.

    Raises:
        UserError: an option or the model can't be used, the cache is missing or another model's, or the output exists.
    """
    if config.dry_run:
        raise UserError("quantize writes a model, and dry_run asks for none; call preview.")
    gathered = Gathered()
    quantize_command.quantize(config, _screen(gathered, console))
    exported = gathered.of_type(ExportSummary)
    return QuantizedModel(
        folder=exported.onnx_file.parent,
        onnx_file=exported.onnx_file,
        weights=config.weights_folder,
        search=gathered.of_type(SearchSummary),
        export=exported,
    )


def preview(
    config: QuantizeConfig, calibration: CalibrateConfig | None = None, *, console: Console | None = None
) -> Preview:
    """What ``quantize`` would do: every site's format, bytes, memory, seconds, obstacles. Reads the graph alone.

    Args:
        config: as for ``quantize``.
        calibration: how stage one would run before it.
        console: where progress is drawn; default: nowhere.

    Raises:
        UserError: an option or the model can't be used.
    """
    config.validate()
    gathered = Gathered()
    quantize_command.show_preview(config, calibration, _screen(gathered, console))
    return gathered.of_type(Preview)


def export(config: ExportConfig, *, console: Console | None = None) -> ExportSummary:
    """Write saved quantized weights into the base graph again, without searching.

    Args:
        console: where progress is drawn; default: nowhere.

    Raises:
        UserError: the weights are incomplete or another model's, or the output exists or fails a check.
    """
    gathered = Gathered()
    export_command.export(config, _screen(gathered, console))
    return gathered.of_type(ExportSummary)


def evaluate(config: EvaluateConfig, *, console: Console | None = None) -> Evaluation:
    """Compare models with their base on the same text.

    Args:
        console: where progress is drawn; default: nowhere.

    Raises:
        UserError: an option, a model or the text can't be used.
    """
    gathered = Gathered()
    evaluate_command.evaluate_models(config, _screen(gathered, console))
    return gathered.of_type(Evaluation)


def _screen(gathered: Gathered, console: Console | None) -> Screen:
    return Screen(console=console or Console(quiet=True), findings=gathered)
