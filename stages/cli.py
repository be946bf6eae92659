"""The command line's edge: parse a config, set up what is printed, turn a UserError into one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import tyro
from rich.console import Console

from stages.config import CommandOptions, OutputOptions
from stages.errors import UserError
from stages.messages import logging_to
from stages.one_line import in_one_line, sentence_of
from stages.processes import is_first_started
from stages.screen import Screen, findings_of, silent_screen

Config = TypeVar("Config", bound=CommandOptions)

_LOGGER = logging.getLogger(__name__)
_BAD_INPUT, _INTERRUPTED = 2, 130


def choose_device(wanted: str) -> torch.device:
    """The torch device that ``--device`` means; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device isn't there.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {wanted} can't be used here; choose auto, cpu, or a device torch sees.") from error
    return device


def run_command(config_type: type[Config], command: Callable[[Config, Screen], None], program: str) -> None:
    """Parse ``sys.argv`` into ``config_type``, run ``command``, and leave with 0, 2 (bad input) or 130 (Ctrl-C)."""
    run_parsed(tyro.cli(config_type, prog=program, use_underscores=True), command, program)


def run_parsed(config: Config, command: Callable[[Config, Screen], None], program: str) -> None:
    """Run ``command`` on options that are parsed, and leave as ``run_command`` does.

    Of processes that were launched together the first alone prints; errors are everyone's.
    """
    console, is_first = Console(stderr=True), is_first_started()
    screen = _open_screen(console, config.printing, program) if is_first else silent_screen()
    try:
        with logging_to(console, config.printing, errors_only=not is_first):
            code = _run(lambda: command(config, screen), screen)
    except UserError as error:  # there is no log to write it to
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        screen.findings.end(str(error))
        code = _BAD_INPUT
    if code:
        sys.exit(code)


def _open_screen(console: Console, options: OutputOptions, program: str) -> Screen:
    """Progress is seen on the console that messages are printed on, so that bars and lines know of each other."""
    return Screen(
        console=Console(quiet=True) if options.quiet else console,
        findings=findings_of(program, as_json=options.json, quiet=options.quiet),
    )


def _run(command: Callable[[], None], screen: Screen) -> int:
    """The exit code of ``command``, whose error, if any, is logged."""
    try:
        command()
    except UserError as error:
        return _bad_input(sentence_of(error), screen)
    except MemoryError as error:
        reason = in_one_line(error)
        return _bad_input(f"The memory is too small ({reason}); give smaller sizes or close other programs.", screen)
    except KeyboardInterrupt:
        stopped = "stopped; what was finished is kept, run the same command again to go on."
        _LOGGER.warning(stopped)
        screen.findings.end(stopped)
        return _INTERRUPTED
    screen.findings.end(None)
    return 0


def _bad_input(sentence: str, screen: Screen) -> int:
    _LOGGER.error("%s", sentence)
    screen.findings.end(sentence)
    return _BAD_INPUT
