"""Check each pattern in the forms that builders give it, and that nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from stages.model.patterns import before_cast, constant_values, is_square, readers, repeated_kv_heads, sole_reader
from stages.model.sites import find_sites
from tests.support.graphs import MICROSOFT, TinyGraph

FLOAT = TensorProto.FLOAT
HIDDEN, EXPERTS = 16, 4


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def routers(graph: TinyGraph) -> list[str]:
    return [site.output for site in find_sites(graph.model()) if site.routes_experts]


def start() -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", FLOAT, ["t", HIDDEN])
    return graph


def moe(graph: TinyGraph, routing: str, op_type: str = "MoE") -> None:
    weights = [graph.constant("fc1", ones(EXPERTS, 32, HIDDEN)), "", graph.constant("fc2", ones(EXPERTS, HIDDEN, 32))]
    graph.node(op_type, ["x", routing, *weights], ["mixed"], {"k": 2}, MICROSOFT)
    graph.output("mixed", FLOAT, ["t", HIDDEN])


@pytest.mark.parametrize("op_type", ["MoE", "QMoE"])
def test_what_reaches_the_routing_input_of_an_expert_node(op_type: str) -> None:
    graph = start()
    graph.linear("x", ones(HIDDEN, EXPERTS), "router")
    biased = graph.node("Add", ["router", graph.constant("bias", ones(EXPERTS))], ["biased"])
    shape = graph.constant("shape", np.array([-1, EXPERTS], np.int64))
    moe(graph, graph.node("Reshape", [biased, shape], ["flat"]), op_type)
    assert routers(graph) == ["router"]


def test_what_topk_chooses_experts_by() -> None:
    graph = start()
    graph.linear("x", ones(HIDDEN, EXPERTS), "router")
    graph.node("Sigmoid", ["router"], ["scores"])
    graph.node("TopK", ["scores", graph.constant("k", np.array([2], np.int64))], ["values", "indices"])
    graph.output("indices", TensorProto.INT64, ["t", 2])
    assert routers(graph) == ["router"]


def test_a_layer_that_makes_the_experts_input_is_no_router() -> None:
    graph = start()
    graph.linear("x", ones(HIDDEN, HIDDEN - 1), "narrow")
    graph.node("MoE", ["narrow", "x", graph.constant("fc1", ones(HIDDEN, 32, HIDDEN - 1))], ["mixed"], {}, MICROSOFT)
    graph.output("mixed", FLOAT, ["t", HIDDEN - 1])
    assert routers(graph) == []


def test_a_vocabulary_that_topk_samples_from_is_no_router() -> None:
    graph = start()
    graph.linear("x", ones(HIDDEN, 300), "scores")
    graph.node("TopK", ["scores", graph.constant("k", np.array([2], np.int64))], ["values", "indices"])
    graph.output("indices", TensorProto.INT64, ["t", 2])
    assert routers(graph) == []


def test_a_layer_behind_another_layer_ends_the_search() -> None:
    graph = start()
    graph.linear(graph.linear("x", ones(HIDDEN, 8), "squeezed"), ones(8, EXPERTS), "router")
    moe(graph, "router")
    assert routers(graph) == ["router"]


@pytest.mark.parametrize("fused", [True, False])
def test_gates_of_linear_attention_are_told_from_its_queries_keys_and_values(fused: bool) -> None:
    graph = start()
    for name, width in (("q", 8), ("k", 8), ("v", 8), ("a", 2), ("b", 2), ("z", 8)):
        graph.linear("x", ones(HIDDEN, width), name)
    bias, scale = graph.constant("bias", ones(2)), graph.constant("scale", -ones(2))
    if fused:
        graph.node("LinearAttentionGate", ["a", bias, scale, "b"], ["decay", "beta"], {}, MICROSOFT)
    else:
        graph.node("Softplus", [graph.node("Add", ["a", bias], ["biased"])], ["soft"])
        graph.node("Mul", ["soft", scale], ["decay"])
        graph.node("Sigmoid", ["b"], ["beta"])
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    graph.node("LinearAttention", ["q", "k", "v", "", "decay", "beta"], ["y"], heads, MICROSOFT)
    graph.node("Mul", ["y", "z"], ["gated"])
    graph.output("gated", FLOAT, ["t", 8])
    assert [site.output for site in find_sites(graph.model()) if site.gates_state] == ["a", "b"]


def value(model: ir.Model, name: str) -> ir.Value:
    """Return a value of the main graph by its name."""
    outputs = [output for node in model.graph for output in node.outputs]
    return next(value for value in [*outputs, *model.graph.initializers.values()] if value.name == name)


def test_constants_are_initializers_and_constant_nodes(tmp_path: Path) -> None:
    graph = start()
    graph.constant("two", np.array([2.0], np.float32))
    graph.nodes.append(helper.make_node("Constant", [], ["three"], value=helper.make_tensor("t", FLOAT, [1], [3.0])))
    graph.node("Add", ["two", "three"], ["five"])
    model = graph.model()
    assert constant_values(value(model, "two")) == [2]
    assert constant_values(value(model, "three")) == [3]
    assert constant_values(value(model, "five")) is None
    missing = value(model, "two")
    missing.const_value = ir.ExternalTensor(
        "missing", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="two", base_dir=tmp_path
    )
    assert constant_values(missing) is None


@pytest.mark.parametrize(
    ("op_type", "second", "square"),
    [("Mul", "x", True), ("Mul", "two", False), ("Pow", "two", True), ("Pow", "three", False), ("Pow", "x", False)],
)
def test_a_square_is_a_product_with_itself_or_the_second_power(op_type: str, second: str, square: bool) -> None:
    graph = start()
    graph.constant("two", np.array(2, np.int32))
    graph.constant("three", np.array(3, np.int32))
    graph.node(op_type, ["x", second], ["y"])
    assert is_square(graph.model().graph[0]) == square


@pytest.mark.parametrize(
    ("operands", "seen_outside", "found"),
    [(["h", "h"], False, True), (["h", "x"], False, True), (["h", "h"], True, False)],
)
def test_a_sole_reader_reads_once_or_squares(operands: list[str], seen_outside: bool, found: bool) -> None:
    graph = start()
    graph.node("Neg", ["x"], ["h"])
    graph.node("Mul", operands, ["y"])
    if seen_outside:
        graph.output("h", FLOAT, ["t", HIDDEN])
    model = graph.model()
    assert sole_reader(value(model, "h")) is (model.graph[1] if found else None)


def test_readers_are_found_behind_transposes() -> None:
    graph = start()
    graph.constant("w", ones(HIDDEN, HIDDEN))
    graph.node("Transpose", [graph.node("Transpose", ["w"], ["turned"])], ["back"])
    graph.node("MatMul", ["x", "back"], ["y"])
    graph.node("Cast", ["w"], ["wide"], {"to": TensorProto.DOUBLE})
    found = [(node.op_type, index) for node, index in readers(value(graph.model(), "w"))]
    assert sorted(found) == [("Cast", 0), ("MatMul", 1)]


@pytest.mark.parametrize("seen", [False, True])
def test_a_cast_is_looked_through_where_only_it_reads_its_input(seen: bool) -> None:
    graph = start()
    graph.node("Cast", [graph.node("Neg", ["x"], ["wide"])], ["h"], {"to": TensorProto.FLOAT16})
    if seen:
        graph.output("wide", FLOAT, ["t", HIDDEN])
    assert before_cast(value(graph.model(), "h")).name == ("h" if seen else "wide")


def repetition(
    kv_heads: int, past: str = "past", *, cache_reader: str = "Shape", order: tuple[int, ...] = (0, 2, 1, 3)
) -> ir.Value:
    """Return V of 4 heads of 8 channels that are copies of ``kv_heads``, as model builders write it."""
    graph = start()
    graph.input("past", FLOAT, ["b", kv_heads, "p", 8])

    def constant(name: str, *numbers: int) -> str:
        return graph.constant(name, np.array(numbers, np.int64))

    graph.node(
        "Reshape",
        [graph.linear("x", ones(HIDDEN, kv_heads * 8), "v"), constant("split", 0, 0, kv_heads, -1)],
        ["heads"],
    )
    graph.node("Transpose", ["heads"], ["first"], {"perm": list(order)})
    graph.node("Concat", [past, "first"], ["present"], {"axis": 2})
    graph.node(cache_reader, ["present"], ["seen"])
    graph.node("Unsqueeze", ["present", constant("axis", 2)], ["single"])
    graph.node("Expand", ["single", constant("copies", 1, kv_heads, 4 // kv_heads, 1, 8)], ["copied"])
    graph.node("Reshape", ["copied", constant("merge", 0, 4, -1, 8)], ["merged"])
    graph.node("Transpose", ["merged"], ["last"], {"perm": [0, 2, 1, 3]})
    graph.node("Reshape", ["last", constant("flat", 0, 0, 32)], ["repeated"])
    model = graph.model()
    value(model, "heads").shape = ir.Shape(["b", "t", kv_heads, 8])
    value(model, "merged").shape = ir.Shape(["b", 4, "t", 8])
    return value(model, "repeated")


def test_repeated_heads_lead_to_the_linear_layer() -> None:
    found = repeated_kv_heads(repetition(2), 4)
    assert found is not None
    assert (found.kv_heads, found.entry.inputs[0].name) == (2, "v")


@pytest.mark.parametrize(
    ("repeated", "heads"),
    [
        (repetition(2), 8),
        (repetition(2, past="first"), 4),
        (repetition(2, cache_reader="Neg"), 4),
        (repetition(2, order=(0, 2, 3, 1)), 4),
    ],
    ids=["other heads", "no cache", "a cache that others read", "another order"],
)
def test_other_repetitions_are_left_alone(repeated: ir.Value, heads: int) -> None:
    assert repeated_kv_heads(repeated, heads) is None
