"""Records as JSON files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from stages.errors import UserError
from stages.system.json_file import explained, read_json, write_json, write_whole
from tests.support.full_disk import full_after


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    text: str
    number: int = 0


_NOTES = TypeAdapter(_Note)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "note.json"
    write_json(path, _NOTES, _Note(text="ä\u2028", number=3))
    assert read_json(path, _NOTES) == _Note(text="ä\u2028", number=3)
    assert [file.name for file in path.parent.iterdir()] == ["note.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"text": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_record_is_passed_over(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "note.json").write_bytes(content)
    assert read_json(tmp_path / "note.json", _NOTES) is None
    assert read_json(tmp_path, _NOTES) is None


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    write_json(path, _NOTES, _Note(text="first"))
    with (
        full_after(1000),
        pytest.raises(UserError, match=r"^The note can't be kept \(File too large\); free space\.$"),
        explained("The note can't be kept", "free space"),
    ):
        write_whole(path, b"x" * 5000)
    assert read_json(path, _NOTES) == _Note(text="first")
    assert [file.name for file in tmp_path.iterdir()] == ["note.json"]


def test_a_damaged_record_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^The note can't be read \(number: .*\); delete it\.$"),
        explained("The note can't be read", "delete it"),
    ):
        _NOTES.validate_json('{"text": "a", "number": "b"}')
