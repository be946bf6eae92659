"""Check that every weight that stays and every skipped MatMul is named with the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper

from stages.model.sites import find_sites, find_skipped_matmuls
from stages.model.unquantized import find_unquantized, unquantized_warning
from stages.records.sites import UnquantizedWeights
from tests.support.graphs import MICROSOFT, TinyGraph

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
    graph.node("MatMul", ["x", graph.node("Neg", [graph.constant("w", ones(8, 4))], ["negative"])], ["odd"])


def _optional(graph: TinyGraph) -> None:
    graph.node("MatMul", ["x", graph.constant(graph.input("w", FLOAT, [8, "rank"]), ones(8, 0))], ["odd"])


def _fused(graph: TinyGraph) -> None:
    graph.node("FusedMatMul", ["x", graph.constant("w", ones(8, 4))], ["odd"], {"alpha": 2.0}, MICROSOFT)


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
        (_computed, "Neg nodes compute its weight; fold constants first"),
        (_optional, "its weight is an input of the graph with a default (as of LoRA), which callers replace"),
        (_fused, "ONNX Runtime's optimizer made a FusedMatMul of it; pass the model from before"),
        (_quantized, "its weight is quantized already"),
        (_double, "its weight is DOUBLE"),
        (_scaled, "its Gemm scales the product (alpha)"),
        (_transposed, "its Gemm transposes the activation (transA); its Gemm scales the product (alpha)"),
        (_in_subgraph, "it lies in a subgraph, as in merged decoders"),
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
    skipped = dict(find_skipped_matmuls(model))
    (name,) = (name for name in skipped if name.startswith("odd/"))
    assert skipped.pop(name).startswith(reason)
    # The other branch of the If.
    assert set(skipped) == ({"other/MatMul"} if add is _in_subgraph else set())


def test_a_node_without_a_name_goes_by_its_output() -> None:
    graph = TinyGraph()
    graph.input("x", FLOAT, [6, 8])
    _rank_three(graph)
    graph.nodes[-1].name = ""
    assert find_skipped_matmuls(graph.model()) == (("odd", "its weight has rank 3"),)


def start() -> TinyGraph:
    """Return input_ids -> a table of 100 x 16 -> h -> one ordinary site of 16 x 16: 6400 and 1024 bytes."""
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    graph.node("Gather", [graph.constant("table", ones(100, 16)), "input_ids"], ["h"])
    graph.linear("h", ones(16, 16), "y")
    graph.output("y", FLOAT, ["t", 16])
    return graph


def unquantized(graph: TinyGraph, *quantized: str) -> dict[str, UnquantizedWeights]:
    return {part.op_type: part for part in find_unquantized(graph.model(), quantized)}


def test_the_embedding_is_named_until_it_is_quantized() -> None:
    found = unquantized(start())
    assert list(found) == ["Gather"]
    assert found["Gather"].weights == ("table",)
    assert found["Gather"].num_bytes == 6400
    assert found["Gather"].share == pytest.approx(6400 / 7424)
    assert "--embedding 4" in found["Gather"].reason
    assert unquantized(start(), "table") == {}


def test_tables_of_rotations_are_no_weights() -> None:
    graph = start()
    graph.input("positions", TensorProto.INT64, ["b", "t"])
    graph.input("q", FLOAT, ["b", "t", 16])
    tables = [graph.constant(name, ones(512, 8)) for name in ("cos_cache", "sin_cache")]
    graph.node("RotaryEmbedding", ["q", "positions", *tables], ["turned"], domain=MICROSOFT)
    graph.output("turned", FLOAT, ["b", "t", 16])
    assert list(unquantized(graph)) == ["Gather"]
    # A node that rotates nothing keeps what it reads.
    graph.node("Conv", ["kernel_input", "cos_cache"], ["convolved"])
    assert unquantized(graph)["Conv"].weights == ("cos_cache",)


def test_a_tied_embedding_is_found_behind_its_transpose() -> None:
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    graph.constant("tied", ones(16, 100))
    graph.node("Transpose", ["tied"], ["rows"], {"perm": [1, 0]})
    graph.node("MatMul", [graph.node("Gather", ["rows", "input_ids"], ["h"]), "tied"], ["logits"])
    graph.output("logits", FLOAT, ["t", 100])
    assert unquantized(graph)["Gather"].weights == ("tied",)
    # Read by nothing but MatMuls, it is a site's weight.
    graph.nodes = [node for node in graph.nodes if node.op_type == "MatMul"]
    graph.input("h", FLOAT, ["t", 16])
    assert unquantized(graph) == {}


def test_experts_are_summed_over_all_nodes_with_the_reason_why_they_stay() -> None:
    graph = start()
    for layer in range(2):
        fc1, fc2 = graph.constant(f"{layer}.fc1", ones(4, 32, 16)), graph.constant(f"{layer}.fc2", ones(4, 16, 32))
        graph.linear("y", ones(16, 4), f"{layer}.router")
        inputs = ["y", f"{layer}.router", fc1, graph.constant(f"{layer}.bias", ones(4, 32)), fc2]
        graph.output(graph.node("MoE", inputs, [f"{layer}.mixed"], {"k": 2}, MICROSOFT), FLOAT, ["t", 16])
    found = unquantized(graph)["MoE"]
    assert found.weights == ("0.fc1", "0.fc2", "1.fc1", "1.fc2")
    assert found.num_bytes == 2 * 4 * (4 * 32 * 16 * 2)
    assert "floating-point experts" in found.reason
    reasons = dict.fromkeys(found.weights, "--experts none")
    assert find_unquantized(graph.model(), (), reasons)[-1].reason == "--experts none"
    line = unquantized_warning(tuple(unquantized(graph).values()), quantized=1, routers=2)
    assert line.startswith("MatMuls that are quantized: 1; routers of experts kept: 2; kept as it is: MoE: 0.fc1")
    assert "and 3 more" in line
    assert "table" not in line
    assert "\n" not in line


def test_experts_that_a_gather_chooses_are_not_taken_for_an_embedding() -> None:
    graph = start()
    chosen = graph.input("chosen", TensorProto.INT64, ["t"])
    graph.node("Gather", [graph.constant("experts", ones(4, 16, 64)), chosen], ["weights"])
    graph.output("weights", FLOAT, ["t", 16, 64])
    both = find_unquantized(graph.model(), ())
    assert {part.weights for part in both} == {("table",), ("experts",)}
    line = unquantized_warning(both, quantized=1, routers=0)
    assert "kept as it is: Gather: experts" in line
    assert "built for cpu, cuda or webgpu, the model has them in MoE nodes" in line
    assert "Gather: table" not in line


def test_quantized_experts_are_said_to_be_so() -> None:
    graph = start()
    codes = graph.constant("codes", ones(4, 32, 8, dtype=np.uint8))
    scales = graph.constant("scales", ones(4, 32, 1))
    inputs = ["y", graph.linear("y", ones(16, 4), "router"), codes, scales]
    graph.output(graph.node("QMoE", inputs, ["mixed"], {"k": 2}, MICROSOFT), FLOAT, ["t", 16])
    found = unquantized(graph)["QMoE"]
    assert found.weights == ("codes", "scales")
    assert found.reason == "quantized already"
    assert "kept as it is: QMoE: codes" in unquantized_warning((found,), quantized=1, routers=1)


def test_other_readers_are_named_from_one_percent_and_warned_of_from_five() -> None:
    graph = start()
    graph.node("Unsqueeze", ["y", graph.constant("axes", np.array([0], np.int64))], ["batch"])
    graph.output(graph.node("Conv", ["batch", graph.constant("kernel", ones(16, 1, 3))], ["z"]), FLOAT, None)
    found = unquantized(graph)["Conv"]
    assert found.share == pytest.approx(192 / (7424 + 8 + 192))
    assert unquantized_warning((found,), quantized=1, routers=0) == ""
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name != "kernel"]
    graph.constant("kernel", ones(16, 1, 30))
    found = unquantized(graph)["Conv"]
    assert found.description in unquantized_warning((found,), quantized=1, routers=0)
    assert "its Conv reads fewer than 32 numbers at a time" in found.description
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name != "kernel"]
    graph.constant("kernel", ones(16, 1, 1))
    assert "Conv" not in unquantized(graph)


def test_vectors_and_integers_are_no_matrices() -> None:
    graph = start()
    graph.node("Mul", ["y", graph.constant("gain", ones(16))], ["scaled"])
    graph.node("Gather", [graph.constant("lookup", ones(100, 16, dtype=np.int64)), "input_ids"], ["numbers"])
    graph.output("scaled", FLOAT, ["t", 16])
    graph.output("numbers", TensorProto.INT64, ["t", 16])
    assert [part.weights for part in find_unquantized(graph.model(), ())] == [("table",)]
