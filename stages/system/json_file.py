"""Records as JSON files: passed over where they can't be read, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from pydantic import ValidationError

from stages.errors import UserError, in_one_line
from stages.system.atomic import atomic_file

_Record = TypeVar("_Record")


@runtime_checkable
class Records(Protocol[_Record]):
    """The two methods that are used of pydantic's TypeAdapter, whose own type beartype can't check."""

    def validate_json(self, data: bytes, /) -> _Record: ...

    def dump_json(self, instance: _Record, /, *, indent: int | None = None) -> bytes: ...


def read_json(path: Path, records: Records[_Record]) -> _Record | None:
    """Return the record in ``path``; None where the file is missing, unreadable, or of another version."""
    try:
        return records.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_json(path: Path, records: Records[_Record], record: _Record) -> None:
    """Write ``record`` as ``path``, indented, like ``write_whole``."""
    write_whole(path, records.dump_json(record, indent=1))


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` as ``path``, whole or not at all; make its folder where it is missing."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def explained(failure: str, fix: str) -> Iterator[None]:
    """Raise UserError where the block can't read or write a file.

    Args:
        failure: what can't be done, and with which file: the sentence's beginning, which the reason follows.
        fix: what to do about it.
    """
    try:
        yield
    except (OSError, ValidationError) as error:
        raise UserError(f"{failure} ({_reason(error)}); {fix}.") from error


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or in_one_line(error)
    fault = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
