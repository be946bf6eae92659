"""Names and paths that Windows takes, judged with pathlib's pure paths: no Windows is needed."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath, PureWindowsPath

import pytest

from stages.system.paths import extended, file_name, shell_line, sibling_folder, split_line

_LONG = "model." * 60


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("model.layers.0.attn", "model.layers.0.attn"),
        ("awq_full-b32.", "awq_full-b32"),
        ("...", "_"),
        ("", "_"),
        ("con", "_con"),
        ("COM1.tar", "_COM1.tar"),
        ("lpt9", "_lpt9"),
        ("console", "console"),
        ("com10", "com10"),
    ],
)
def test_names(words: str, name: str) -> None:
    assert file_name(words) == name


@pytest.mark.parametrize("words", ["nul", "aux.safetensors", "Prn.x.y", "model", _LONG, "com0"])
def test_windows_takes_the_names_as_they_are(words: str) -> None:
    name = file_name(words)
    path = PureWindowsPath("C:/models", name)
    stem = path.name.partition(".")[0].upper()
    assert path.name == name
    assert stem not in {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}
    assert not set(name) & set('<>:"/\\|?*')
    assert name == name.rstrip(". ")
    assert len(name) <= 120


def test_long_names_stay_different() -> None:
    assert file_name(_LONG + "a") != file_name(_LONG + "b")
    assert file_name(_LONG + "a") == file_name(_LONG + "a")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (PureWindowsPath(r"C:\models\base"), r"C:\models\base.weights"),
        (PureWindowsPath(r"\\server\share\models\base"), r"\\server\share\models\base.weights"),
        (PureWindowsPath(r"C:\models\Llama-3.2"), r"C:\models\Llama-3.2.weights"),
        (PurePosixPath("/models/base"), "/models/base.weights"),
    ],
)
def test_sibling_folders(folder: PureWindowsPath | PurePosixPath, expected: str) -> None:
    assert str(sibling_folder(folder, ".weights")) == expected


@pytest.mark.parametrize("root", [PureWindowsPath("C:/"), PureWindowsPath("//server/share/"), PurePosixPath("/")])
def test_a_disk_has_no_sibling(root: PureWindowsPath | PurePosixPath) -> None:
    with pytest.raises(ValueError, match="is the root of a disk"):
        sibling_folder(root, ".weights")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (r"C:\models\base", r"C:\models\base"),
        ("C:\\" + "a" * 120, "\\\\?\\C:\\" + "a" * 120),
        ("\\\\server\\share\\" + "a" * 120, "\\\\?\\UNC\\server\\share\\" + "a" * 120),
        ("\\\\?\\C:\\" + "a" * 120, "\\\\?\\C:\\" + "a" * 120),
    ],
)
def test_long_paths_get_a_prefix(path: str, expected: str) -> None:
    found = extended(PureWindowsPath(path))
    assert str(found) == expected
    assert str(found / "x.safetensors") == expected + "\\x.safetensors"


@pytest.mark.parametrize("length", range(60, 250, 7))
def test_whatever_is_written_inside_fits(length: int) -> None:
    """Without the prefix a file's whole path has fewer than 260 characters."""
    folder = extended(PureWindowsPath("C:\\" + "a" * (length - 3)))
    file = folder / f"embedding.0000.{_LONG[:150]}.safetensors"
    assert str(folder).startswith("\\\\?\\") or len(str(file.with_name(f".{file.name}.partial"))) < 260


def test_lines_for_both_shells() -> None:
    arguments = [
        "python",
        "-m",
        "stages.quantize",
        "--onnx_path=C:\\my models\\base",
        "--layers_8bit=a,b",
        "--plan=it's",
    ]
    assert shlex.split(shell_line(arguments, windows=False)) == arguments
    assert shell_line(arguments, windows=True) == (
        'python -m stages.quantize "--onnx_path=C:\\my models\\base" --layers_8bit=a,b --plan=it\'s'
    )


def test_options_keep_backslashes_only_on_windows() -> None:
    text = r'plan=C:\plans\p.toml layers_8bit="down_proj, lm_head"'
    assert split_line(text, windows=True) == [r"plan=C:\plans\p.toml", "layers_8bit=down_proj, lm_head"]
    assert split_line(text, windows=False) == [r"plan=C:plansp.toml", "layers_8bit=down_proj, lm_head"]
    for line in ("", "target=cuda accuracy_level=1", "exclude='a b' plan=x\\ y", "a=#b"):
        assert split_line(line, windows=False) == shlex.split(line)
