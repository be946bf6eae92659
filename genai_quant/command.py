"""The console command ``genai-quant``, whose subcommands are the commands of ``python -m stages.COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Union

import tyro

from export import __main__ as export
from genai_quant import __version__
from genai_quant.base_models.options import BaseModelConfig
from stages import calibrate, evaluate, quantize, sweep
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import EvaluateConfig, InspectConfig, ReportConfig, SweepConfig
from stages.commands.options import CommandOptions, RunConfig
from stages.commands.output import Section
from stages.commands.parsing import parse_options
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.commands.run import run_parsed
from stages.inspect import __main__ as inspect
from stages.report import __main__ as report

PROGRAM = "genai-quant"
_DESCRIPTION = (
    "Quantize ONNX Runtime GenAI language models to INT4 / INT8. The commands are also python -m stages.COMMAND, and "
    "export is python -m export. --version prints the version."
)


def _build(config: BaseModelConfig) -> Iterable[Section]:
    from genai_quant.base_models.build import build

    return build(config)


def _run_file(config: RunConfig) -> Iterable[Section]:
    from genai_quant.run_file import run_whole

    return run_whole(config)


_COMMANDS: Mapping[str, tuple[type[CommandOptions], Callable[[Any], Iterable[Section]]]] = {
    "base-model": (BaseModelConfig, _build),
    "calibrate": (CalibrateConfig, calibrate.command),
    "quantize": (QuantizeConfig, quantize.command),
    "export": (ExportConfig, export.command),
    "run": (RunConfig, _run_file),
    "evaluate": (EvaluateConfig, evaluate.command),
    "sweep": (SweepConfig, sweep.command),
    "inspect": (InspectConfig, inspect.command),
    "report": (ReportConfig, report.command),
}
_OPTIONS: object = Union[  # noqa: UP007 - of a tuple
    tuple(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, (kind, _) in _COMMANDS.items())
]


def main() -> None:
    """Parse ``sys.argv``, run the command that it names, and leave as ``run_command`` does."""
    if sys.argv[1:2] == ["--version"]:
        print(f"{PROGRAM} {__version__}")  # noqa: T201 - the answer itself
        return
    options = parse_options(_OPTIONS, PROGRAM, _DESCRIPTION)
    assert isinstance(options, CommandOptions)
    name, command = next((name, command) for name, (kind, command) in _COMMANDS.items() if type(options) is kind)
    run_parsed(options, command, f"{PROGRAM} {name}")
