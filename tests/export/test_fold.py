"""Folding an input scale leaves the graph's outputs as they were; every failed guard ends in a Mul that does too.

Stored weights stand for W * s exactly, and the base graphs hold W.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from export.fold import FoldOutcome
from export.rewrite import RewriteResult, rewrite
from stages.errors import OptionError
from stages.model.sites import find_groups
from stages.records.formats import PerChannel
from stages.records.sites import ActivationGroup, HeadSharing, LinearAbsorber, NormAbsorber, ValueAbsorber
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
from tests.support.graphs import MICROSOFT, TinyGraph

K, N, T = 32, 48, 5


def gain(rng: np.random.Generator, size: int = K) -> np.ndarray:
    return rng.uniform(0.5, 2.0, size).astype(np.float32)


def matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


def floats(graph: TinyGraph, name: str, width: int) -> str:
    return graph.input(name, TensorProto.FLOAT, [1, T, width])


def show(graph: TinyGraph, name: str, width: int) -> str:
    return graph.output(name, TensorProto.FLOAT, [1, T, width])


def check(
    folder: Path,
    graph: TinyGraph,
    groups: Sequence[tuple[ActivationGroup, Sequence[ExactWeight]]],
    feeds: dict[str, np.ndarray],
    *,
    ignored: Sequence[str] = (),
    fold: bool = True,
) -> RewriteResult:
    return check_rewrite(graph.model(), store_of(folder / "weights", groups, fold=fold), feeds, ignored=ignored)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def only(result: RewriteResult) -> FoldOutcome:
    (outcome,) = result.folds
    return outcome


def rms_norm_graph(rng: np.random.Generator, weights: Sequence[ExactWeight]) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """h -> SimplifiedLayerNormalization -> x -> one MatMul for each weight."""
    graph = TinyGraph()
    floats(graph, "h", K)
    graph.node("SimplifiedLayerNormalization", ["h", graph.constant("gain", gain(rng))], ["x"], {"epsilon": 1e-5})
    for weight in weights:
        graph.linear("x", weight.matrix, weight.stored.site.output)
        show(graph, weight.stored.site.output, weight.stored.site.out_features)
    return graph, {"h": rng.standard_normal((1, T, K)).astype(np.float32)}


def siblings(rng: np.random.Generator, scales: Sequence[np.ndarray | None]) -> list[ExactWeight]:
    return [exact_weight(site_of(f"y{index}", "x", K, N), spec_of(), rng, scale) for index, scale in enumerate(scales)]


NORM = NormAbsorber(output="x", parameters=("gain",))


# --------------------------------------------------------------------------- norms


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
    assert only(result).how == "mul"
    assert "comes from Cast" in only(result).reason


def test_another_reader_of_the_activation_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)] * 2)
    graph, feeds = rms_norm_graph(rng, weights)
    graph.linear("x", matrix(rng, K, N), "kept")
    show(graph, "kept", N)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    assert only(result).how == "mul"
    assert "MatMul 'kept/MatMul'" in only(result).reason
    # One Mul for both sites; the reader that is not quantized has none.
    assert op_types(result.model).count("Mul") == 1


def test_an_activation_that_is_a_graph_output_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)])
    graph, feeds = rms_norm_graph(rng, weights)
    show(graph, "x", K)
    result = check(tmp_path, graph, [(group_of(weights, absorber=NORM), weights)], feeds)
    assert only(result).how == "mul"
    assert "output of the graph" in only(result).reason


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
    assert only(result).how == "mul"
    assert "recipe" in only(result).reason


def test_a_group_without_absorber_gives_its_own_reason(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = siblings(rng, [input_scale(rng, K)])
    graph, feeds = rms_norm_graph(rng, weights)
    group = group_of(weights, unfoldable_because="it comes from Softmax")
    result = check(tmp_path, graph, [(group, weights)], feeds)
    assert only(result) == FoldOutcome(activation="x", sites=("y0/MatMul",), how="mul", reason="it comes from Softmax")


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
    assert only(result).how == "mul"
    assert "gain of its SimplifiedLayerNormalization is not a constant" in only(result).reason


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


HIDDEN = 48


def gated_graph(
    rng: np.random.Generator, up: np.ndarray, down: ExactWeight, bias: np.ndarray | None
) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """x -> Sigmoid(gate) * (up [+ bias]) -> down."""
    graph = TinyGraph()
    floats(graph, "x", K)
    graph.node("Sigmoid", [graph.linear("x", matrix(rng, K, HIDDEN), "gate")], ["act"])
    factor = graph.linear("x", up, "up")
    if bias is not None:
        factor = graph.node("Add", [graph.constant("up.bias", bias), "up"], ["up_plus"])
    graph.node("Mul", ["act", factor], ["product"])
    graph.linear("product", down.matrix, "y")
    show(graph, "y", N)
    return graph, {"x": rng.standard_normal((1, T, K)).astype(np.float32)}


def down_weight(rng: np.random.Generator, scale: np.ndarray | None = None) -> ExactWeight:
    scale = input_scale(rng, HIDDEN) if scale is None else scale
    return exact_weight(site_of("y", "product", HIDDEN, N), spec_of(), rng, scale)


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


@pytest.mark.parametrize("seen", ["up", "up_plus"])
def test_an_up_projection_that_others_see_is_left_alone(tmp_path: Path, rng: np.random.Generator, seen: str) -> None:
    down = down_weight(rng)
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, gain(rng, HIDDEN))
    show(graph, seen, HIDDEN)
    absorber = LinearAbsorber(site="up/MatMul", bias="up.bias")
    result = check(tmp_path, graph, [(group_of([down], absorber=absorber), [down])], feeds)
    assert only(result).how == "mul"
    assert "linear layer alone" in only(result).reason


def test_a_bias_that_was_not_planned_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, gain(rng, HIDDEN))
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul"))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    assert only(result).how == "mul"
    assert "(bias)" in only(result).reason


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
    assert only(result).how == "mul"
    assert "linear layer alone" in only(result).reason


def test_an_absorber_that_is_not_in_the_graph_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    down = down_weight(rng)
    graph, feeds = gated_graph(rng, matrix(rng, K, HIDDEN), down, None)
    group = group_of([down], absorber=LinearAbsorber(site="elsewhere"))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    assert only(result).how == "mul"
    assert "(site)" in only(result).reason


# --------------------------------------------------------------------------- up_proj behind a Relu or a square


def powered_graph(
    rng: np.random.Generator,
    up: np.ndarray,
    down: ExactWeight,
    *,
    nodes: Sequence[str] = ("Relu", "Pow"),
    bias: np.ndarray | None = None,
    exponent: np.ndarray | None = None,
) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """x -> up [+ bias] -> ``nodes`` one after another (Mul: with itself) -> down, as Nemotron's MLP has it."""
    graph = TinyGraph()
    floats(graph, "x", K)
    value = graph.linear("x", up, "up")
    if bias is not None:
        value = graph.node("Add", [value, graph.constant("up.bias", bias)], ["up_plus"])
    two = np.array([2], np.int32) if exponent is None else exponent
    for index, op_type in enumerate(nodes):
        inputs = {"Relu": [value], "Mul": [value, value], "Pow": [value, "two"]}[op_type]
        value = graph.node(op_type, inputs, ["product" if index == len(nodes) - 1 else "positive"])
    graph.constant("two", two)
    graph.linear("product", down.matrix, "y")
    show(graph, "y", N)
    return graph, {"x": rng.standard_normal((1, T, K)).astype(np.float32)}


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
    assert only(result).how == "mul"
    assert "planned" in only(result).reason


