"""Every MatMul and Gemm is a site or is named with the reason why not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper

from stages.graph.rejected import find_rejected
from stages.graph.sites import find_sites
from tests.graphs import TinyGraph

FLOAT = TensorProto.FLOAT
Add = Callable[[TinyGraph], None]


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def _weight_first(graph: TinyGraph) -> None:
    graph.node("MatMul", [graph.constant("w", ones(8, 8)), "x"], ["odd"])


def _rank_three(graph: TinyGraph) -> None:
    graph.node("MatMul", ["x", graph.constant("w", ones(2, 8, 4))], ["odd"])


def _two_activations(graph: TinyGraph) -> None:
    graph.node("MatMul", ["x", graph.node("Transpose", ["x"], ["x_t"])], ["odd"])


def _computed(graph: TinyGraph) -> None:
    graph.node("Cast", [graph.constant("w", ones(8, 4, dtype=np.float16))], ["wide"], {"to": FLOAT})
    graph.node("MatMul", ["x", "wide"], ["odd"])


def _constant_node(graph: TinyGraph) -> None:
    tensor = helper.make_tensor("w", FLOAT, [8, 4], np.ones(32))
    graph.nodes.append(helper.make_node("Constant", [], ["w"], value=tensor))
    graph.node("MatMul", ["x", "w"], ["odd"])


def _quantized(graph: TinyGraph) -> None:
    codes, scale = graph.constant("codes", ones(8, 4, dtype=np.int8)), graph.constant("scale", np.float32(1))
    graph.node("MatMul", ["x", graph.node("DequantizeLinear", [codes, scale], ["w"])], ["odd"])


def _double(graph: TinyGraph) -> None:
    graph.node("Cast", ["x"], ["wide"], {"to": TensorProto.DOUBLE})
    graph.node("MatMul", ["wide", graph.constant("w", ones(8, 4, dtype=np.float64))], ["odd"])


def _scaled(graph: TinyGraph) -> None:
    graph.node("Gemm", ["x", graph.constant("w", ones(8, 4))], ["odd"], {"alpha": 0.5})


def _transposed(graph: TinyGraph) -> None:
    graph.node("Gemm", ["x", graph.constant("w", ones(6, 4))], ["odd"], {"transA": 1, "alpha": 2.0})


def _in_subgraph(graph: TinyGraph) -> None:
    branches = {}
    for name in ("then", "else"):
        inner = TinyGraph()
        inner.linear("x", ones(8, 4), "odd" if name == "then" else "other")
        inner.output(inner.nodes[0].output[0], FLOAT, ["t", 4])
        branches[f"{name}_branch"] = helper.make_graph(inner.nodes, name, [], inner.outputs, inner.initializers)
    graph.input("flag", TensorProto.BOOL, [])
    graph.nodes.append(helper.make_node("If", ["flag"], ["chosen"], name="choice", **branches))


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (_weight_first, "its weight is the first input"),
        (_rank_three, "its weight has rank 3"),
        (_two_activations, "it multiplies two activations"),
        (_computed, "its weight is no initializer but computed in the graph (Cast)"),
        (_constant_node, "its weight is no initializer but computed in the graph (Constant)"),
        (_quantized, "its weight is quantized already"),
        (_double, "its weight is DOUBLE"),
        (_scaled, "its Gemm scales the product (alpha)"),
        (_transposed, "its Gemm transposes the activation (transA); its Gemm scales the product (alpha)"),
        (_in_subgraph, "it lies in a subgraph"),
    ],
)
def test_the_reason_is_said(add: Add, reason: str) -> None:
    graph = TinyGraph()
    graph.input("x", FLOAT, [6, 8])
    graph.linear("x", ones(8, 5), "y")
    graph.output("y", FLOAT, [6, 5])
    add(graph)
    model = graph.model()
    assert [site.output for site in find_sites(model)] == ["y"]
    rejected = dict(find_rejected(model))
    assert rejected.pop("odd/Gemm" if "Gemm" in reason else "odd/MatMul") == reason
    # The other branch of the If.
    assert set(rejected) == ({"other/MatMul"} if add is _in_subgraph else set())


def test_a_node_without_a_name_goes_by_its_output() -> None:
    graph = TinyGraph()
    graph.input("x", FLOAT, [6, 8])
    _rank_three(graph)
    graph.nodes[-1].name = ""
    assert find_rejected(graph.model()) == (("odd", "its weight has rank 3"),)
