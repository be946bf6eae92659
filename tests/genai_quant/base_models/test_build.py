"""Sources are understood or refused in words, and a failed build leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime_genai
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from export.card.record import hub_name_of, licence_of
from genai_quant.base_models.build import BaseModel, build, write_card
from genai_quant.base_models.checkpoints import (
    FolderCheckpoint,
    GgufCheckpoint,
    HubCheckpoint,
    dequantize_gguf,
    download,
    find_checkpoint,
)
from genai_quant.base_models.options import BaseModelConfig
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
    with pytest.raises(UserError, match=f"SOURCE {source} does not exist"):
        find_checkpoint(source)
    with pytest.raises(UserError, match=r"SOURCE smolm2 does not exist; did you mean smollm2\?"):
        find_checkpoint("smolm2")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        find_checkpoint(str(tmp_path))


def test_without_the_builder_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"onnxruntime-genai, which isn't installed: pip install \"genai-quant\[genai\]"
    ):
        list(build(BaseModelConfig(source="smollm2", output=tmp_path / "out")))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("offline"), "the Hugging Face hub can't be reached, .*; check the network, or pass a"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set and the hub's cache doesn't hold it; check"),
        (ValueError("odd"), r"\(ValueError: odd\)\.$"),
    ],
)
def test_a_hub_that_gives_nothing_is_named(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    # A port that nothing listens on answers at once.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("genai_quant.base_models.checkpoints.snapshot_download", refuse)
    with pytest.raises(UserError, match=f"SOURCE owner/name can't be downloaded .*{reason}"):
        download("owner/name")


def test_pickled_weights_are_taken_only_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[list[str]] = []

    def snapshot(_: str, ignore_patterns: list[str]) -> str:
        left_out.append(ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr("genai_quant.base_models.checkpoints.snapshot_download", snapshot)
    assert download("owner/name") == tmp_path
    (tmp_path / "model.safetensors").touch()
    download("owner/name")
    assert ["*.bin" in each for each in left_out] == [True, False, True]


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(b"GGUF, but not really")
    with pytest.raises(UserError, match=r"bad\.gguf can't be read as GGUF"):
        dequantize_gguf(gguf, tmp_path / "out", keep_grid=False)


@pytest.mark.slow
def test_a_folder_becomes_a_genai_model(tiny_hf: Path, tmp_path: Path) -> None:
    output = tmp_path / "models" / "tiny"
    (built,) = build(BaseModelConfig(source=str(tiny_hf), output=output))
    assert isinstance(built.record, BaseModel)
    assert built.record.precision == "fp32"
    assert built.record.bytes == sum(path.stat().st_size for path in output.glob("model.onnx*"))
    assert locate_model(output).kv_heads == 2
    # Not the commit of the repository around the builder's package, such as this one.
    made_by = onnx.load(output / "model.onnx", load_external_data=False).producer_version
    assert made_by == f"{onnxruntime_genai.__version__}+{onnxruntime_genai.__commit__[:7]}"
    assert not (output / "README.md").exists(), "nothing is known of the checkpoint"
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]
    with pytest.raises(UserError, match=r"OUTPUT .* already exists"):
        list(build(BaseModelConfig(source=str(tiny_hf), output=output)))


@pytest.mark.thorough
@pytest.mark.slow
def test_a_failed_build_shows_the_builders_output_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "no_such_model"}), encoding="utf-8")
    with pytest.raises(UserError, match="builder failed on SOURCE"):
        list(build(BaseModelConfig(source=str(source), output=tmp_path / "out")))
    assert "no_such_model" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_card_of_a_base_names_the_hubs_model_and_its_licence(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "base"
    checkpoint.mkdir()
    output.mkdir()
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    write_card(checkpoint, output, "some/model", "dequantized from a GGUF file")
    assert hub_name_of(output) == "some/model"
    assert hub_name_of(Path("hub/models--some--model/snapshots/0123abc")) == "some/model"
    assert licence_of(output / "README.md") == {"license": "apache-2.0"}
    assert "\nWeights: dequantized from a GGUF file.\n" in (output / "README.md").read_text(encoding="utf-8")
