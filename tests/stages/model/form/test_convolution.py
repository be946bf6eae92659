"""A Conv written as MatMul computes what ONNX Runtime's Conv does, and its weight is a site."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx_ir.passes.common import RemoveUnusedNodesPass

from stages.model.form.convolution import restore_convolutions, why_no_product, write_convolutions
from stages.model.sites import find_sites
from tests.support.graphs import TinyGraph

Shape = Sequence[int | str]


def convolution(
    weight: Sequence[int], declared: Shape, *, bias: bool = False, opset: int = 21, **attributes: Any
) -> ir.Model:
    generator = np.random.default_rng(0)
    graph = TinyGraph(opset=opset)
    graph.input("x", TensorProto.FLOAT, declared)
    inputs = ["x", graph.constant("kernel", generator.standard_normal(weight).astype(np.float32))]
    if bias:
        inputs.append(graph.constant("bias", generator.standard_normal(weight[0]).astype(np.float32)))
    graph.node("Conv", inputs, ["y"], attributes)
    graph.output("y", TensorProto.FLOAT, ["b", *(f"y{axis}" for axis in range(len(weight) - 1))])
    return graph.model()


def computed(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model).SerializeToString()
    (y,) = ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize(
    ("x", "declared", "weight", "attributes"),
    [
        ((2, 3, 16, 24), ("b", 3, 16, 24), (8, 3, 4, 4), {"strides": [4, 4], "bias": True}),
        ((2, 3, 18, 27), ("b", 3, "h", "w"), (8, 3, 4, 4), {"strides": [4, 4]}),
        ((2, 3, 18, 27), ("b", 3, 18, 27), (8, 3, 4, 4), {"strides": [4, 4], "opset": 13}),
        ((5, 3, 2, 4, 4), ("b", 3, 2, 4, 4), (8, 3, 2, 4, 4), {"strides": [2, 4, 4]}),
        ((2, 3, 5, 8, 9), ("b", 3, "t", "h", "w"), (8, 3, 2, 4, 4), {"strides": [2, 4, 4], "bias": True}),
        ((2, 40, 7, 9), ("b", 40, "h", "w"), (8, 40, 1, 1), {"bias": True}),
        ((2, 40, 11), ("b", 40, "t"), (8, 40, 1), {"bias": True}),
        ((2, 40, 32), ("b", 40, "t"), (8, 40, 5), {"strides": [5], "opset": 11}),
        ((2, 40, 30), ("b", 40, "t"), (8, 40, 3), {"pads": [1, 1], "bias": True}),
        ((2, 40, 31), ("b", 40, "t"), (8, 40, 3), {"pads": [1, 1], "strides": [2]}),
        ((2, 40, 30), ("b", 40, 30), (8, 40, 3), {"pads": [2, 0], "strides": [2]}),
        ((2, 40, 30), ("b", 40, 30), (8, 40, 5), {"auto_pad": "VALID"}),
    ],
)
def test_the_product_is_the_convolution(
    x: Sequence[int], declared: Shape, weight: Sequence[int], attributes: dict[str, Any]
) -> None:
    model = convolution(weight, declared, **attributes)
    numbers = np.random.default_rng(1).standard_normal(x).astype(np.float32)
    expected = computed(model, numbers)
    write_convolutions(model)
    (site,) = find_sites(model)
    assert (site.name, site.weight) == ("y/Conv", "kernel")
    assert (site.in_features, site.out_features) == (prod(weight[1:]), weight[0])
    found = computed(model, numbers)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    restore_convolutions(model)
    RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in model.graph] == ["Conv"]
    np.testing.assert_array_equal(computed(model, numbers), expected)


@pytest.mark.parametrize(
    ("weight", "attributes", "reason"),
    [
        ((8, 3, 4, 4), {"strides": [2, 2]}, "overlap"),
        ((8, 3, 4, 4), {"strides": [4, 4], "pads": [1, 1, 1, 1]}, "overlap"),
        ((8, 40, 9), {}, "overlap"),
        ((8, 1, 4, 4), {"strides": [4, 4], "group": 8}, "groups"),
        ((8, 40, 3), {"dilations": [2]}, "dilations"),
        ((8, 40, 3), {"auto_pad": "SAME_UPPER"}, "auto_pad"),
        ((8, 3, 1, 1), {}, "fewer than 32"),
    ],
)
def test_other_convolutions_stay_and_the_reason_is_told(
    weight: Sequence[int], attributes: dict[str, Any], reason: str
) -> None:
    model = convolution(
        weight, ["b", weight[1] * attributes.get("group", 1), *("s",) * (len(weight) - 2)], **attributes
    )
    assert reason in why_no_product(model.graph[0])
    write_convolutions(model)
    assert [node.op_type for node in model.graph] == ["Conv"]
