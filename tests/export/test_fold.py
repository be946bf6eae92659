"""Folding an input scale leaves the graph's outputs as they were; where nothing can take it, a Mul does.

Stored weights stand for W * s exactly, and the base graphs hold W.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from export.fold import FoldOutcome
from export.rewrite import rewrite
from stages.errors import OptionError
from stages.model.form.packed_attention import write_packed_attention
from stages.model.sites import find_sites
from stages.records.formats import PerChannel
from stages.records.sites import HeadSharing, LinearAbsorber, NormAbsorber, ValueAbsorber
from tests.export.builders import (
    TOLERANCE,
    ExactWeight,
    check_rewrite,
    exact_weight,
    group_of,
    input_scale,
    relative_difference,
    run,
    site_of,
    spec_of,
    store_of,
)
from tests.export.fold_graphs import (
    HEAD_SIZE,
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
    multi_head_scale,
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
from tests.support.graphs import MICROSOFT, TinyGraph


def test_a_norm_takes_the_scale_that_its_readers_share(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)] * 2)
    graph, feeds = rms_norm_graph(rng, weights)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    assert only(result) == FoldOutcome(activation="x", sites=("y0/MatMul", "y1/MatMul"), how="norm")
    assert "Mul" not in op_types(result.model)


def test_no_scale_and_a_scale_of_ones_change_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [None, np.ones(K, np.float32)])
    graph, feeds = rms_norm_graph(rng, weights)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    assert only(result).how == "none"
    assert "gain" in result.model.graph.initializers


def test_two_norms_that_share_a_gain_are_divided_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = TinyGraph()
    floats(graph, "h", K)
    graph.constant("gain", gain(rng))
    groups = []
    for name, activation in (("a", "xa"), ("b", "xb")):
        source = "h" if name == "a" else graph.node("Neg", ["h"], ["minus"])
        graph.node("SimplifiedLayerNormalization", [source, "gain"], [activation])
        weight = exact_weight(site_of(name, activation, K, N), spec_of(), rng, input_scale(rng, K))
        graph.linear(activation, weight.matrix, name)
        show(graph, name, N)
        absorber = NormAbsorber(output=activation, parameters=("gain",))
        groups.append((group_of([weight], absorber=absorber), [weight]))
    # A third norm keeps the gain as it is.
    graph.node("SimplifiedLayerNormalization", ["h", "gain"], ["plain"])
    show(graph, "plain", K)
    feeds = {"h": rng.standard_normal((1, T, K)).astype(np.float32)}
    result = check(tmp_path, graph, groups, feeds)
    assert [outcome.how for outcome in result.folds] == ["norm", "norm"]


def test_a_skip_norm_keeps_its_second_output_and_its_skip_bias(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = TinyGraph()
    floats(graph, "h", K)
    floats(graph, "skip", K)
    inputs = ["h", "skip", graph.constant("gain", gain(rng)), graph.constant("beta", gain(rng))]
    inputs.append(graph.constant("skip_bias", gain(rng)))
    graph.node("SkipLayerNormalization", inputs, ["x", "", "", "sum"], {"epsilon": 1e-5}, MICROSOFT)
    weight = exact_weight(site_of("y", "x", K, N), spec_of(), rng, input_scale(rng, K))
    graph.linear("x", weight.matrix, "y")
    show(graph, "y", N)
    show(graph, "sum", K)
    absorber = NormAbsorber(output="x", parameters=("gain", "beta"))
    feeds = {name: rng.standard_normal((1, T, K)).astype(np.float32) for name in ("h", "skip")}
    result = check(tmp_path, graph, [(group_of([weight], absorber=absorber), [weight])], feeds)
    assert only(result).how == "norm"


def test_layer_normalization_divides_its_bias_too(tmp_path: Path, rng: np.random.Generator) -> None:
    graph = TinyGraph()
    floats(graph, "h", K)
    inputs = ["h", graph.constant("gain", gain(rng)), graph.constant("bias", gain(rng))]
    graph.node("LayerNormalization", inputs, ["x"])
    weight = exact_weight(site_of("y", "x", K, N), spec_of(), rng, input_scale(rng, K))
    graph.linear("x", weight.matrix, "y")
    show(graph, "y", N)
    absorber = NormAbsorber(output="x", parameters=("gain", "bias"))
    feeds = {"h": rng.standard_normal((1, T, K)).astype(np.float32)}
    result = check(tmp_path, graph, [(group_of([weight], absorber=absorber), [weight])], feeds)
    assert only(result).how == "norm"


@pytest.mark.parametrize("written_out", [True, False])
def test_a_gain_before_a_cast_takes_the_scale(tmp_path: Path, rng: np.random.Generator, written_out: bool) -> None:
    """Norms of float32 in narrower models; the last node of one that is written out is a Mul by the gain."""
    out = exact_weight(site_of("y", "x", K, N), spec_of(), rng, input_scale(rng, K))
    graph = TinyGraph()
    floats(graph, "h", K)
    constant = graph.constant("gain", gain(rng))
    graph.node("Mul" if written_out else "SimplifiedLayerNormalization", ["h", constant], ["wide"])
    graph.node("Cast", ["wide"], ["x"], {"to": TensorProto.FLOAT})
    graph.linear("x", out.matrix, "y")
    show(graph, "y", N)
    feeds = {"h": rng.standard_normal((1, T, K)).astype(np.float32)}
    group = group_of([out], absorber=NormAbsorber(output="wide", parameters=("gain",)))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    assert only(result).how == "norm"
    assert op_types(result.model).count("Mul") == written_out


def test_sites_with_scales_of_their_own_get_a_mul_each(tmp_path: Path, rng: np.random.Generator) -> None:
    shared = input_scale(rng, K)
    weights = siblings(rng, [shared, input_scale(rng, K), None, shared])
    graph, feeds = rms_norm_graph(rng, weights)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    assert [outcome.sites for outcome in result.folds] == [("y0/MatMul", "y3/MatMul"), ("y1/MatMul",)]
    assert {(outcome.how, outcome.reason) for outcome in result.folds} == {
        ("mul", "its sites carry different input scales")
    }
    assert op_types(result.model).count("Mul") == 2


def test_a_recipe_without_folding_keeps_every_scale_as_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)] * 2)
    graph, feeds = rms_norm_graph(rng, weights)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds, fold=False)
    require_mul(result, "recipe")


def test_a_group_without_absorber_gives_its_own_reason(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)])
    graph, feeds = rms_norm_graph(rng, weights)
    group = group_of(weights, unfoldable_because="it comes from Softmax")
    result = check(tmp_path, graph, [(group, weights)], feeds)
    assert only(result) == FoldOutcome(activation="x", sites=("y0/MatMul",), how="mul", reason="it comes from Softmax")


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_an_impossible_input_scale_is_refused(tmp_path: Path, rng: np.random.Generator, bad: float) -> None:
    weights = siblings(rng, [None])
    graph, _ = rms_norm_graph(rng, weights)
    scale = torch.ones(K)
    scale[3] = bad
    stored = weights[0].stored
    broken = ExactWeight(
        stored=type(stored)(
            site=stored.site, spec=stored.spec, codes=stored.codes, scales=stored.scales, input_scale=scale
        ),
        matrix=weights[0].matrix,
    )
    with pytest.raises(OptionError, match=r"positive|NaN"):
        rewrite(graph.model(), store_of(tmp_path / "weights", [(group_of([broken], absorber=NORM), [broken])]))


# --------------------------------------------------------------------------- up_proj


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("granularity", [None, PerChannel()])
def test_a_quantized_up_projection_takes_the_scale_in_its_scales(
    tmp_path: Path, rng: np.random.Generator, with_bias: bool, granularity: PerChannel | None
) -> None:
    up = exact_weight(site_of("up", "x", K, HIDDEN), spec_of(granularity=granularity), rng)
    down = down_weight(rng)
    bias = gain(rng, HIDDEN) if with_bias else None
    graph, feeds = gated_graph(rng, up.matrix, down, bias)
    absorber = LinearAbsorber(site="up/MatMul", bias="up.bias" if with_bias else None)
    groups = [(group_of([up]), [up]), (group_of([down], absorber=absorber), [down])]
    result = check(tmp_path, graph, groups, feeds)
    assert [outcome.how for outcome in result.folds] == ["none", "linear"]
    codes = result.model.graph.initializers["up/MatMul/codes"].const_value
    assert codes is not None
    np.testing.assert_array_equal(codes.numpy(), up.stored.codes.numpy().T)


@pytest.mark.parametrize("with_bias", [True, False])
def test_an_up_projection_that_is_not_quantized_is_divided_itself(
    tmp_path: Path, rng: np.random.Generator, with_bias: bool
) -> None:
    down = down_weight(rng)
    bias = gain(rng, HIDDEN) if with_bias else None
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, bias)
    absorber = LinearAbsorber(site="up/MatMul", bias="up.bias" if with_bias else None)
    result = check(tmp_path, graph, [(group_of([down], absorber=absorber), [down])], feeds)
    assert only(result).how == "linear"
    assert op_types(result.model).count("Mul") == 1


def test_an_up_projection_as_gemm_with_transb_and_bias(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [T, K])
    graph.node("Sigmoid", [graph.linear("x", matrix(rng, K, HIDDEN), "gate")], ["act"])
    inputs = ["x", graph.constant("up.weight", matrix(rng, HIDDEN, K)), graph.constant("up.bias", gain(rng, HIDDEN))]
    graph.node("Gemm", inputs, ["up"], {"transB": 1})
    graph.node("Mul", ["up", "act"], ["product"])
    graph.linear("product", down.matrix, "y")
    graph.output("y", TensorProto.FLOAT, [T, N])
    absorber = LinearAbsorber(site="up/Gemm", bias="up.bias")
    feeds = {"x": rng.standard_normal((T, K)).astype(np.float32)}
    result = check(tmp_path, graph, [(group_of([down], absorber=absorber), [down])], feeds)
    assert only(result).how == "linear"


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("nodes", "power"), [(("Relu", "Pow"), 2), (("Relu", "Mul"), 2), (("Pow",), 2), (("Mul",), 2), (("Relu",), 1)]
)
def test_an_up_projection_takes_the_scale_through_a_relu_and_its_root_through_a_square(
    tmp_path: Path, rng: np.random.Generator, nodes: tuple[str, ...], power: int, with_bias: bool, quantized: bool
) -> None:
    up = exact_weight(site_of("up", "x", K, HIDDEN), spec_of(), rng)
    down = down_weight(rng)
    bias = rng.standard_normal(HIDDEN).astype(np.float32) if with_bias else None
    graph, feeds = powered_graph(rng, up.matrix, down, nodes=nodes, bias=bias)
    absorber = LinearAbsorber(site="up/MatMul", bias="up.bias" if with_bias else None, power=power)
    groups = [(group_of([down], absorber=absorber), [down])]
    result = check(tmp_path, graph, [(group_of([up]), [up]), *groups] if quantized else groups, feeds)
    assert result.folds[-1].how == "linear"
    # Nothing was added: what multiplies is the square itself.
    assert op_types(result.model).count("Mul") == nodes.count("Mul")


# --------------------------------------------------------------------------- v_proj


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_value_projection_takes_a_scale_that_repeats_over_query_heads(
    tmp_path: Path, rng: np.random.Generator, packed: bool, bias: bool, quantized: bool
) -> None:
    value, out = attention_weights(rng, packed=packed, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=packed, bias=bias)
    groups = [(group_of([out], absorber=value_absorber(packed=packed, bias=bias)), [out])]
    if quantized:
        groups.insert(0, (group_of([value]), [value]))
    result = check(tmp_path, graph, groups, feeds, ignored=["present_value"])
    assert result.folds[-1].how == "value"
    assert "Mul" not in op_types(result.model)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_projection_takes_the_scale_through_a_split(
    tmp_path: Path, rng: np.random.Generator, bias: bool
) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=bias)
    split_before_attention(graph, ["q", "k", "v"], [QUERY, VALUE, VALUE])
    groups = [
        (group_of([value]), [value]),
        (group_of([out], absorber=value_absorber(packed=True, bias=bias)), [out]),
    ]
    result = check(tmp_path, graph, groups, feeds, ignored=["present_value"])
    assert result.folds[-1].how == "value"
    assert "Mul" not in op_types(result.model)


def test_the_value_cache_goes_on_where_it_stopped(tmp_path: Path, rng: np.random.Generator) -> None:
    scale = tied_scale(rng)
    value, out = attention_weights(rng, packed=False, scale=scale)
    graph, feeds = attention_graph(rng, value, out, packed=False, bias=False)
    result = rewrite(
        graph.model(),
        store_of(tmp_path / "weights", [(group_of([out], absorber=value_absorber(packed=False, bias=False)), [out])]),
    )
    cached = rng.standard_normal((1, 2, 3, 8)).astype(np.float32)
    per_value = scale.reshape(2, 4, 8)[:, 0][None, :, None]
    before = run(graph.model(), feeds | {"past_value": cached})
    after = run(result.model, feeds | {"past_value": cached / per_value})
    assert relative_difference(after[0], before[0]) < TOLERANCE
    assert relative_difference(after[2] * per_value, before[2]) < TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_value_of_multi_head_attention_takes_the_scale_as_planned(
    tmp_path: Path, rng: np.random.Generator, kv_heads: int, bias: bool
) -> None:
    value, out = multi_head_weights(rng, kv_heads)
    graph = multi_head_graph(rng, out, kv_heads, value, bias)
    group = planned_group(multi_head_model(graph))
    assert group.absorber == ValueAbsorber(
        site="v/MatMul",
        first_channel=0,
        heads=HeadSharing(kv_heads=kv_heads, group_size=QUERY_HEADS // kv_heads, head_size=HEAD_SIZE),
        bias="v.bias" if bias else None,
    )
    assert fold_multi_head(tmp_path, graph, out, value, multi_head_feeds(rng, kv_heads), group).how == "value"


def test_packed_attention_takes_the_scale_of_what_reads_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """Written as MatMul and MultiHeadAttention, its V is the last third of the packed projection."""
    width = 3 * QUERY_WIDTH
    packed = exact_weight(site_of("qkv", "x", K, width), spec_of(), rng)
    out = exact_weight(site_of("y", "mixed", QUERY_WIDTH, N), spec_of(), rng, multi_head_scale(rng, QUERY_HEADS))
    graph = TinyGraph()
    bias = graph.constant("bias", np.linspace(-1, 1, width, dtype=np.float32))
    inputs = [graph.input("x", TensorProto.FLOAT, [1, T, K]), graph.constant("qkv.weight", packed.matrix), bias]
    graph.node("Attention", inputs, ["mixed"], {"num_heads": QUERY_HEADS}, MICROSOFT)
    graph.linear("mixed", out.matrix, "y")
    graph.output("y", TensorProto.FLOAT, [1, T, N])
    model = graph.model()
    write_packed_attention(model)
    read = find_sites(model)[0]
    packed = replace(packed, stored=replace(packed.stored, site=read))
    group = planned_group(model)
    heads = HeadSharing(kv_heads=QUERY_HEADS, group_size=1, head_size=HEAD_SIZE)
    assert group.absorber == ValueAbsorber(site=read.name, first_channel=2 * QUERY_WIDTH, heads=heads, bias="bias")
    store = store_of(tmp_path / "weights", [(group_of([packed]), [packed]), (group, [out])])
    feeds = {"x": rng.standard_normal((1, T, K)).astype(np.float32)}
    assert check_rewrite(model, store, feeds).folds[-1].how == "value"


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_value_cache_of_multi_head_attention_goes_on_where_it_stopped(
    tmp_path: Path, rng: np.random.Generator, kv_heads: int
) -> None:
    value, out = multi_head_weights(rng, kv_heads)
    model = multi_head_model(multi_head_graph(rng, out, kv_heads, value, bias=False))
    result = rewrite(model, store_of(tmp_path / "weights", [(planned_group(model), [out])]))
    assert result.folds[0].how == "value"
    scale = out.stored.input_scale.numpy().reshape(kv_heads, QUERY_HEADS // kv_heads, HEAD_SIZE)[:, 0][None, :, None]
    cached = rng.standard_normal((1, kv_heads, PAST, HEAD_SIZE)).astype(np.float32)
    feeds = multi_head_feeds(rng, kv_heads)
    names = [output.name for output in model.graph.outputs]
    before = dict(zip(names, run(model, feeds | {"past_value": cached}), strict=True))
    after = dict(zip(names, run(result.model, feeds | {"past_value": cached / scale}), strict=True))
    assert relative_difference(after["y"], before["y"]) < TOLERANCE
    assert relative_difference(after["present_value"] * scale, before["present_value"]) < TOLERANCE
