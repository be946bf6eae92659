"""Check where an input scale can be folded: in a norm, up_proj or v_proj, and nowhere that others would see."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from stages.model.sites import find_groups
from stages.records.sites import ActivationGroup, HeadSharing, LinearAbsorber, NormAbsorber, ValueAbsorber
from tests.support.graphs import MICROSOFT, TinyGraph

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)


def _matrix(rows: int, columns: int) -> np.ndarray:
    return RNG.standard_normal((rows, columns)).astype(np.float32)


def _by_activation(graph: TinyGraph) -> dict[str, ActivationGroup]:
    return {group.activation: group for group in find_groups(graph.model())}


def _graph(width: int = 8) -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", FLOAT, ["t", width])
    return graph


def _norm(graph: TinyGraph, source: str, output: str, width: int = 8) -> str:
    gain = graph.constant(f"{output}.gain", np.ones(width, np.float32))
    return graph.node("SimplifiedLayerNormalization", [source, gain], [output], {"epsilon": 1e-5, "axis": -1})


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


@pytest.mark.parametrize("seen", [False, True])
def test_a_norm_behind_a_cast_absorbs_where_only_the_cast_reads_it(seen: bool) -> None:
    graph = _graph()
    graph.node("Cast", [_norm(graph, "x", "wide")], ["h"], {"to": TensorProto.FLOAT16})
    graph.linear("h", _matrix(8, 8).astype(np.float16), "y")
    graph.output("y", TensorProto.FLOAT16, ["t", 8])
    if seen:
        graph.output(graph.node("Neg", ["wide"], ["other"]), FLOAT, ["t", 8])
    group = _by_activation(graph)["h"]
    assert group.absorber == (None if seen else NormAbsorber(output="wide", parameters=("wide.gain",)))
    assert group.unfoldable_because == ("it comes from Cast, which can't take a scale exactly" if seen else "")


@pytest.mark.parametrize(("shape", "absorbs"), [((8,), True), ((), False), ((1,), False)])
def test_a_norm_written_out_ends_with_a_mul_by_its_gain(shape: tuple[int, ...], absorbs: bool) -> None:
    graph = _graph()
    graph.node("Mul", ["x", graph.constant("gain", np.ones(shape, np.float32))], ["h"])
    graph.linear("h", _matrix(8, 8), "y")
    graph.output("y", FLOAT, ["t", 8])
    expected = NormAbsorber(output="h", parameters=("gain",)) if absorbs else None
    assert _by_activation(graph)["h"].absorber == expected


def _gated(graph: TinyGraph, *, bias: bool = False) -> None:
    graph.linear("x", _matrix(8, 6), "gate")
    graph.linear("x", _matrix(8, 6), "up")
    up = "up"
    if bias:
        up = graph.node("Add", [graph.constant("up.bias", np.ones(6, np.float32)), "up"], ["up_biased"])
    graph.node("Sigmoid", ["gate"], ["act"])
    graph.node("Mul", ["act", up], ["product"])
    graph.linear("product", _matrix(6, 8), "down")
    graph.output("down", FLOAT, ["t", 8])


@pytest.mark.parametrize("bias", [False, True])
def test_up_projection_absorbs_the_scale_of_down(bias: bool) -> None:
    graph = _graph()
    _gated(graph, bias=bias)
    expected = LinearAbsorber(site="up/MatMul", bias="up.bias" if bias else None)
    assert _by_activation(graph)["product"].absorber == expected


def _squared(graph: TinyGraph, *, bias: bool = False, relu: bool = True, op_type: str = "Pow") -> None:
    """x -> up [+ bias] [-> Relu] -> ^2 -> down."""
    value = graph.linear("x", _matrix(8, 6), "up")
    if bias:
        value = graph.node("Add", [value, graph.constant("up.bias", np.ones(6, np.float32))], ["up_biased"])
    value = graph.node("Relu", [value], ["positive"]) if relu else value
    two = graph.constant("two", np.array([2], np.int32))
    graph.node(op_type, [value, value if op_type == "Mul" else two], ["square"])
    graph.linear("square", _matrix(6, 8), "down")
    graph.output("down", FLOAT, ["t", 8])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("op_type", ["Pow", "Mul"])
def test_up_projection_absorbs_the_root_of_the_scale_through_a_square(op_type: str, relu: bool, bias: bool) -> None:
    graph = _graph()
    _squared(graph, bias=bias, relu=relu, op_type=op_type)
    expected = LinearAbsorber(site="up/MatMul", bias="up.bias" if bias else None, power=2)
    assert _by_activation(graph)["square"].absorber == expected


def test_up_projection_absorbs_the_scale_through_a_relu() -> None:
    graph = _graph()
    graph.node("Relu", [graph.linear("x", _matrix(8, 6), "up")], ["positive"])
    graph.linear("positive", _matrix(6, 8), "down")
    graph.output("down", FLOAT, ["t", 8])
    assert _by_activation(graph)["positive"].absorber == LinearAbsorber(site="up/MatMul", power=1)


@pytest.mark.parametrize("seen", ["up", "positive"])
def test_a_square_whose_base_others_read_absorbs_nothing(seen: str) -> None:
    graph = _graph()
    _squared(graph)
    graph.output(graph.node("Neg", [seen], ["other"]), FLOAT, ["t", 6])
    group = _by_activation(graph)["square"]
    assert group.absorber is None
    assert "does not come from a linear layer alone" in group.unfoldable_because


@pytest.mark.parametrize("constant", [True, False])
def test_another_power_absorbs_nothing(constant: bool) -> None:
    graph = _graph()
    _squared(graph)
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name != "two"]
    if constant:
        graph.constant("two", np.array([3], np.int32))
    else:
        graph.input("two", TensorProto.INT32, [1])
    group = _by_activation(graph)["square"]
    assert group.absorber is None
    assert "exponent isn't the constant 2" in group.unfoldable_because


def test_the_exponent_may_come_from_a_constant_node() -> None:
    graph = _graph()
    _squared(graph)
    tensor = next(tensor for tensor in graph.initializers if tensor.name == "two")
    graph.initializers.remove(tensor)
    graph.nodes.insert(0, helper.make_node("Constant", [], ["two"], value=tensor))
    assert _by_activation(graph)["square"].absorber == LinearAbsorber(site="up/MatMul", power=2)


def test_a_gemm_right_before_a_site_absorbs_nothing() -> None:
    graph = _graph()
    graph.node("Gemm", ["x", graph.constant("w", _matrix(8, 6)), graph.constant("bias", _matrix(1, 6)[0])], ["h"])
    graph.linear("h", _matrix(6, 8), "y")
    graph.output("y", FLOAT, ["t", 8])
    assert _by_activation(graph)["h"].absorber is None


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


@pytest.mark.parametrize("last", ["v", "k"])
def test_a_packed_projection_that_is_split_absorbs_where_its_last_part_is_v(last: str) -> None:
    """Models that normalize q and k unpack them first."""
    graph = _graph(32)
    graph.linear("x", _matrix(32, 64), "qkv")
    sizes = graph.constant("sizes", np.array([32, 16, 16], np.int64))
    parts = ["q", "k", "v"] if last == "v" else ["q", "v", "k"]
    graph.node("Split", ["qkv", sizes], parts, {"axis": -1})
    inputs = [_norm(graph, "q", "q_normed", 32), _norm(graph, "k", "k_normed", 16), "v", "past_k", "past_v"]
    graph.node(
        "GroupQueryAttention",
        [*inputs, "lens", "total"],
        ["attention", "k_out", "v_out"],
        {"num_heads": 4, "kv_num_heads": 2},
        MICROSOFT,
    )
    graph.linear("attention", _matrix(32, 32), "o")
    graph.output("o", FLOAT, ["t", 32])
    group = _by_activation(graph)["attention"]
    if last == "v":
        heads = HeadSharing(kv_heads=2, group_size=2, head_size=8)
        assert group.absorber == ValueAbsorber(site="qkv/MatMul", first_channel=48, heads=heads)
    else:
        assert group.absorber is None
        assert "linear layer alone" in group.unfoldable_because
