"""The console command ``genai-quant``: one program whose subcommands are the commands of ``python -m``."""

from __future__ import annotations

from typing import Annotated

import tyro

from export.__main__ import export
from genai_quant.whole_run import run_whole
from stages.calibrate import calibrate_and_point_on
from stages.cli import run_parsed
from stages.config import (
    CalibrateConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    QuantizeConfig,
    ReportConfig,
    RunConfig,
    SweepConfig,
)
from stages.evaluate import evaluate_models
from stages.inspect.__main__ import inspect
from stages.quantize import quantize
from stages.report_page import report_page
from stages.sweep import sweep

PROGRAM = "genai-quant"
_DESCRIPTION = (
    "Quantize ONNX Runtime GenAI language models to INT4 / INT8. Each command has the options of its "
    "python -m stages.COMMAND (export: python -m export; report: python -m stages.report_page)."
)
_Options = (
    Annotated[CalibrateConfig, tyro.conf.subcommand("calibrate", prefix_name=False)]
    | Annotated[QuantizeConfig, tyro.conf.subcommand("quantize", prefix_name=False)]
    | Annotated[ExportConfig, tyro.conf.subcommand("export", prefix_name=False)]
    | Annotated[RunConfig, tyro.conf.subcommand("run", prefix_name=False)]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate", prefix_name=False)]
    | Annotated[SweepConfig, tyro.conf.subcommand("sweep", prefix_name=False)]
    | Annotated[InspectConfig, tyro.conf.subcommand("inspect", prefix_name=False)]
    | Annotated[ReportConfig, tyro.conf.subcommand("report", prefix_name=False)]
)


def main() -> None:
    """Parse ``sys.argv``, run the command that it names, and leave as ``stages.cli.run_command`` does."""
    options: _Options = tyro.cli(
        _Options,
        prog=PROGRAM,
        description=_DESCRIPTION,
        use_underscores=True,
    )
    match options:
        case CalibrateConfig():
            run_parsed(options, calibrate_and_point_on, f"{PROGRAM} calibrate")
        case QuantizeConfig():
            run_parsed(options, quantize, f"{PROGRAM} quantize")
        case ExportConfig():
            run_parsed(options, export, f"{PROGRAM} export")
        case RunConfig():
            run_parsed(options, run_whole, f"{PROGRAM} run")
        case EvaluateConfig():
            run_parsed(options, evaluate_models, f"{PROGRAM} evaluate")
        case SweepConfig():
            run_parsed(options, sweep, f"{PROGRAM} sweep")
        case InspectConfig():
            run_parsed(options, inspect, f"{PROGRAM} inspect")
        case ReportConfig():
            run_parsed(options, report_page, f"{PROGRAM} report")
