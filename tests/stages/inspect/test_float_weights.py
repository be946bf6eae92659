"""Tensors that aren't quantized, by their readers, and Muls that apply input scales."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from stages.inspect.float_weights import find_input_scales, find_unquantized, general_kind, is_float
from tests.support.graphs import TinyGraph

K, N = 8, 6


def graph_of_x() -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [2, K])
    graph.output("y", TensorProto.FLOAT, None)
    return graph


@pytest.mark.parametrize(
    "node",
    [
        "/model/layers.3/mlp/experts.7/up_proj/MatMul",
        "/model/layers.0/mlp/experts.1/up_proj/MatMul_Q4",
        "/model/layers.12/mlp/experts.0/up_proj_DQ",
    ],
)
def test_the_same_place_in_every_layer_is_one_kind(node: str) -> None:
    assert general_kind(node) == "mlp/experts.*/up_proj"


def test_tensors_are_grouped_by_reader_kind_and_type() -> None:
    graph = graph_of_x()
    for layer in range(2):
        weight = graph.constant(f"w{layer}", np.zeros((K, K), np.float32))
        swapped = graph.node("Transpose", [weight], [f"swapped{layer}"], {"perm": [1, 0]})
        graph.node("MatMul", ["x" if layer == 0 else "h0", swapped], [f"h{layer}"])
        graph.nodes[-1].name = f"/model/layers.{layer}/mlp/up_proj/MatMul"
    graph.node("Add", ["h1", graph.constant("bias", np.zeros(K, np.float32))], ["y"])
    graph.constant("unread", np.zeros((3, 3), np.int64))
    graph.constant("codes", np.zeros((K, K), np.int8))
    found = find_unquantized(graph.model(), {"codes"})
    assert [(each.reader, each.kind, each.type, each.count, each.bytes) for each in found] == [
        ("MatMul", "mlp/up_proj", "FLOAT", 2, 2 * K * K * 4),
        ("", "read by no node", "INT64", 1, 9 * 8),
        ("Add", "vectors and scalars", "FLOAT", 1, K * 4),
    ]
    assert [is_float(each) for each in found] == [True, False, True]


def test_a_mul_before_quantized_matmuls_is_an_input_scale() -> None:
    graph = graph_of_x()
    scaled = graph.node("Mul", ["x", graph.constant("scale", np.ones((1, K), np.float32))], ["scaled"])
    outputs = [graph.linear(scaled, np.zeros((K, N), np.float32), name) for name in ("a", "b")]
    graph.node("Add", outputs, ["y"])
    (found,) = find_input_scales(graph.model(), {"a/MatMul", "b/MatMul"})
    assert (found.node, found.channels, found.readers) == ("scaled/Mul", K, ("a/MatMul", "b/MatMul"))
    assert find_input_scales(graph.model(), {"a/MatMul"}) == ()


def test_the_gain_of_a_norm_in_small_nodes_is_no_input_scale() -> None:
    graph = graph_of_x()
    square = graph.node("Mul", ["x", "x"], ["square"])
    mean = graph.node("ReduceMean", [square, graph.constant("axes", np.array([-1]))], ["mean"])
    normal = graph.node("Mul", ["x", graph.node("Reciprocal", [graph.node("Sqrt", [mean], ["root"])], ["r"])], ["n"])
    gained = graph.node("Mul", [normal, graph.constant("gain", np.ones(K, np.float32))], ["gained"])
    graph.linear(gained, np.zeros((K, N), np.float32), "y")
    assert find_input_scales(graph.model(), {"y/MatMul"}) == ()
