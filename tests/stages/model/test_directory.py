"""Check which folders hold a model, and which of its key/value caches slide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import locate_model, logits_among
from tests.support.graphs import MICROSOFT, TinyGraph


def attention_model(folder: Path, attributes: dict[str, int], *, configured: bool) -> None:
    """One GroupQueryAttention with a window of 8."""
    graph = TinyGraph()
    names = ["qkv", "past_key", "past_value", "lengths", "total"]
    for name in names:
        graph.input(name, TensorProto.FLOAT, ["b", "n"])
    graph.node(
        "GroupQueryAttention",
        ["qkv", "", "", *names[1:]],
        ["y"],
        {"num_heads": 2, "kv_num_heads": 1, "local_window_size": 8} | attributes,
        MICROSOFT,
    )
    graph.output("y", TensorProto.FLOAT, ["b", "n"])
    graph.save(folder)
    decoder = {"filename": "model.onnx"} | ({"sliding_window": {"window_size": 8}} if configured else {})
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))


@pytest.mark.parametrize(
    ("attributes", "configured", "expected"),
    [
        ({"sliding_window_cache": 1}, True, {"past_key": 8, "past_value": 8}),
        # A window without a sliding cache: the past starts empty, whatever genai_config.json tells the runtime.
        ({"sliding_window_cache": 0}, True, {}),
        ({}, True, {}),
        ({"sliding_window_cache": 1}, False, {}),
    ],
)
def test_caches_that_slide(
    tmp_path: Path, attributes: dict[str, int], configured: bool, expected: dict[str, int]
) -> None:
    attention_model(tmp_path, attributes, configured=configured)
    assert locate_model(tmp_path).windowed_caches == expected


def test_a_file_that_is_no_model_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    attention_model(tmp_path, {}, configured=True)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    assert locate_model(tmp_path).windowed_caches == {}


def test_missing_paths_and_ambiguous_folders(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="does not exist"):
        locate_model(tmp_path / "nothing")
    with pytest.raises(GraphError, match=r"no \.onnx file"):
        locate_model(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(GraphError, match=r"a\.onnx, b\.onnx"):
        locate_model(tmp_path)
    assert locate_model(tmp_path / "b.onnx").onnx_file.name == "b.onnx"


@pytest.mark.parametrize(
    ("outputs", "logits"),
    [
        (["present.0.key", "logits"], "logits"),
        (["logits_Q8", "present.0.key"], "logits_Q8"),
        (["logits_mask", "logits"], "logits"),
        (["logits_a", "logits_b"], None),
        (["last_hidden_state"], None),
    ],
)
def test_the_output_that_holds_the_logits(outputs: list[str], logits: str | None) -> None:
    if logits is None:
        with pytest.raises(GraphError, match=r"model\.onnx has no output 'logits'; pass a text decoder"):
            logits_among(outputs, Path("model.onnx"))
    else:
        assert logits_among(outputs, Path("model.onnx")) == logits
