"""Keep other runs out of a folder while one writes it: a lock file beside it says which process holds it.

The system takes a lock from a process that ends, however it ends, also one on another host that shares the disk. So a
lock file that a killed run left is no lock: the next run takes it over.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stages.errors import UserError, in_one_line
from stages.system.atomic import remove_empty
from stages.system.paths import reachable

_LOGGER = logging.getLogger(__name__)
_SECONDS = 0.3
"""So long another run may take from giving up its lock to removing the file."""
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_LONGEST_RECORD = 300


@contextmanager
def exclusive(path: Path, *, option: str, owner: bool = True, waits: bool = False) -> Iterator[None]:
    """Keep other runs out of ``path`` while the block runs.

    Args:
        path: the file or folder that the block writes; all its names and links to it mean the same.
        option: the command-line option that named it, for messages.
        owner: whether this process locks for all that share its run; the others do nothing.
        waits: whether to wait for another run, with a line that says so.

    Raises:
        UserError: another run holds it, or nothing can be written beside it.
    """
    if not owner:
        yield
        return
    path = path.resolve()
    file = reachable(path).with_name(f".{path.name}.lock")
    lock = FileLock(file, thread_local=False, on_acquired=_sign)
    made: list[Path] = []
    try:
        made = [parent for parent in file.parents if not parent.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path, option, waits)
    except OSError as error:
        remove_empty(made)
        if error.errno not in _NO_LOCKS:
            reason = error.strerror or in_one_line(error)
            raise UserError(f"{option} {path} can't be written ({reason}); choose one that you may write.") from error
        _LOGGER.warning("%s %s is on a disk without locks: see to it that no other run writes there.", option, path)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file; the library does it there
                file.unlink()
            lock.release()
        remove_empty(made)


def _acquire(lock: FileLock, path: Path, option: str, waits: bool) -> None:
    try:
        lock.acquire(timeout=_SECONDS)
    except Timeout as error:
        holder = _holder(Path(lock.lock_file))
        if not waits:
            raise UserError(
                f"{option} {path} is being written by {holder}; wait until that has ended, or choose another."
            ) from error
        _LOGGER.info("waiting for %s, which writes %s", holder, path)
        lock.acquire()


def _sign(descriptor: int) -> None:
    """Write which process holds the lock, behind the first byte, which is what Windows locks."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"\n{os.getpid()} {socket.gethostname()}\n".encode())


def _holder(file: Path) -> str:
    """Return which process holds the lock ``file``, in words."""
    words: list[bytes] = []
    with suppress(OSError), file.open("rb", buffering=0) as record:
        record.seek(1)
        words = record.read(_LONGEST_RECORD).split()
    if len(words) != 2:
        return "another run"
    process, host = (word.decode(errors="replace") for word in words)
    return f"process {process} on {host}"
