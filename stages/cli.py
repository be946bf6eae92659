"""The command line's edge: parse a config, set up logging once, turn a UserError into one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stages.errors import UserError

Config = TypeVar("Config")


def progress_bar(console: Console) -> Progress:
    """A bar that says what, how far, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def show(table: Table) -> None:
    """Print a result to standard output; progress and messages go to standard error."""
    Console().print(table)


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


def run_command(config_type: type[Config], command: Callable[[Config, Console], None], program: str) -> None:
    """Parse ``sys.argv`` into ``config_type``, run ``command``, and leave with 0, 2 (bad input) or 130 (Ctrl-C)."""
    config = tyro.cli(config_type, prog=program, use_underscores=True)
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        command(config, console)
    except UserError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; what was finished is kept, run the same command again to go on.", highlight=False)
        sys.exit(130)
