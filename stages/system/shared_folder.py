"""Wait for files that other machines wrote to a shared folder: there they may appear seconds after they were closed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from stages.errors import UserError
from stages.records.quantities import duration

_LOGGER = logging.getLogger(__name__)
_PATIENCE = 150.0
"""Seconds: NFS clients ask for a folder's changes at least every 60, unless they were told otherwise."""
_SAID_AFTER = 3.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0


def wait_for(paths: Iterable[Path], *, patience: float = _PATIENCE) -> None:
    """Wait until this machine sees all ``paths``, which processes of this run have finished.

    Args:
        paths: files or folders.
        patience: seconds, for all together.

    Raises:
        UserError: one isn't seen in that time.
    """
    ends = time.monotonic() + patience
    for path in paths:
        wait_until(path.exists, path, patience=ends - time.monotonic())


def wait_until(is_seen: Callable[[], bool], path: Path, *, patience: float = _PATIENCE) -> None:
    """Wait until this machine sees what another process of this run has written to ``path``.

    Args:
        is_seen: tells whether it does.
        path: a file or folder.
        patience: seconds.

    Raises:
        UserError: it isn't seen in that time.
    """
    began, pause, silent = time.monotonic(), _FIRST_PAUSE, True
    while not is_seen():
        waited = time.monotonic() - began
        if waited >= patience:
            raise UserError(
                f"{path} was written by another process of this run and isn't to be seen after {duration(waited)}; let "
                "all machines share its folder, let nothing remove files there, and run the same command again."
            )
        if silent and waited > _SAID_AFTER:
            _LOGGER.info("waiting for %s, which another process wrote.", path)
            silent = False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        with suppress(OSError):
            next(path.parent.iterdir(), None)  # reading a folder lets a client ask for its changes
