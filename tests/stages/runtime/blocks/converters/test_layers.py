"""Norms, activations, Split, ReduceMean and a site's Linear against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.runtime.blocks.converters.layers import Linear
from tests.stages.runtime.blocks.one_node import OneNode, assert_same

_RNG = np.random.default_rng(0)
_HIDDEN = (3 * _RNG.standard_normal((2, 5, 12))).astype(np.float32)
_GAIN = _RNG.uniform(0.5, 2, 12).astype(np.float32)
_BIAS = _RNG.standard_normal(12).astype(np.float32)
_PLACES = np.array([[3, 0], [1, 11], [2, 5], [0, 1], [7, 6]])


@pytest.mark.parametrize(
    "node",
    [
        OneNode("SimplifiedLayerNormalization", {"x": _HIDDEN, "g": _GAIN}, {"epsilon": 0.5, "axis": -1}, ""),
        OneNode("SimplifiedLayerNormalization", {"x": _HIDDEN, "g": _GAIN}, {"stash_type": 1}, ""),
        OneNode("RMSNormalization", {"x": _HIDDEN, "g": _GAIN}, {"epsilon": 0.5}, "", opset=23),
        OneNode("LayerNormalization", {"x": _HIDDEN, "g": _GAIN, "b": _BIAS}, {"epsilon": 0.5}, ""),
        OneNode("LayerNormalization", {"x": _HIDDEN, "g": _GAIN}, {}, ""),
        OneNode("Gelu", {"x": _HIDDEN}, {"approximate": "tanh"}, ""),
        OneNode("Gelu", {"x": _HIDDEN}, {}, ""),
        OneNode("Gelu", {"x": _HIDDEN}),
        OneNode("FastGelu", {"x": _HIDDEN}),
        OneNode("FastGelu", {"x": _HIDDEN, "b": _BIAS}),
        OneNode("BiasGelu", {"x": _HIDDEN, "b": _BIAS}),
        OneNode("QuickGelu", {"x": _HIDDEN}),
        OneNode("QuickGelu", {"x": _HIDDEN}, {"alpha": 1.0}),
        OneNode("Split", {"x": _HIDDEN, "s": np.array([2, 7, 3])}, {"axis": -1}, "", outputs=("a", "b", "c")),
        OneNode("Split", {"x": _HIDDEN}, {"axis": 1, "num_outputs": 3}, "", outputs=("a", "b", "c")),
        OneNode("LpNormalization", {"x": _HIDDEN}, {"axis": -1, "p": 2}, ""),
        OneNode("LpNormalization", {"x": _HIDDEN}, {"axis": 1, "p": 1}, "", opset=22),
        OneNode("GatedAdd", {"x": _HIDDEN, "other": _HIDDEN[:, ::-1].copy(), "gate": _HIDDEN[..., :1].copy()}),
        OneNode("ReduceMean", {"x": _HIDDEN, "axes": np.array([-1])}, {"keepdims": 1}, ""),
        OneNode("ReduceMean", {"x": _HIDDEN}, {"keepdims": 0}, ""),
        OneNode("ScatterElements", {"x": _HIDDEN[0], "i": _PLACES, "u": _HIDDEN[1, :, :2]}, {"axis": 1}, ""),
        OneNode("ReduceMean", {"x": _HIDDEN}, {"axes": [1], "keepdims": 0}, "", opset=17),
    ],
    ids=lambda node: f"{node.domain or 'onnx'}-{node.operator}-{node.opset}-{dict(node.attributes)}",
)
def test_agrees_with_onnxruntime(node: OneNode) -> None:
    assert_same(node)


def test_a_site_is_gemm_with_its_weight_in_rows_of_output_channels() -> None:
    weight = _RNG.standard_normal((7, 12)).astype(np.float32)
    bias = _RNG.standard_normal(7).astype(np.float32)
    gemm = OneNode("Gemm", {"x": _HIDDEN[0], "w": weight, "b": bias}, {"transB": 1, "beta": 0.25}, "")
    found = Linear(0.25)(*(torch.from_numpy(array) for array in (_HIDDEN[0], weight, bias)))
    # 12 products to a sum: float32 rounding of a dozen additions.
    assert np.abs(found.numpy() - gemm.run_onnxruntime()[0]).max() <= 1e-5
