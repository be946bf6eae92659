"""Parts of a GGUF file are found without importing their packages, joined in order, and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from scripts.base_models.packaged_gguf import PACKAGED, PackagedGguf, find_parts, join_parts
from stages.errors import UserError

CONTENT = (b"first, ", b"second, ", b"third")


def packaged(sha256: str) -> PackagedGguf:
    modules = tuple(f"carried_part{part}" for part in (1, 2, 3))
    return PackagedGguf(modules=modules, file="data/*.bin", sha256=sha256, install="pip install carried==1")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install three packages that make up the source "carried"; importing one would fail."""
    for part, content in zip((1, 2, 3), CONTENT, strict=True):
        data = tmp_path / "site" / f"carried_part{part}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
        (data / f"part{part}.bin").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    sha256 = hashlib.sha256(b"".join(CONTENT)).hexdigest()
    monkeypatch.setitem(PACKAGED, "carried", packaged(sha256))
    return tmp_path / "site"


def test_parts_are_joined_in_order(installed: Path, tmp_path: Path) -> None:
    assert [part.name for part in find_parts("carried")] == ["part1.bin", "part2.bin", "part3.bin"]
    join_parts("carried", tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == b"first, second, third"


def test_a_missing_part_is_named_with_the_fix(installed: Path) -> None:
    (installed / "carried_part2" / "data" / "part2.bin").unlink()
    with pytest.raises(UserError, match=r"--source carried needs .*: pip install carried==1"):
        find_parts("carried")


def test_other_content_is_refused(installed: Path, tmp_path: Path) -> None:
    (installed / "carried_part3" / "data" / "part3.bin").write_bytes(b"other")
    with pytest.raises(UserError, match=r"hold another file; pip install carried==1"):
        join_parts("carried", tmp_path / "whole.gguf")


@pytest.mark.parametrize("source", PACKAGED)
def test_every_packaged_model_names_its_packages(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"--source {source} needs .*: pip install .*=="):
        find_parts(source)
