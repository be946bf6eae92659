"""A router is found in each form that builders give it, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

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
