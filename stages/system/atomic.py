"""Atomic writes of files and folders, whole or not at all: a scratch copy beside the target, fsync, then a rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.errors import UserError
from stages.system.paths import reachable


def is_occupied(path: Path) -> bool:
    """Return whether ``path`` is a file, or a folder that isn't empty."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def refuse_existing(path: Path, *, overwrite: bool, option: str) -> None:
    """Raise UserError when ``path`` (a file, or a folder that isn't empty) exists and may not be replaced."""
    if is_occupied(path) and not overwrite:
        raise UserError(f"{option} {path} already exists; choose another path or pass --overwrite to replace it.")


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above ``path`` that exists."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def require_creatable(path: Path, *, option: str) -> None:
    """Raise UserError when ``path`` could not be created, before hours of work depend on it."""
    try:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{option} {path} is a link that leads nowhere; choose another path.")
        path.exists()
        parent = existing_parent(path)
    except OSError as error:
        raise UserError(f"{option} {path} can't be written ({error.strerror}); choose another path.") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path} can't be written ({parent} is not a writable folder); choose another path.")


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool, option: str, kept: bool = False) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` only if the block succeeds.

    The caller keeps other runs out (``lock.exclusive``): all use the same scratch folder.

    Args:
        path: the folder to create; missing parents are created too.
        overwrite: replace an existing folder; else it is refused before any work.
        option: the command-line option that named ``path``, for messages.
        kept: whether the scratch folder stays where the block fails, and the next run gets it as it is.

    Raises:
        UserError: the folder exists and ``overwrite`` is off, or can't be written.
    """
    path = _real(path)
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        partial = _partial(path)
        if not kept:
            _remove(partial)
        refuse_existing(path, overwrite=overwrite, option=option)
        partial.mkdir(exist_ok=kept)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{option} {path} can't be written ({reason}); choose a folder you may write to.") from error
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
        flush(partial)
        if path.is_dir():
            path.rename(_replaced(path))
        partial.rename(path)
        flush(path.parent)
        shutil.rmtree(_replaced(path), ignore_errors=True)
    finally:
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        remove_empty(made)


def partial_folder(path: Path) -> Path:
    """Return the scratch folder that ``atomic_directory`` fills before it becomes ``path``."""
    return _partial(_real(path))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path; what the block writes there replaces ``path`` in one step, or is removed."""
    partial = _partial(path)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path, *, owner: bool) -> Iterator[Path]:
    """Yield the path of a folder for temporary files beside ``path``, which is removed afterwards.

    Nothing is created: whoever puts a file there makes the folder. Of the processes that share it only the ``owner``,
    which must come first, removes it, and before that what a killed run left there.
    """
    folder = path.absolute().with_name(f".{path.name}.scratch")
    if owner:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        if owner:
            shutil.rmtree(folder, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def flush(path: Path) -> None:
    """Return once what was written to the file, or the entries of the folder, ``path`` is on the disk."""
    # Windows can't open a directory, and flushes a file only through a handle that may write.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _real(path: Path) -> Path:
    """Return where ``path`` leads: a link stays, and the folder that it leads to is replaced."""
    return reachable(path.resolve() if path.is_symlink() else path.absolute())


def _recover(path: Path) -> None:
    """Undo a replacement that was stopped between its two renames."""
    replaced = _replaced(path)
    if replaced.exists():
        if path.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(path)


def _remove(partial: Path) -> None:
    """Remove a half-written scratch folder that a killed run left."""
    if partial.exists():
        shutil.rmtree(partial)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove empty ``folders``, each the next one's child, until one isn't empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
