"""Sites, groups and absorbers on small graphs that hold each pattern."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.graph.sites import find_groups, find_sites
from stages.records import (
    ActivationGroup,
    HeadSharing,
    LinearAbsorber,
    NormAbsorber,
    ValueAbsorber,
    WeightLayout,
)
from tests.graphs import MICROSOFT, TinyGraph

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)


def _matrix(rows: int, columns: int) -> np.ndarray:
    return RNG.standard_normal((rows, columns)).astype(np.float32)


def _model(graph: TinyGraph) -> ir.Model:
    return ir.from_proto(graph.proto())


def _by_activation(graph: TinyGraph) -> dict[str, ActivationGroup]:
    return {group.activation: group for group in find_groups(_model(graph))}


def _graph(width: int = 8) -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", FLOAT, ["t", width])
    return graph


def _norm(graph: TinyGraph, source: str, output: str, width: int = 8) -> str:
    gain = graph.constant(f"{output}.gain", np.ones(width, np.float32))
    return graph.node("SimplifiedLayerNormalization", [source, gain], [output], {"epsilon": 1e-5, "axis": -1})


def test_layouts_shapes_and_names() -> None:
    graph = _graph()
    graph.linear("x", _matrix(8, 5), "plain")
    bias = graph.constant("bias", np.zeros(3, np.float32))
    graph.node("Gemm", ["x", graph.constant("nk", _matrix(3, 8)), bias], ["gemm"], {"transB": 1})
    tied = graph.constant("tied", _matrix(6, 8))
    graph.node("Transpose", [tied], ["tied_t"], {"perm": [1, 0]})
    graph.node("MatMul", ["x", "tied_t"], ["logits"])
    ids = graph.input("ids", TensorProto.INT64, ["t"])
    graph.node("Gather", [tied, ids], ["embedded"])
    for name in ("plain", "gemm", "logits", "embedded"):
        graph.output(name, FLOAT, ["t", None])
    sites = {site.output: site for site in find_sites(_model(graph))}
    assert {name: (site.out_features, site.in_features, site.layout) for name, site in sites.items()} == {
        "plain": (5, 8, WeightLayout.K_BY_N),
        "gemm": (3, 8, WeightLayout.N_BY_K),
        "logits": (6, 8, WeightLayout.N_BY_K_TRANSPOSED),
    }
    assert sites["logits"].weight_shared_with == ("embedded",)
    assert sites["logits"].feeds_logits
    assert not sites["plain"].feeds_logits


def test_what_is_not_a_site() -> None:
    graph = _graph()
    graph.node("MatMul", ["x", graph.constant("cube", np.ones((2, 8, 4), np.float32))], ["batched"])
    graph.node("Gemm", ["x", graph.constant("w", _matrix(8, 4))], ["scaled"], {"alpha": 0.5})
    graph.node("MatMul", ["x", graph.input("dynamic", FLOAT, [8, 4])], ["computed"])
    graph.output("batched", FLOAT, [2, "t", 4])
    with pytest.raises(GraphError, match="nothing to quantize"):
        find_groups(_model(graph))


def test_unnamed_nodes_are_called_after_their_weight() -> None:
    graph = _graph()
    graph.linear("x", _matrix(8, 5), "a")
    graph.nodes[-1].name = ""
    graph.output("a", FLOAT, ["t", 5])
    assert find_sites(_model(graph))[0].name == "a.weight->a"


def test_siblings_share_a_group_and_their_norm_absorbs() -> None:
    graph = _graph()
    _norm(graph, "x", "h")
    graph.linear("h", _matrix(8, 5), "q")
    graph.linear("h", _matrix(8, 3), "k")
    graph.output("q", FLOAT, ["t", 5])
    graph.output("k", FLOAT, ["t", 3])
    group = _by_activation(graph)["h"]
    assert [site.out_features for site in group.sites] == [5, 3]
    assert group.absorber == NormAbsorber(output="h", parameters=("h.gain",))


@pytest.mark.parametrize("break_it", ["other reader", "graph output", "graph input"])
def test_an_activation_that_others_see_is_not_absorbed(break_it: str) -> None:
    graph = _graph()
    activation = "x" if break_it == "graph input" else _norm(graph, "x", "h")
    graph.linear(activation, _matrix(8, 5), "q")
    graph.output("q", FLOAT, ["t", 5])
    if break_it == "other reader":
        graph.node("Sigmoid", ["h"], ["s"])
        graph.output("s", FLOAT, ["t", 8])
    if break_it == "graph output":
        graph.output("h", FLOAT, ["t", 8])
    group = _by_activation(graph)[activation]
    assert group.absorber is None
    words = {"other reader": "Sigmoid", "graph output": "an output of the graph", "graph input": "an input"}
    assert words[break_it] in group.unfoldable_because


@pytest.mark.parametrize(
    "op_type", ["LayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"]
)
def test_norm_parameters_that_must_be_divided(op_type: str) -> None:
    graph = _graph()
    graph.input("skip", FLOAT, ["t", 8])
    names = {name: graph.constant(name, np.ones(8, np.float32)) for name in ("gain", "beta", "add")}
    inputs = {
        "LayerNormalization": ["x", names["gain"], names["beta"]],
        "SkipLayerNormalization": ["x", "skip", names["gain"], names["beta"], names["add"]],
        "SkipSimplifiedLayerNormalization": ["x", "skip", names["gain"], names["add"]],
    }[op_type]
    domain = "" if op_type == "LayerNormalization" else MICROSOFT
    graph.node(op_type, inputs, ["h"], {"epsilon": 1e-5}, domain)
    graph.linear("h", _matrix(8, 5), "q")
    graph.output("q", FLOAT, ["t", 5])
    absorber = _by_activation(graph)["h"].absorber
    # The Skip nodes' own added bias lies before the normalization: it must never be divided.
    expected = ("gain",) if op_type == "SkipSimplifiedLayerNormalization" else ("gain", "beta")
    assert absorber == NormAbsorber(output="h", parameters=expected)


def _gated(graph: TinyGraph, *, bias: bool = False, square: bool = False) -> None:
    graph.linear("x", _matrix(8, 6), "gate")
    graph.linear("x", _matrix(8, 6), "up")
    up = "up"
    if bias:
        up = graph.node("Add", [graph.constant("up.bias", np.ones(6, np.float32)), "up"], ["up_biased"])
    graph.node("Sigmoid", ["gate"], ["act"])
    graph.node("Mul", [up, up] if square else ["act", up], ["product"])
    graph.linear("product", _matrix(6, 8), "down")
    graph.output("down", FLOAT, ["t", 8])


@pytest.mark.parametrize("bias", [False, True])
def test_up_projection_absorbs_the_scale_of_down(bias: bool) -> None:
    graph = _graph()
    _gated(graph, bias=bias)
    expected = LinearAbsorber(site="up/MatMul", bias="up.bias" if bias else None)
    assert _by_activation(graph)["product"].absorber == expected


def test_a_squared_factor_is_not_linear() -> None:
    graph = _graph()
    _gated(graph, square=True)
    group = _by_activation(graph)["product"]
    assert group.absorber is None
    assert "squares" in group.unfoldable_because


def test_an_up_projection_with_a_second_reader_absorbs_nothing() -> None:
    graph = _graph()
    _gated(graph)
    graph.node("Relu", ["up"], ["other"])
    graph.output("other", FLOAT, ["t", 6])
    assert _by_activation(graph)["product"].absorber is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_value_projection_under_grouped_query_attention(packed: bool, bias: bool) -> None:
    heads, kv_heads, size = 4, 2, 8
    graph = _graph(32)
    widths = {"qkv": (heads + 2 * kv_heads) * size} if packed else {"q": 32, "k": 16, "v": 16}
    sources = []
    for name, width in widths.items():
        graph.linear("x", _matrix(32, width), name)
        if bias:
            constant = graph.constant(f"{name}.bias", np.ones(width, np.float32))
            graph.node("Add", [name, constant], [f"{name}+"])
        sources.append(f"{name}+" if bias else name)
    inputs = [*sources, *([""] * (3 - len(sources))), "past_k", "past_v", "lens", "total"]
    graph.node(
        "GroupQueryAttention",
        inputs,
        ["attention", "k_out", "v_out"],
        {"num_heads": heads, "kv_num_heads": kv_heads},
        MICROSOFT,
    )
    graph.linear("attention", _matrix(32, 32), "o")
    graph.output("o", FLOAT, ["t", 32])
    source = "qkv" if packed else "v"
    assert _by_activation(graph)["attention"].absorber == ValueAbsorber(
        site=f"{source}/MatMul",
        first_channel=48 if packed else 0,
        heads=HeadSharing(kv_heads=kv_heads, group_size=2, head_size=size),
        bias=f"{source}.bias" if bias else None,
    )
