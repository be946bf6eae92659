"""What the options of all commands have in common: printing, validation, default folders.

An option is a field of a dataclass: its name (with underscores, as in the tool that this one replaces; hyphens work
too), its default, and its help, the docstring below it. ``validate`` raises OptionError with the option's name and
touches no files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from stages.errors import OptionError
from stages.system.paths import sibling_folder

AccuracyLevel = Literal[0, 1, 2, 3, 4]
LogLevel = Literal["debug", "info", "warning", "error"]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""An option without a --no_ form."""


def require(condition: bool, message: str) -> None:
    """Raise OptionError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise OptionError(message)


def default_folder(path: Path, suffix: str) -> Path:
    """Return the default folder beside a model's: ``models/base/model.onnx`` -> ``models/base<suffix>``.

    The graphs of repositories on the Hugging Face hub lie in ``models/base/onnx``: the folder is beside ``base`` too.
    """
    folder = path.parent if path.suffix.lower() == ".onnx" else path
    if folder.name in ("", ".."):
        folder = folder.absolute()
    if folder.name == "onnx" and folder.parent.name:
        folder = folder.parent
    try:
        return sibling_folder(folder, suffix)
    except ValueError as error:
        raise OptionError(f"{path} lies at the root of a disk; put it into a folder.") from error


def given_options(options: CommandOptions) -> list[str]:
    """Return the words that set every option that isn't at its default, but for those about printing."""
    words: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "printing" or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Options about what a command prints, and where."""

    quiet: Flag = False
    """Print only warnings and errors; exit codes stay the same."""
    verbose: Flag = False
    """Print details too, where a command has any: worst tokens, tables of single layers, commands of a sweep, all
    runtimes."""
    json: Flag = False
    """Print the results as one JSON document on standard output, in place of tables."""
    log_level: LogLevel = "info"
    """Print messages of this level and above."""
    log_file: Path | None = None
    """File to append messages and progress to, with their time."""


# Without slots, so that a command that takes the options of two others can inherit from both.
@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options that every command has."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Options whose names may be left out, in this order."""

    printing: Annotated[OutputOptions, tyro.conf.arg(name="")] = OutputOptions()
    """The empty name puts these options among the others."""

    def validate(self) -> None:
        """Raise OptionError naming the first option that can't be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(CommandOptions):
    """Do a whole run that one file describes: calibrate if the search needs it, quantize, export, evaluate."""

    examples: ClassVar[tuple[str, ...]] = (
        "run.yaml",
        "run.yaml --dry_run",
        "run.yaml --json --quiet",
    )

    config: Annotated[Path, tyro.conf.Positional]
    """YAML (or JSON) with the sections calibrate, quantize, export and evaluate, each with that command's options; or
    an Olive workflow."""
    dry_run: Flag = False
    """Say what would be done, without doing it."""
