"""The shapes that NvTensorRtRtx would be told, from graphs and configurations."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from onnx import TensorProto

from stages.calibration.trt_profile import DecoderSizes, ShapeProfile, decoder_sizes, sizes_of_config
from stages.errors import UserError
from stages.model.directory import ModelDirectory
from stages.runtime.graph_inputs import InputShapes, inputs_of_graph
from tests.support.graphs import TinyGraph

TOKENS = {"input_ids": ["b", "s"], "attention_mask": ["b", "t"], "position_ids": [3, "b", "s"]}
CACHE = {"past_key_values.0.key": ["b", 2, "past", "kv_cache_dim"], "past_key_values.0.value": ["b", "h", "past", 16]}
SHAPES = InputShapes(kv_heads=8, head_size=64, windowed_caches={"past_key_values.1.key": 32})


def _options(inputs: dict[str, list[int | str]], context_length: int | None = 2048) -> dict[str, str]:
    graph = TinyGraph()
    for name, shape in inputs.items():
        graph.input(name, TensorProto.FLOAT, shape)
    profile = ShapeProfile(batch_size=4, seq_len=512, context_length=context_length, shapes=SHAPES)
    directory = ModelDirectory(folder=Path(), onnx_file=Path("model.onnx"), has_genai_config=False)
    return profile.provider_options(inputs_of_graph(graph.model(), directory))


def test_ranges_of_tokens_masks_and_caches() -> None:
    sliding = {"past_key_values.1.key": ["b", 2, "past", 16], "past.2.conv": ["b", 64, 2]}
    assert _options(TOKENS | CACHE | sliding | {"num_logits_to_keep": []}) == {
        "nv_profile_min_shapes": "input_ids:1x1,attention_mask:1x1,position_ids:3x1x1,"
        "past_key_values.0.key:1x2x0x64,past_key_values.0.value:1x8x0x16,past_key_values.1.key:1x2x32x16,"
        "past.2.conv:1x64x2",
        "nv_profile_opt_shapes": "input_ids:4x512,attention_mask:4x512,position_ids:3x4x512,"
        "past_key_values.0.key:4x2x0x64,past_key_values.0.value:4x8x0x16,past_key_values.1.key:4x2x32x16,"
        "past.2.conv:4x64x2",
        # The mask covers the past too.
        "nv_profile_max_shapes": "input_ids:4x512,attention_mask:4x1024,position_ids:3x4x512,"
        "past_key_values.0.key:4x2x512x64,past_key_values.0.value:4x8x512x16,past_key_values.1.key:4x2x32x16,"
        "past.2.conv:4x64x2",
    }


def test_the_past_ends_where_the_models_context_does() -> None:
    assert _options(CACHE, 600)["nv_profile_max_shapes"].startswith("past_key_values.0.key:4x2x88x64")
    assert _options(CACHE, 512)["nv_profile_max_shapes"].startswith("past_key_values.0.key:4x2x1x64")
    assert _options(CACHE, None)["nv_profile_max_shapes"].startswith("past_key_values.0.key:4x2x512x64")


def _directory(folder: Path, **known: int) -> ModelDirectory:
    return ModelDirectory(folder=folder, onnx_file=folder / "model.onnx", has_genai_config=bool(known), **known)


def test_genai_config_is_asked_first_and_config_json_fills_the_rest(tmp_path: Path) -> None:
    hugging_face = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(hugging_face | {"max_position_embeddings": 8192}))
    directory = _directory(tmp_path, kv_heads=2, context_length=4096)
    found = decoder_sizes(directory, None, trust_remote_code=False)
    assert found == DecoderSizes(kv_heads=2, head_size=64, context_length=4096)


def test_the_folder_of_model_name_goes_before_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for folder, size in ((tmp_path, 32), (tmp_path / "hf", 128)):
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "head_dim": size}))
    directory = _directory(tmp_path)
    assert decoder_sizes(directory, str(tmp_path / "hf"), trust_remote_code=False).head_size == 128
    assert decoder_sizes(directory, None, trust_remote_code=False).head_size == 32


def test_without_any_configuration_nothing_is_known(tmp_path: Path) -> None:
    assert decoder_sizes(_directory(tmp_path), str(tmp_path), trust_remote_code=False) == DecoderSizes()


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json can't be read as JSON"):
        decoder_sizes(_directory(tmp_path), None, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"num_attention_heads": 8, "hidden_size": 512}, DecoderSizes(kv_heads=8, head_size=64)),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 512, "head_dim": 256},
            DecoderSizes(kv_heads=1, head_size=256),
        ),
        (
            {"text_config": {"num_attention_heads": 8, "head_dim": 32, "max_position_embeddings": 99}},
            DecoderSizes(kv_heads=8, head_size=32, context_length=99),
        ),
        ({}, DecoderSizes()),
    ],
)
def test_hugging_face_configurations(config: dict[str, object], sizes: DecoderSizes) -> None:
    assert sizes_of_config(config) == sizes


def test_a_hub_name_is_asked_last_and_its_failure_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(name: str, **_: bool) -> None:
        asked.append(name)
        raise OSError("offline\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    known = _directory(tmp_path, kv_heads=2, head_size=16, context_length=64)
    assert decoder_sizes(known, "owner/model", trust_remote_code=False).head_size == 16
    assert asked == []
    with pytest.raises(UserError, match=r"owner/model has no configuration.*\(OSError: offline and more\); put"):
        decoder_sizes(_directory(tmp_path), "owner/model", trust_remote_code=False)
    assert asked == ["owner/model"]


def test_a_failure_without_words_is_named_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wordless(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", wordless)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"\(TimeoutError\); put the model's config.json"):
        decoder_sizes(_directory(tmp_path), "owner/model", trust_remote_code=False)


def test_without_a_network_the_hub_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"can't be reached, .*no route\); check the network"):
        decoder_sizes(_directory(tmp_path), "owner/model", trust_remote_code=False)
