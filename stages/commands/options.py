"""Every option of the command lines: its name, default, help and validation, once.

Spelling follows the tool that this one replaces (underscores; hyphens work too). ``validate`` raises OptionError with
the option's name; nothing here touches files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stages.errors import OptionError
from stages.system.paths import sibling_folder

AccuracyLevel = Literal[0, 1, 2, 3, 4]


LogLevel = Literal["debug", "info", "warning", "error"]


Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


def default_folder(path: Path, suffix: str) -> Path:
    """The default companion folder of a model: ``models/base/model.onnx`` -> ``models/base<suffix>``."""
    folder = path.absolute()
    folder = folder.parent if folder.suffix.lower() == ".onnx" else folder
    try:
        return sibling_folder(folder, suffix)
    except ValueError as error:
        raise OptionError(f"{path} lies at the root of a disk; put it into a folder.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What a command prints, and where."""

    quiet: Flag = False
    """Print warnings and errors alone; exit codes stay the same."""
    json: Flag = False
    """Print the results as one JSON document on standard output, in place of tables."""
    log_level: LogLevel = "info"
    """The least important messages that are printed."""
    log_file: Path | None = None
    """File that messages and progress are appended to, with their time."""


# Without slots, so that a command that takes the options of two others can inherit from both.
@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command has."""

    printing: Annotated[OutputOptions, tyro.conf.arg(name="")] = OutputOptions()
    """An empty name: its options stand among the others."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(CommandOptions):
    """A whole run out of one file: calibrate where the search needs it, quantize, export, evaluate."""

    config: Annotated[Path, tyro.conf.Positional]
    """YAML (or JSON) with the sections calibrate, quantize, export and evaluate, each with that command's options; or
    an Olive workflow."""
    dry_run: Flag = False
    """Say what would be done, and do nothing."""
