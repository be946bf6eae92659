"""Run a command: parse its options, print what it returns, turn a UserError into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from stages.commands.logs import logging_to
from stages.commands.options import CommandOptions
from stages.commands.output import LastingConsole, Output, Section, open_output, print_message
from stages.commands.parsing import parse_options
from stages.commands.progress import progress_on
from stages.errors import UserError, in_one_line, sentence_of

Options = TypeVar("Options", bound=CommandOptions)
Command = Callable[[Options], Iterable[Section]]
"""Does its work and yields each part of its result as soon as it is there."""

_LOGGER = logging.getLogger(__name__)
_BAD_INPUT, _INTERRUPTED = 2, 130


def run_command(options_type: type[Options], command: Command[Options], program: str) -> None:
    """Parse ``sys.argv`` into ``options_type``, run ``command``, and leave with 0, 2 (bad input) or 130 (Ctrl-C).

    Args:
        options_type: the dataclass of the command's options.
        command: what to run; its sections are printed.
        program: what people typed, for the help text.
    """
    run_parsed(parse_options(options_type, program), command, program)


def run_parsed(options: Options, command: Command[Options], program: str) -> None:
    """Run ``command`` with parsed options, and leave as ``run_command`` does.

    Of processes that were launched together only the first prints results and progress; all print errors.

    Args:
        options: the command's options.
        command: what to run; its sections are printed.
        program: what people typed, in whose form messages spell our commands.
    """
    console, is_first = LastingConsole(stderr=True), _is_first_process()
    printing = options.printing
    silent = printing.quiet or not is_first
    output = open_output(program, as_json=printing.json and is_first, quiet=silent, verbose=printing.verbose)
    try:
        # Bars and messages share a console, so that neither overwrites the other.
        with (
            logging_to(console, printing, program, errors_only=not is_first),
            progress_on(Console(quiet=True) if silent else console),
        ):
            code = _run(options, command, output)
    except UserError as error:  # the log couldn't be opened
        print_message(console, Text(f"error: {error}"))
        output.end(str(error))
        code = _BAD_INPUT
    if code:
        sys.exit(code)


def _is_first_process() -> bool:
    """Return whether a launcher started this process first, or only this one; no other process is waited for."""
    return os.environ.get("RANK") in (None, "", "0")


def _run(options: Options, command: Command[Options], output: Output) -> int:
    """Return the exit code of ``command``, whose error, if any, is logged."""
    try:
        options.validate()
        for section in command(options):
            output.show(section)
    except UserError as error:
        return _bad_input(sentence_of(error), output)
    except MemoryError as error:
        reason = in_one_line(error)
        return _bad_input(f"Not enough memory ({reason}); use smaller sizes or close other programs.", output)
    except KeyboardInterrupt as error:
        otherwise = "stopped; the same command goes on after the last step that was finished."
        stopped = next(iter(getattr(error, "__notes__", ())), otherwise)
        _LOGGER.warning("%s", stopped)
        output.end(stopped)
        return _INTERRUPTED
    output.end(None)
    return 0


def _bad_input(sentence: str, output: Output) -> int:
    _LOGGER.error("%s", sentence)
    output.end(sentence)
    return _BAD_INPUT
