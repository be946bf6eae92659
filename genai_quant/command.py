"""The console command ``genai-quant``, whose subcommands are the commands of ``python -m stages.COMMAND``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Union

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from export import __main__ as export
from genai_quant import __version__
from genai_quant.base_models.options import BaseModelConfig
from stages import calibrate, chat, evaluate, quantize, sweep
from stages.commands.calibrate_options import CalibrateConfig
from stages.commands.evaluate_options import ChatConfig, EvaluateConfig, InspectConfig, ReportConfig, SweepConfig
from stages.commands.help import HELP, HELP_ALL, first_sentence, listing
from stages.commands.options import CommandOptions, RunConfig
from stages.commands.output import Section, as_called, write_out
from stages.commands.parsing import leave_with, parse_options, suggestion
from stages.commands.quantize_options import ExportConfig, QuantizeConfig
from stages.commands.run import run_parsed
from stages.errors import UserError
from stages.inspect import __main__ as inspect
from stages.report import __main__ as report

PROGRAM = "genai-quant"
_DESCRIPTION = (
    "Quantize ONNX Runtime GenAI language models to INT4 / INT8. Most commands are",
    "also python -m stages.COMMAND, and export is python -m export.",
)
_EXAMPLES = (
    "quantize models/base models/int4",
    "evaluate models/base models/int4",
    "inspect models/int4",
)


def _build(config: BaseModelConfig) -> Iterable[Section]:
    from genai_quant.base_models.build import build

    return build(config)


def _run_file(config: RunConfig) -> Iterable[Section]:
    from genai_quant.run_file import run_whole

    return run_whole(config)


COMMANDS: Mapping[str, tuple[type[CommandOptions], Callable[[Any], Iterable[Section]]]] = {
    "base-model": (BaseModelConfig, _build),
    "calibrate": (CalibrateConfig, calibrate.command),
    "quantize": (QuantizeConfig, quantize.command),
    "export": (ExportConfig, export.command),
    "run": (RunConfig, _run_file),
    "chat": (ChatConfig, chat.command),
    "evaluate": (EvaluateConfig, evaluate.command),
    "sweep": (SweepConfig, sweep.command),
    "inspect": (InspectConfig, inspect.command),
    "report": (ReportConfig, report.command),
}
_OPTIONS: object = Union[  # noqa: UP007 - of a tuple
    tuple(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, (kind, _) in COMMANDS.items())
]


_COMPLETION = ConstructorRegistry()
_FOLDED = object()
"""Marks options whose help is in one line already."""


@_COMPLETION.struct_rule
def _folded_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Put the help of each option in one line: shells show one candidate a line."""
    if _FOLDED in info.markers or not dataclasses.is_dataclass(info.type):
        return None
    spec = ConstructorRegistry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, _FOLDED)))
    assert isinstance(spec, StructConstructorSpec)
    fields = (dataclasses.replace(field, helptext=_folded(field.helptext)) for field in spec.fields)
    return dataclasses.replace(spec, fields=tuple(fields))


def _folded(text: str | Callable[[], str | None] | None) -> str:
    return " ".join(((text() if callable(text) else text) or "").split())


def main(program: str = PROGRAM) -> None:
    """Parse ``sys.argv``, run the command that it names, and leave as ``run_command`` does.

    Args:
        program: what people typed.
    """
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else "--help"
    if first == "--version":
        write_out(f"{PROGRAM} {__version__}\n")
        sys.exit(0)
    if first in (*HELP, *HELP_ALL):
        write_out(f"{_help(program)}\n")
        sys.exit(0)
    if first.startswith("--tyro"):
        tyro.cli(_OPTIONS, prog=program, use_underscores=True, registry=_COMPLETION)  # type: ignore[call-overload]  # a union made at run time
    if first not in COMMANDS:
        fix = suggestion(first, COMMANDS, f"choose from {', '.join(COMMANDS)}.")
        leave_with(UserError(f"{program} has no command {first}; {fix}"))
    kind, command = COMMANDS[first]
    options = parse_options(kind, f"{program} {first}", arguments[1:])
    run_parsed(options, command, f"{program} {first}")


def _help(program: str) -> str:
    commands = {name: as_called(first_sentence(kind), program) for name, (kind, _) in COMMANDS.items()}
    options = {"-h, --help": "Show this help.", "--version": "Print the version."}
    examples = (f"  {program} {example}" for example in _EXAMPLES)
    lines = [f"usage: {program} COMMAND [options]", "", *_DESCRIPTION, "", "examples:", *examples]
    lines += ["", "commands:", *listing(commands), "", "options:", *listing(options)]
    return "\n".join(
        [*lines, "", f"{program} COMMAND --help explains the options of a command, --help_all all of them."]
    )
