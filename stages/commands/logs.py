"""Send log records to the console while a command runs, and to a log file if there is one.

Every module has its own logger. Notices are printed as they are, warnings and errors after that word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from stages.commands import progress
from stages.commands.options import OutputOptions
from stages.commands.output import as_called, print_message
from stages.errors import UserError

_OURS = ("genai_quant", "stages", "export", "scripts", "__main__")
"""Loggers of this project; of others only warnings and errors are shown."""
_LABELS = {logging.WARNING: ("warning: ", "bold yellow"), logging.ERROR: ("error: ", "bold red")}
_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class ConsoleHandler(logging.Handler):
    """Prints records on a console, above its progress bars.

    Lines about progress are left out on a terminal, where bars show it.
    """

    def __init__(self, console: Console, level: int, program: str) -> None:
        super().__init__(level)
        self._console = console
        self.setFormatter(_AsCalled(None, program))
        if console.is_terminal:
            self.addFilter(lambda record: record.name != progress.__name__)

    def emit(self, record: logging.LogRecord) -> None:
        """Print ``record``."""
        label, style = _LABELS.get(record.levelno, ("", ""))
        ours = record.name.partition(".")[0] in _OURS
        text = Text.assemble((label, style), "" if ours else f"{record.name}: ", self.format(record))
        print_message(self._console, text)


class _AsCalled(logging.Formatter):
    """Spells our commands as the program was called."""

    def __init__(self, form: str | None, program: str) -> None:
        super().__init__(form)
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        return as_called(super().format(record), self._program)


@contextmanager
def logging_to(console: Console, options: OutputOptions, program: str, *, errors_only: bool) -> Iterator[None]:
    """Send what the block logs to ``console`` and to the log file of ``options``; then restore logging as it was.

    Args:
        console: where people see it.
        options: levels and the file.
        program: what people typed: messages spell our commands in the same way.
        errors_only: log only errors and write no file, since another process logs everything else.

    Raises:
        UserError: the file can't be written.
    """
    level = logging.getLevelNamesMapping()[options.log_level.upper()]
    shown = logging.ERROR if errors_only else max(level, logging.WARNING) if options.quiet else level
    with ExitStack() as stack:
        stack.enter_context(_handler(ConsoleHandler(console, shown, program)))
        if options.log_file is not None and not errors_only:
            stack.enter_context(_handler(_file_handler(options.log_file, level, program)))
        for name in _OURS:
            stack.enter_context(_level(logging.getLogger(name), level))
        yield


@contextmanager
def _handler(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _file_handler(path: Path, level: int, program: str) -> logging.Handler:
    """Return a handler that appends to ``path``: a command that is run again continues its log too."""
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--log_file {path} can't be written ({error.strerror}); choose another file.") from error
    handler.setLevel(level)
    handler.setFormatter(_AsCalled(_FILE_FORMAT, program))
    return handler
