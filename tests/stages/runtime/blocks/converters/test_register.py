"""Nodes that a module would compute wrongly are refused, and newer versions of operators are taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.stages.runtime.blocks.converters.test_attention import group_query, multi_head
from tests.stages.runtime.blocks.one_node import OneNode, assert_same

HIDDEN = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
GAIN = np.ones(12, np.float32)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (replace(group_query(), left_out=frozenset()), "GroupQueryAttention with input 3, 'past_key'"),
        (group_query(qk_output=1), "GroupQueryAttention with qk_output = 1"),
        (multi_head(padding=True), "MultiHeadAttention with input 4, 'key_padding_mask'"),
        (replace(multi_head(), left_out=frozenset({"v"})), "packed query, key and value"),
        (OneNode("LayerNormalization", {"x": HIDDEN, "g": GAIN}, {"axis": 1}, ""), "axis = 1"),
        (OneNode("SimplifiedLayerNormalization", {"x": HIDDEN, "g": GAIN}, {"axis": 1}, ""), "axis = 1"),
        (OneNode("ReduceMean", {"x": HIDDEN}, {"noop_with_empty_axes": 1}, ""), "noop_with_empty_axes = 1"),
        (OneNode("MoE", {"x": HIDDEN}, {"k": 1}), "MoE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_module_computes_is_refused(node: OneNode, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        node.run_torch()


@pytest.mark.parametrize(
    "node",
    [
        OneNode("Reshape", {"x": HIDDEN, "s": np.array([0, -1, 4])}, {}, "", opset=22),
        OneNode("Transpose", {"x": HIDDEN}, {"perm": [2, 0, 1]}, "", opset=23),
        OneNode("Unsqueeze", {"x": HIDDEN, "axes": np.array([1])}, {}, "", opset=24),
        OneNode("Softplus", {"x": HIDDEN}, {}, "", opset=22),
    ],
    ids=lambda node: f"{node.operator}-{node.opset}",
)
def test_versions_newer_than_onnx2torchs_mean_the_same(node: OneNode) -> None:
    assert_same(node)
