"""Check that genai_config.json is read whole, and that a damaged one is told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.errors import GraphError
from stages.model.genai_config import component_files, end_tokens_of, read_genai_config, read_genai_model


def written(folder: Path, content: object) -> Path:
    (folder / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_what_is_not_known_here_is_kept_and_passed_over(tmp_path: Path) -> None:
    decoder = {"filename": "model.onnx", "head_size": 16, "sliding_window": {"window_size": 8}, "other": 1}
    content = {"model": {"type": "llama", "vocab_size": 300, "decoder": decoder}, "search": {}}
    assert read_genai_config(written(tmp_path, content)) == content
    model = read_genai_model(tmp_path)
    assert model.decoder.window_size == 8
    assert (model.vocab_size, model.context_length) == (300, None)
    assert (model.decoder.filename, model.decoder.head_size) == ("model.onnx", 16)
    assert "sliding_window" in model.decoder.model_fields_set


def test_components_are_whatever_names_a_graph() -> None:
    stages = [{"embeddings": {"filename": "e.onnx"}}, {"context": {"filename": "c.onnx", "inputs": []}}]
    model = {
        "type": "x",
        "decoder": {"pipeline": stages},
        "vision": {"filename": "v.onnx", "config_filename": "processor.json", "adapter_filename": "a.onnx"},
    }
    assert component_files({"model": model}) == {
        "embeddings": "e.onnx", "context": "c.onnx", "vision": "v.onnx", "vision_adapter": "a.onnx",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "has the whole wrong"),
        ({"model": {"vocab_size": 0}}, r"has model\.vocab_size wrong"),
        ({"model": {"vocab_size": "300"}}, r"has model\.vocab_size wrong"),
        ({"model": {"decoder": {"filename": "../model.onnx"}}}, r"filename '\.\./model\.onnx', which isn't in its"),
        ({"model": {"vision": {"filename": "../v.onnx"}}}, r"filename '\.\./v\.onnx', which isn't in its"),
        ({"model": {"decoder": {"filename": "/model.onnx"}}}, r"filename '/model\.onnx', which isn't in its folder"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, content: object, words: str) -> None:
    written(tmp_path, content)
    for read in (read_genai_config, read_genai_model):
        with pytest.raises(GraphError, match=words):
            read(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "genai_config.json").write_bytes(content)
    with pytest.raises(GraphError, match=r"genai_config\.json can't be read as JSON"):
        read_genai_model(tmp_path)


@pytest.mark.parametrize(
    ("model", "tokens"), [({}, []), ({"eos_token_id": 2}, [2]), ({"eos_token_id": [2, 5]}, [2, 5])]
)
def test_one_token_or_several_end_answers(model: dict[str, object], tokens: list[int]) -> None:
    assert end_tokens_of({"model": model}) == set(tokens)
    assert end_tokens_of({}) == set()
