"""JSON files of records: read if they fit, written atomically, with errors that a person can act on."""

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
    """The two methods needed of pydantic's TypeAdapter, whose own type beartype can't check."""

    def validate_json(self, data: bytes, /) -> _Record: ...

    def dump_json(self, instance: _Record, /, *, indent: int | None = None) -> bytes: ...


def read_json(path: Path, records: Records[_Record]) -> _Record | None:
    """Return the record in ``path``; None where the file is missing, unreadable, or of another version."""
    try:
        return records.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_json(path: Path, records: Records[_Record], record: _Record) -> None:
    """Write ``record`` to ``path`` as indented JSON, whole or not at all; create missing folders."""
    write_whole(path, records.dump_json(record, indent=1))


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; create missing folders."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def explained(failure: str, fix: str) -> Iterator[None]:
    """Raise a UserError where the block can't read or write a file: "failure (reason); fix."

    Args:
        failure: the beginning of the sentence: what can't be done, with which file.
        fix: the end of the sentence: what to do about it.
    """
    try:
        yield
    except (OSError, ValidationError) as error:
        raise UserError(f"{failure} ({_reason(error)}); {fix}.") from error


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or in_one_line(error)
    return first_fault(error)


def first_fault(error: ValidationError) -> str:
    """Return where a record first differs from what was expected, and how."""
    fault = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
