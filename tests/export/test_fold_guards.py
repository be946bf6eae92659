"""Every failed guard ends in a Mul that leaves the graph's outputs as they were, and gives its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from export.rewrite import rewrite
from stages.errors import OptionError
from stages.model.sites import find_groups
from stages.records.sites import LinearAbsorber, NormAbsorber, ValueAbsorber
from tests.export.builders import exact_weight, group_of, input_scale, site_of, spec_of, store_of
from tests.export.fold_graphs import (
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    NORM,
    PAST,
    QUERY,
    QUERY_HEADS,
    QUERY_WIDTH,
    VALUE,
    K,
    N,
    T,
    attention_graph,
    attention_weights,
    check,
    down_weight,
    floats,
    fold_multi_head,
    gain,
    gated_graph,
    matrix,
    multi_head_feeds,
    multi_head_graph,
    multi_head_model,
    multi_head_weights,
    only,
    op_types,
    planned_group,
    powered_graph,
    require_mul,
    rms_norm_graph,
    show,
    siblings,
    split_before_attention,
    tied_scale,
    value_absorber,
)
from tests.support.graphs import TinyGraph

Change = Callable[[TinyGraph], None]


# --------------------------------------------------------------------------- norms


def test_a_gain_whose_uncast_output_is_seen_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    out = exact_weight(site_of("y", "x", K, N), spec_of(), rng, input_scale(rng, K))
    graph = TinyGraph()
    floats(graph, "h", K)
    graph.node("SimplifiedLayerNormalization", ["h", graph.constant("gain", gain(rng))], ["wide"])
    graph.node("Cast", ["wide"], ["x"], {"to": TensorProto.FLOAT})
    graph.linear("x", out.matrix, "y")
    show(graph, "y", N)
    show(graph, "wide", K)
    feeds = {"h": rng.standard_normal((1, T, K)).astype(np.float32)}
    group = group_of([out], absorber=NormAbsorber(output="wide", parameters=("gain",)))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    require_mul(result, "comes from Cast")


def test_another_reader_of_the_activation_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)] * 2)
    graph, feeds = rms_norm_graph(rng, weights)
    graph.linear("x", matrix(rng, K, N), "kept")
    show(graph, "kept", N)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    require_mul(result, "MatMul 'kept/MatMul'")
    # One Mul for both sites; the reader that is not quantized has none.
    assert op_types(result.model).count("Mul") == 1


def test_an_activation_that_is_a_graph_output_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)])
    graph, feeds = rms_norm_graph(rng, weights)
    show(graph, "x", K)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    require_mul(result, "output of the graph")


def test_a_gain_that_is_no_initializer_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)])
    graph = TinyGraph()
    floats(graph, "h", K)
    graph.node("Abs", [graph.constant("raw", gain(rng))], ["gain"])
    graph.node("SimplifiedLayerNormalization", ["h", "gain"], ["x"])
    graph.linear("x", weights[0].matrix, "y0")
    show(graph, "y0", N)
    feeds = {"h": rng.standard_normal((1, T, K)).astype(np.float32)}
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    require_mul(result, "gain of its SimplifiedLayerNormalization is not a constant")


# --------------------------------------------------------------------------- up_proj


@pytest.mark.parametrize("seen", ["up", "up_plus"])
def test_an_up_projection_that_others_see_is_left_alone(tmp_path: Path, rng: np.random.Generator, seen: str) -> None:
    down = down_weight(rng)
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, gain(rng, HIDDEN))
    show(graph, seen, HIDDEN)
    absorber = LinearAbsorber(site="up/MatMul", bias="up.bias")
    result = check(tmp_path, graph, [(group_of([down], absorber=absorber), [down])], feeds)
    require_mul(result, "linear layer alone")


def test_a_bias_that_was_not_planned_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, gain(rng, HIDDEN))
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul"))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    require_mul(result, "(bias)")


def test_a_nonlinear_node_behind_the_up_projection_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph = TinyGraph()
    floats(graph, "x", K)
    graph.node("Relu", [graph.linear("x", matrix(rng, K, HIDDEN), "up")], ["bent"])
    graph.node(
        "Mul",
        ["bent", graph.node("Sigmoid", [graph.linear("x", matrix(rng, K, HIDDEN), "gate")], ["act"])],
        ["product"],
    )
    graph.linear("product", down.matrix, "y")
    show(graph, "y", N)
    feeds = {"x": rng.standard_normal((1, T, K)).astype(np.float32)}
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul"))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    require_mul(result, "linear layer alone")


def test_an_absorber_that_is_not_in_the_graph_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, None)
    group = group_of([down], absorber=LinearAbsorber(site="elsewhere"))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    require_mul(result, "(site)")


@pytest.mark.parametrize(
    ("planned", "nodes"), [(1, ("Relu", "Pow")), (1, ("Mul",)), (2, ("Relu",)), (2, ("Pow", "Relu"))]
)
def test_a_power_that_is_not_the_planned_one_forces_a_mul(
    tmp_path: Path, rng: np.random.Generator, planned: int, nodes: tuple[str, ...]
) -> None:
    down = down_weight(rng)
    graph, feeds = powered_graph(rng, matrix(rng, K, HIDDEN), down, nodes=nodes)
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul", power=planned))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    require_mul(result, "planned")


@pytest.mark.parametrize("exponent", [np.array([3], np.int32), np.array([2.5], np.float32), np.full(HIDDEN, 2.0, "f4")])
def test_another_exponent_forces_a_mul(tmp_path: Path, rng: np.random.Generator, exponent: np.ndarray) -> None:
    down = down_weight(rng)
    graph, feeds = powered_graph(rng, matrix(rng, K, HIDDEN), down, exponent=exponent)
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul", power=2))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    require_mul(result, "exponent isn't the constant 2")


def test_an_exponent_that_is_not_constant_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph, feeds = powered_graph(rng, matrix(rng, K, HIDDEN), down)
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name != "two"]
    graph.input("two", TensorProto.INT32, [1])
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul", power=2))
    result = check(tmp_path, graph, [(group, [down])], feeds | {"two": np.array([2], np.int32)})
    assert only(result).how == "mul"


@pytest.mark.parametrize("seen", ["up", "positive"])
def test_a_square_whose_base_others_see_is_left_alone(tmp_path: Path, rng: np.random.Generator, seen: str) -> None:
    down = down_weight(rng)
    graph, feeds = powered_graph(rng, matrix(rng, K, HIDDEN), down)
    show(graph, graph.node("Neg", [seen], ["other"]), HIDDEN)
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul", power=2))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    require_mul(result, "linear layer alone")


@pytest.mark.parametrize("factor", [2.0**12, 2.0**-24])
def test_float16_scales_that_would_leave_their_range_force_a_mul(
    tmp_path: Path, rng: np.random.Generator, factor: float
) -> None:
    scale = np.full(HIDDEN, factor, np.float32)
    up = exact_weight(site_of("up", "x", K, HIDDEN, dtype="float16"), spec_of(scale_dtype="float16"), rng)
    down_site = site_of("y", "product", HIDDEN, N, dtype="float16")
    down = exact_weight(down_site, spec_of(scale_dtype="float16"), rng, scale)
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT16, [1, T, K])
    gate = graph.node("Sigmoid", [graph.linear("x", matrix(rng, K, HIDDEN).astype(np.float16), "gate")], ["act"])
    graph.node("Mul", [gate, graph.linear("x", up.matrix, "up")], ["product"])
    graph.linear("product", down.matrix, "y")
    graph.output("y", TensorProto.FLOAT16, [1, T, N])
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul"))
    store = store_of(tmp_path / "weights", [(group_of([up]), [up]), (group, [down])])
    if factor < 1:
        # 1 / s doesn't fit float16 either: there is no exact way left.
        with pytest.raises(OptionError, match="doesn't fit float16"):
            rewrite(graph.model(), store)
        return
    outcome = rewrite(graph.model(), store).folds[1]
    assert outcome.how == "mul"
    assert "normal range" in outcome.reason


def test_a_float_weight_that_would_overflow_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = exact_weight(
        site_of("y", "product", HIDDEN, N, dtype="float16"),
        spec_of(scale_dtype="float16"),
        rng,
        np.full(HIDDEN, 1e-3, np.float32),
    )
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT16, [1, T, K])
    gate = graph.node("Sigmoid", [graph.linear("x", matrix(rng, K, HIDDEN).astype(np.float16), "gate")], ["act"])
    graph.node("Mul", [gate, graph.linear("x", np.full((K, HIDDEN), 100, np.float16), "up")], ["product"])
    graph.linear("product", down.matrix, "y")
    graph.output("y", TensorProto.FLOAT16, [1, T, N])
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul"))
    outcome = only(rewrite(graph.model(), store_of(tmp_path / "weights", [(group, [down])])))
    assert outcome.how == "mul"
    assert "overflow" in outcome.reason


# --------------------------------------------------------------------------- v_proj


def test_a_value_that_is_not_split_off_last_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    split_before_attention(graph, ["q", "v", "k"], [QUERY, VALUE, VALUE])
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    require_mul(result, "V does not come from a linear layer alone")


def test_a_scale_that_differs_between_query_heads_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    scale = tied_scale(rng)
    # One number of the second query head of the first group.
    scale[HEADS.head_size] *= 1.001
    value, out = attention_weights(rng, packed=True, scale=scale)
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=True)
    group = group_of([out], absorber=value_absorber(packed=True, bias=True))
    result = check(tmp_path, graph, [(group_of([value]), [value]), (group, [out])], feeds)
    assert result.folds[1].how == "mul"
    assert "query heads" in result.folds[1].reason


def test_channels_that_attention_reads_as_keys_are_never_divided(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    absorber = ValueAbsorber(site="qkv/MatMul", first_channel=QUERY, heads=HEADS)
    result = check(tmp_path, graph, [(group_of([out], absorber=absorber), [out])], feeds)
    require_mul(result, "(first_channel)")


def test_a_value_that_attention_reads_as_key_too_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=False, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=False, bias=False)
    next(node for node in graph.nodes if node.op_type == "GroupQueryAttention").input[1] = "v"
    group = group_of([out], absorber=value_absorber(packed=False, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    assert only(result).how == "mul"
    assert next(group for group in find_groups(graph.model()) if group.activation == "mixed").absorber is None


def test_the_key_projection_is_never_taken_for_the_value_projection(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=False, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=False, bias=False)
    absorber = ValueAbsorber(site="k/MatMul", first_channel=0, heads=HEADS)
    result = check(tmp_path, graph, [(group_of([out], absorber=absorber), [out])], feeds)
    require_mul(result, "(site)")


def test_a_value_cache_that_another_node_reads_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    graph.node("Neg", ["present_value"], ["shared"])
    graph.output("shared", TensorProto.FLOAT, [1, 2, T + 3, 8])
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    require_mul(result, "cache")


def test_a_past_that_is_no_graph_input_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    # A constant prefix: its values would not be divided.
    prefix = graph.constant("prefix", rng.standard_normal((1, 2, 3, 8)).astype(np.float32))
    attention = next(node for node in graph.nodes if node.op_type == "GroupQueryAttention")
    attention.input[4] = prefix
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    require_mul(result, "shares its cache")


def test_a_quantized_value_cache_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, _ = attention_graph(rng, value, out, packed=True, bias=False)
    model = graph.model()
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    attention.attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_TENSOR")
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    outcome = only(rewrite(model, store_of(tmp_path / "weights", [(group, [out])])))
    assert outcome.how == "mul"
    assert "quantizes its value cache" in outcome.reason


def _own_bias(graph: TinyGraph) -> None:
    bias = graph.constant("qkv.bias", np.ones(3 * QUERY_WIDTH, np.float32))
    attention = next(node for node in graph.nodes if node.op_type == "MultiHeadAttention")
    attention.input.extend([""] * (4 - len(attention.input)))
    attention.input[3] = bias


def _constant_past(graph: TinyGraph) -> None:
    graph.constant("prefix", np.ones((1, QUERY_HEADS, PAST, HEAD_SIZE), np.float32))
    next(node for node in graph.nodes if node.op_type == "MultiHeadAttention").input[7] = "prefix"


def _read_copies(graph: TinyGraph) -> None:
    graph.output(graph.node("Neg", ["value.copied"], ["seen"]), TensorProto.FLOAT, [1, 2, 2, PAST + T, HEAD_SIZE])


def _read_cache(graph: TinyGraph) -> None:
    graph.output(graph.node("Neg", ["present_value"], ["seen"]), TensorProto.FLOAT, [1, None, PAST + T, HEAD_SIZE])


def _computed_past(graph: TinyGraph) -> None:
    doubled = helper.make_node("Add", ["past_value", "past_value"], ["twice"], name="twice")
    concat = next(node for node in graph.nodes if node.name == "present_value/Concat")
    concat.input[0] = "twice"
    graph.nodes.insert(0, doubled)


def _tile_heads(graph: TinyGraph) -> None:
    """Query head h reads value head h % kv_heads: what a scale may repeat over is another set of heads."""
    for tensor in graph.initializers:
        if tensor.name == "value.axis":
            tensor.CopyFrom(helper.make_tensor("value.axis", TensorProto.INT64, [1], [1]))
        if tensor.name == "value.copies":
            tensor.CopyFrom(helper.make_tensor("value.copies", TensorProto.INT64, [5], [1, 2, 2, PAST + T, HEAD_SIZE]))


@pytest.mark.parametrize(
    ("kv_heads", "change"),
    [
        (4, _own_bias),
        (4, _constant_past),
        (4, _read_cache),
        (2, _own_bias),
        (2, _read_copies),
        (2, _read_cache),
        (2, _computed_past),
        (2, _tile_heads),
    ],
)
def test_a_multi_head_value_that_is_seen_elsewhere_forces_a_mul(
    tmp_path: Path, rng: np.random.Generator, kv_heads: int, change: Change
) -> None:
    value, out = multi_head_weights(rng, kv_heads)
    graph = multi_head_graph(rng, out, kv_heads, value, bias=False)
    planned = planned_group(multi_head_model(graph))
    change(graph)
    # The export refuses what was planned for the graph before the change; so does planning where it can see it.
    outcome = fold_multi_head(tmp_path, graph, out, value, multi_head_feeds(rng, kv_heads), planned)
    assert outcome.how == "mul"
    assert outcome.reason
    if change not in (_constant_past, _read_cache) or kv_heads < QUERY_HEADS:
        assert planned_group(multi_head_model(graph)).absorber is None
