"""The fixtures are the graphs that other tests take them for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx


def op_counts(folder: Path) -> Counter[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def input_names(folder: Path) -> set[str]:
    return {value.name for value in onnx.load(folder / "model.onnx", load_external_data=False).graph.input}


def test_the_cpu_model_packs_qkv_and_rotates_inside_attention(tiny_model: Path) -> None:
    counts = op_counts(tiny_model)
    # qkv, o, gate, up, down for each of two layers, and lm_head.
    assert counts["MatMul"] == 11
    assert counts["GroupQueryAttention"] == 2
    assert counts["RotaryEmbedding"] == 0
    assert "position_ids" not in input_names(tiny_model)


def test_the_dml_model_keeps_qkv_apart_and_asks_for_positions(tiny_model_dml: Path) -> None:
    counts = op_counts(tiny_model_dml)
    assert counts["MatMul"] == 15
    assert counts["RotaryEmbedding"] == 4
    assert "position_ids" in input_names(tiny_model_dml)


def test_both_are_whole_genai_folders(tiny_model: Path, tiny_model_dml: Path) -> None:
    for folder in (tiny_model, tiny_model_dml):
        names = {path.name for path in folder.iterdir()}
        assert {"model.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