@pytest.mark.parametrize("exponent", [np.array([3], np.int32), np.array([2.5], np.float32), np.full(HIDDEN, 2.0, "f4")])
def test_another_exponent_forces_a_mul(tmp_path: Path, rng: np.random.Generator, exponent: np.ndarray) -> None:
    down = down_weight(rng)
    graph, feeds = powered_graph(rng, matrix(rng, K, HIDDEN), down, exponent=exponent)
    group = group_of([down], absorber=LinearAbsorber(site="up/MatMul", power=2))
    result = check(tmp_path, graph, [(group, [down])], feeds)
    assert only(result).how == "mul"
    assert "exponent isn't the constant 2" in only(result).reason


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
    assert only(result).how == "mul"
    assert "linear layer alone" in only(result).reason


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


# --------------------------------------------------------------------------- v_proj


HEADS = HeadSharing(kv_heads=2, group_size=4, head_size=8)
QUERY, VALUE = 64, 16


def tied_scale(rng: np.random.Generator) -> np.ndarray:
    per_value = input_scale(rng, VALUE).reshape(HEADS.kv_heads, 1, HEADS.head_size)
    return np.ascontiguousarray(np.broadcast_to(per_value, (2, 4, 8)).reshape(-1))


def attention_graph(
    rng: np.random.Generator, value: ExactWeight, out: ExactWeight, *, packed: bool, bias: bool
) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """x -> q, k, v (or one qkv), each with a bias -> GroupQueryAttention over a past of 3 tokens -> o_proj."""
    graph = TinyGraph()
    floats(graph, "x", K)

    def with_bias(name: str, width: int) -> str:
        if not bias:
            return name
        constant = graph.constant(f"{name}.bias", rng.standard_normal(width).astype(np.float32))
        return graph.node("Add", [name, constant], [f"{name}_plus"])

    if packed:
        graph.linear("x", value.matrix, "qkv")
        heads = [with_bias("qkv", QUERY + 2 * VALUE), "", ""]
    else:
        graph.linear("x", matrix(rng, K, QUERY), "q")
        graph.linear("x", matrix(rng, K, VALUE), "k")
        graph.linear("x", value.matrix, "v")
        heads = [with_bias("q", QUERY), with_bias("k", VALUE), with_bias("v", VALUE)]
    past = [graph.input(f"past_{part}", TensorProto.FLOAT, [1, 2, 3, 8]) for part in ("key", "value")]
    lengths = [
        graph.constant("seqlens_k", np.array([T + 2], np.int32)),
        graph.constant("total", np.array(T + 3, np.int32)),
    ]
    graph.node(
        "GroupQueryAttention",
        [*heads, *past, *lengths],
        ["mixed", "present_key", "present_value"],
        {"num_heads": 8, "kv_num_heads": 2},
        MICROSOFT,
    )
    graph.linear("mixed", out.matrix, "y")
    show(graph, "y", N)
    for part in ("key", "value"):
        graph.output(f"present_{part}", TensorProto.FLOAT, [1, 2, T + 3, 8])
    feeds = {"x": rng.standard_normal((1, T, K)).astype(np.float32)}
    # The value cache is kept divided by s, so only an empty or a divided one compares; keys are as they were.
    feeds |= {"past_key": rng.standard_normal((1, 2, 3, 8)).astype(np.float32)}
    return graph, feeds | {"past_value": np.zeros((1, 2, 3, 8), np.float32)}


