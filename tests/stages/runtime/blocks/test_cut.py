"""Blocks cut out of graphs that onnxruntime-genai's builder wrote compute what ONNX Runtime computes in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from stages.errors import GraphError
from stages.runtime.blocks.cut import cut_block, find_blocks
from stages.runtime.blocks.decoder import write_out_residuals
from tests.stages.runtime.blocks.blocks import open_model, relative_error
from tests.support.families import FAMILIES, save_random_model
from tests.support.graphs import tiny_decoder
from tests.support.tiny_models import VOCABULARY, build_genai_model

_TOKENS = np.random.default_rng(0).integers(2, VOCABULARY, (2, 40))
_FLOAT32 = 1e-5
"""Sums of at most some hundred terms in another order, through one layer: some dozen units in the last place."""
_FLOAT16 = 5e-3
"""ONNX Runtime rounds every value of the block to float16 (5e-4 each), the module none."""


def test_every_block_of_a_float32_model(tiny_model: Path) -> None:
    opened = open_model(tiny_model)
    assert [block.layer for block in opened.blocks] == [0, 1]
    assert [len(block.sites) for block in opened.blocks] == [5, 5]
    assert opened.blocks[0].stream_out == opened.blocks[1].stream_in
    assert max(relative_error(opened, block, _TOKENS) for block in opened.blocks) < _FLOAT32


def test_every_block_of_a_float16_model_with_positions(tiny_model_dml: Path) -> None:
    opened = open_model(tiny_model_dml)
    assert cut_block(opened.model, opened.blocks[0]).shared == ("position_ids",)
    assert max(relative_error(opened, block, _TOKENS) for block in opened.blocks) < _FLOAT16


@pytest.mark.parametrize("name", ["gemma-2", "gpt-oss", "nemotron", "phi-3.5", "qwen2.5", "qwen3"])
def test_families(name: str, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Soft caps, sliding windows, norms behind each half, LayerNorm, partial rotation, tables behind an If, biases."""
    family = next(family for family in FAMILIES if family.name == name)
    save_random_model(family.config(), family.width, tmp_path / "hf", tiny_tokenizer)
    build_genai_model(tmp_path / "hf", tmp_path / "base")
    opened = open_model(tmp_path / "base")
    errors = {block.layer: relative_error(opened, block, _TOKENS) for block in opened.blocks}
    assert list(errors) == [0, 1, 2, 3]
    assert max(errors.values()) < _FLOAT32, errors


def test_the_cut_reads_none_of_the_sites_weights(tiny_model: Path) -> None:
    opened = open_model(tiny_model)
    block = opened.blocks[1]
    graph = cut_block(opened.model, block)
    weights = {site.weight for site in opened.blocks[0].sites + block.sites}
    assert not weights & set(graph.model.graph.initializers)
    assert [value.name for value in graph.model.graph.inputs] == [block.stream_in, *(site.name for site in block.sites)]


def test_layers_that_are_not_numbered_are_refused() -> None:
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 96), (96, 64)))
    graph = tiny_decoder(up, down, rng)
    with pytest.raises(GraphError, match=r"holds a layer number \(layers.N\)"):
        find_blocks(write_out_residuals(graph.model()))


def test_layers_that_two_values_join_are_refused(tiny_model: Path) -> None:
    """As where a later layer reads an earlier one's key and value."""
    opened = open_model(tiny_model)
    model = opened.model.clone()
    by_name = {node.name: node for node in model.graph}
    early = by_name["/model/layers.0/attn/o_proj/MatMul"].inputs[0]
    late = by_name["/model/layers.1/mlp/down_proj/MatMul"]
    both = ir.node("Add", [late.outputs[0], early], name="join")
    model.graph.insert_after(late, both)
    ir.convenience.replace_all_uses_with(late.outputs[0], both.outputs[0])
    both.replace_input_with(0, late.outputs[0])
    with pytest.raises(GraphError, match="no single residual stream between layers 0 and 1"):
        find_blocks(model)
