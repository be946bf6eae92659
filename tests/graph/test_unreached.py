"""Weights that no MatMul reads are named with their reader, size and share; what quantization reaches is not."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from stages.graph.unreached import find_unreached, unreached_warning
from stages.records import UnreachedWeights
from tests.graphs import MICROSOFT, TinyGraph

FLOAT = TensorProto.FLOAT


def matrix(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def start() -> TinyGraph:
    """input_ids -> a table of 100 x 16 -> h -> one ordinary site of 16 x 16: 6400 and 1024 bytes."""
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    graph.node("Gather", [graph.constant("table", matrix(100, 16)), "input_ids"], ["h"])
    graph.linear("h", matrix(16, 16), "y")
    graph.output("y", FLOAT, ["t", 16])
    return graph


def unreached(graph: TinyGraph, *quantized: str) -> dict[str, UnreachedWeights]:
    return {part.op_type: part for part in find_unreached(graph.model(), quantized)}


def test_the_embedding_is_named_until_it_is_quantized() -> None:
    found = unreached(start())
    assert list(found) == ["Gather"]
    assert found["Gather"].weights == ("table",)
    assert found["Gather"].num_bytes == 6400
    assert found["Gather"].share == pytest.approx(6400 / 7424)
    assert "--gather_quantize_axis" in found["Gather"].reason
    assert unreached(start(), "table") == {}


def test_tables_of_rotations_are_no_weights() -> None:
    graph = start()
    graph.input("positions", TensorProto.INT64, ["b", "t"])
    graph.input("q", FLOAT, ["b", "t", 16])
    tables = [graph.constant(name, matrix(512, 8)) for name in ("cos_cache", "sin_cache")]
    graph.node("RotaryEmbedding", ["q", "positions", *tables], ["turned"], domain=MICROSOFT)
    graph.output("turned", FLOAT, ["b", "t", 16])
    assert list(unreached(graph)) == ["Gather"]
    # A node that rotates nothing keeps what it reads.
    graph.node("Conv", ["kernel_input", "cos_cache"], ["convolved"])
    assert unreached(graph)["Conv"].weights == ("cos_cache",)


def test_a_tied_embedding_is_found_behind_its_transpose() -> None:
    graph = TinyGraph()
    graph.input("input_ids", TensorProto.INT64, ["t"])
    graph.constant("tied", matrix(16, 100))
    graph.node("Transpose", ["tied"], ["rows"], {"perm": [1, 0]})
    graph.node("MatMul", [graph.node("Gather", ["rows", "input_ids"], ["h"]), "tied"], ["logits"])
    graph.output("logits", FLOAT, ["t", 100])
    assert unreached(graph)["Gather"].weights == ("tied",)
    # Read by nothing but MatMuls, it is the plan's.
    graph.nodes = [node for node in graph.nodes if node.op_type == "MatMul"]
    graph.input("h", FLOAT, ["t", 16])
    assert unreached(graph) == {}


def test_experts_are_summed_over_all_nodes_and_say_what_to_do() -> None:
    graph = start()
    for layer in range(2):
        fc1, fc2 = graph.constant(f"{layer}.fc1", matrix(4, 32, 16)), graph.constant(f"{layer}.fc2", matrix(4, 16, 32))
        graph.linear("y", matrix(16, 4), f"{layer}.router")
        inputs = ["y", f"{layer}.router", fc1, graph.constant(f"{layer}.bias", matrix(4, 32)), fc2]
        graph.output(graph.node("MoE", inputs, [f"{layer}.mixed"], {"k": 2}, MICROSOFT), FLOAT, ["t", 16])
    found = unreached(graph)["MoE"]
    assert found.weights == ("0.fc1", "0.fc2", "0.bias", "1.fc1", "1.fc2", "1.bias")
    assert found.num_bytes == 2 * 4 * (4 * 32 * 16 * 2 + 4 * 32)
    assert "moe_quant_type=int4" in found.reason
    line = unreached_warning(tuple(unreached(graph).values()), quantized=1, routers=2)
    assert line.startswith("MatMuls that are quantized: 1; routers of experts kept: 2; kept as it is: MoE: 0.fc1")
    assert "and 5 more" in line
    assert "table" not in line
    assert "\n" not in line


def test_experts_that_a_gather_chooses_are_not_taken_for_an_embedding() -> None:
    graph = start()
    chosen = graph.input("chosen", TensorProto.INT64, ["t"])
    graph.node("Gather", [graph.constant("experts", matrix(4, 16, 64)), chosen], ["weights"])
    graph.output("weights", FLOAT, ["t", 16, 64])
    both = find_unreached(graph.model(), ())
    assert {part.weights for part in both} == {("table",), ("experts",)}
    line = unreached_warning(both, quantized=1, routers=0)
    assert "kept as it is: Gather: experts" in line
    assert "table" not in line


def test_quantized_experts_are_said_to_be_so() -> None:
    graph = start()
    codes = graph.constant("codes", matrix(4, 32, 8, dtype=np.uint8))
    scales = graph.constant("scales", matrix(4, 32, 1))
    inputs = ["y", graph.linear("y", matrix(16, 4), "router"), codes, scales]
    graph.output(graph.node("QMoE", inputs, ["mixed"], {"k": 2}, MICROSOFT), FLOAT, ["t", 16])
    found = unreached(graph)["QMoE"]
    assert found.weights == ("codes", "scales")
    assert found.reason == "quantized already"
    assert "kept as it is: QMoE: codes" in unreached_warning((found,), quantized=1, routers=1)


def test_other_readers_are_named_from_one_percent_and_warned_of_from_five() -> None:
    graph = start()
    graph.node("Unsqueeze", ["y", graph.constant("axes", np.array([0], np.int64))], ["batch"])
    graph.output(graph.node("Conv", ["batch", graph.constant("kernel", matrix(16, 1, 3))], ["z"]), FLOAT, None)
    found = unreached(graph)["Conv"]
    assert found.share == pytest.approx(192 / (7424 + 8 + 192))
    assert unreached_warning((found,), quantized=1, routers=0) == ""
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name != "kernel"]
    graph.constant("kernel", matrix(16, 1, 30))
    found = unreached(graph)["Conv"]
    assert found.in_words in unreached_warning((found,), quantized=1, routers=0)
    assert "only weights of MatMul and Gemm are quantized" in found.in_words
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name != "kernel"]
    graph.constant("kernel", matrix(16, 1, 1))
    assert "Conv" not in unreached(graph)


def test_vectors_and_integers_are_no_matrices() -> None:
    graph = start()
    graph.node("Mul", ["y", graph.constant("gain", matrix(16))], ["scaled"])
    graph.node("Gather", [graph.constant("lookup", matrix(100, 16, dtype=np.int64)), "input_ids"], ["numbers"])
    graph.output("scaled", FLOAT, ["t", 16])
    graph.output("numbers", TensorProto.INT64, ["t", 16])
    assert [part.weights for part in find_unreached(graph.model(), ())] == [("table",)]
