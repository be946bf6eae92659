"""Whole or not at all, also after a kill at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.system.atomic import atomic_directory, atomic_file, require_creatable


def _make(target: Path, content: str, *, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite=overwrite, option="--x") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "file").write_text(content)


def _content(target: Path) -> str:
    return (target / "sub" / "file").read_text()


def test_the_folder_appears_only_when_the_block_has_succeeded(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target, overwrite=False, option="--x") as scratch:
        (scratch / "file").write_text("a")
        assert not target.exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    _make(target, "old")

    def fail_half_way() -> None:
        with atomic_directory(target, overwrite=True, option="--x") as scratch:
            (scratch / "half").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert _content(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["while writing", "between the renames", "before the old one is deleted"])
def test_what_a_killed_run_left_is_cleared_and_nothing_is_lost(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "out"
    _make(target, "old")
    partial, replaced = tmp_path / ".out.partial", tmp_path / ".out.replaced"
    if moment == "while writing":
        partial.mkdir()
        (partial / "junk").write_text("half")
    elif moment == "between the renames":
        target.rename(replaced)
        partial.mkdir()
    else:
        target.rename(replaced)
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "file").write_text("newer")
    expected = "newer" if moment.startswith("before") else "old"
    with pytest.raises(UserError, match="already exists"):
        _make(target, "new")
    assert _content(target) == expected
    _make(target, "new", overwrite=True)
    assert _content(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _make(tmp_path / "out", "new")
    assert _content(tmp_path / "out") == "new"


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail_half_way() -> None:
        with atomic_file(target) as partial:
            partial.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert target.read_text() == "old"
    with atomic_file(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_below_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--x .*file is not a writable folder"):
        require_creatable(tmp_path / "file" / "a" / "b", option="--x")
    require_creatable(tmp_path / "new" / "deeper", option="--x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