def attention_weights(rng: np.random.Generator, *, packed: bool, scale: np.ndarray) -> tuple[ExactWeight, ExactWeight]:
    name, width = ("qkv", QUERY + 2 * VALUE) if packed else ("v", VALUE)
    value = exact_weight(site_of(name, "x", K, width), spec_of(), rng)
    return value, exact_weight(site_of("y", "mixed", QUERY, N), spec_of(), rng, scale)


def value_absorber(*, packed: bool, bias: bool) -> ValueAbsorber:
    name = "qkv" if packed else "v"
    return ValueAbsorber(
        site=f"{name}/MatMul",
        first_channel=QUERY + VALUE if packed else 0,
        heads=HEADS,
        bias=f"{name}.bias" if bias else None,
    )


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


def split_before_attention(graph: TinyGraph, parts: list[str], sizes: list[int]) -> None:
    """Attention reads q, k and v out of a Split of what was packed; q and k are negated on their way."""
    attention = next(node for node in graph.nodes if node.op_type == "GroupQueryAttention")
    packed = attention.input[0]
    graph.constant("sizes", np.array(sizes, np.int64))
    split = helper.make_node("Split", [packed, "sizes"], parts, name="Split", axis=-1)
    negated = [helper.make_node("Neg", [part], [f"{part}_negated"], name=f"{part}/Neg") for part in ("q", "k")]
    attention.input[:3] = ["q_negated", "k_negated", "v"]
    at = graph.nodes.index(attention)
    graph.nodes[at:at] = [split, *negated]


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


def test_a_value_that_is_not_split_off_last_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    split_before_attention(graph, ["q", "v", "k"], [QUERY, VALUE, VALUE])
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    assert only(result).how == "mul"
    assert "V does not come from a linear layer alone" in only(result).reason


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
    assert only(result).how == "mul"
    assert "(first_channel)" in only(result).reason


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
    assert only(result).how == "mul"
    assert "(site)" in only(result).reason


def test_a_value_cache_that_another_node_reads_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    graph.node("Neg", ["present_value"], ["shared"])
    graph.output("shared", TensorProto.FLOAT, [1, 2, T + 3, 8])
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    assert only(result).how == "mul"
    assert "cache" in only(result).reason


def test_a_past_that_is_no_graph_input_forces_a_mul(tmp_path: Path, rng: np.random.Generator) -> None:
    value, out = attention_weights(rng, packed=True, scale=tied_scale(rng))
    graph, feeds = attention_graph(rng, value, out, packed=True, bias=False)
    # A constant prefix: its values would not be divided.
    prefix = graph.constant("prefix", rng.standard_normal((1, 2, 3, 8)).astype(np.float32))
    attention = next(node for node in graph.nodes if node.op_type == "GroupQueryAttention")
    attention.input[4] = prefix
    group = group_of([out], absorber=value_absorber(packed=True, bias=False))
    result = check(tmp_path, graph, [(group, [out])], feeds)
    assert only(result).how == "mul"
    assert "shares its cache" in only(result).reason


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
