"""The console command ``genai-quant``, whose subcommands are the commands of ``python -m stages.COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import tyro

from export import __main__ as export
from genai_quant import __version__
from stages import calibrate, evaluate, quantize, sweep
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig, InspectConfig, ReportConfig, SweepConfig
from stages.commands.options import RunConfig
from stages.commands.output import Section
from stages.commands.parsing import parse_options
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.commands.run import run_parsed
from stages.inspect import __main__ as inspect
from stages.report import __main__ as report_page

PROGRAM = "genai-quant"
_DESCRIPTION = (
    "Quantize ONNX Runtime GenAI language models to INT4 / INT8. The commands are also python -m stages.COMMAND, and "
    "export is python -m export. --version prints the version."
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
    """Parse ``sys.argv``, run the command that it names, and leave as ``run_command`` does."""
    if sys.argv[1:2] == ["--version"]:
        print(f"{PROGRAM} {__version__}")  # noqa: T201 - the answer itself
        return
    match options := parse_options(_Options, PROGRAM, _DESCRIPTION):
        case CalibrateConfig():
            run_parsed(options, calibrate.command, f"{PROGRAM} calibrate")
        case QuantizeConfig():
            run_parsed(options, quantize.command, f"{PROGRAM} quantize")
        case ExportConfig():
            run_parsed(options, export.command, f"{PROGRAM} export")
        case RunConfig():
            run_parsed(options, _run_file, f"{PROGRAM} run")
        case EvaluateConfig():
            run_parsed(options, evaluate.command, f"{PROGRAM} evaluate")
        case SweepConfig():
            run_parsed(options, sweep.command, f"{PROGRAM} sweep")
        case InspectConfig():
            run_parsed(options, inspect.command, f"{PROGRAM} inspect")
        case ReportConfig():
            run_parsed(options, report_page.command, f"{PROGRAM} report")


def _run_file(config: RunConfig) -> Iterable[Section]:
    from genai_quant.run_file import run_whole

    return run_whole(config)
