"""Older opsets are converted in substance: another meaning of the same node would change the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from export.forms.opset import lowest_opset, raise_opset
from export.rewrite import rewrite
from stages.errors import GraphError
from stages.records.formats import EmbeddingPlan, EmbeddingTable, WeightForm
from stages.records.results import ExportRecipe
from stages.records.sites import NormAbsorber
from tests.export.builders import (
    ExactWeight,
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

OPSETS = (14, 17, 18, 20)
FLOAT = TensorProto.FLOAT
HEADS, KV_HEADS, SIZE = 4, 2, 16
WIDTH = HEADS * SIZE
# A few float32 layers, whose sums ONNX Runtime may order anew when a MatMul is fused.
TOLERANCE = 1e-5


def _norms(graph: TinyGraph, x: str) -> str:
    """Add LayerNormalization, which is ONNX Runtime's own below opset 17, and its arithmetic written out.

    Axes are an attribute below opset 18.
    """
    gain = graph.constant("gain", np.linspace(0.5, 2, WIDTH, dtype=np.float32))
    bias = graph.constant("beta", np.linspace(-1, 1, WIDTH, dtype=np.float32))
    normed = graph.node("LayerNormalization", [x, gain, bias], ["normed", "mean"], {"axis": -1, "epsilon": 1e-5})
    two = graph.constant("two", np.array(2, np.float32))
    graph.node("Pow", [normed, two], ["squares"])
    if graph.opset < 18:
        graph.node("ReduceMean", ["squares"], ["variance"], {"axes": [-1], "keepdims": 1})
    else:
        last = graph.constant("last", np.array([-1]))
        graph.node("ReduceMean", ["squares", last], ["variance"], {"keepdims": 1})
    graph.node("Sqrt", ["variance"], ["deviation"])
    return graph.node("Div", ["normed", "deviation"], ["scaled"])


def _halves(graph: TinyGraph, x: str) -> str:
    """Split without sizes, whose parts opset 18 wants counted; an empty optional input; Squeeze; Cast."""
    counted = {"num_outputs": 2} if graph.opset >= 18 else {}
    graph.node("Split", [x], ["left", "right"], {"axis": -1, **counted})
    ceiling = graph.constant("ceiling", np.array(0.5, np.float32))
    graph.node("Clip", ["left", "", ceiling], ["clipped"])
    graph.node("Concat", ["right", "clipped"], ["swapped"], {"axis": -1})
    axes = graph.constant("axes", np.array([0]))
    graph.node("Unsqueeze", [graph.node("Squeeze", ["swapped", axes], ["flat"]), axes], ["again"])
    half = graph.node("Cast", ["again"], ["half"], {"to": TensorProto.FLOAT16})
    return graph.node("Cast", [half], ["whole"], {"to": FLOAT})


def _branches(graph: TinyGraph, x: str) -> str:
    """Add an If whose branches reduce and split by the outer graph's opset."""
    branches = {}
    for name, sign in (("then", 1.0), ("else", -1.0)):
        inner = TinyGraph(opset=graph.opset)
        if graph.opset < 18:
            inner.node("ReduceMax", [x], [f"{name}.max"], {"axes": [-1], "keepdims": 1})
        else:
            inner.node("ReduceMax", [x, inner.constant(f"{name}.axes", np.array([-1]))], [f"{name}.max"])
        factor = inner.constant(f"{name}.sign", np.array(sign, np.float32))
        inner.node("Mul", [f"{name}.max", factor], [f"{name}.out"])
        inner.output(f"{name}.out", FLOAT, ["b", "t", 1])
        branches[f"{name}_branch"] = helper.make_graph(inner.nodes, name, [], inner.outputs, inner.initializers)
    graph.input("flag", TensorProto.BOOL, [])
    graph.nodes.append(helper.make_node("If", ["flag"], ["peak"], name="choice", **branches))
    return graph.node("Add", [x, "peak"], ["shifted"])


def _attention(graph: TinyGraph, x: str, weights: dict[str, np.ndarray]) -> None:
    """Norm, packed qkv, GroupQueryAttention, o_proj, skip norm, head: what a builder writes, with empty slots."""
    gain = graph.constant("gain1", np.linspace(0.5, 2, WIDTH, dtype=np.float32))
    graph.node("SimplifiedLayerNormalization", [x, gain], ["h"], {"epsilon": 1e-5, "axis": -1, "stash_type": 1})
    graph.linear("h", weights["qkv"], "qkv")
    for name in ("past_k", "past_v"):
        graph.input(name, FLOAT, ["b", KV_HEADS, "past", SIZE])
    graph.input("mask", TensorProto.INT64, ["b", "total"])
    one = graph.constant("one", np.array([1]))
    graph.node("Sub", [graph.node("ReduceSum", ["mask", one], ["length"], {"keepdims": 0}), one], ["last_index"])
    graph.node("Cast", ["last_index"], ["seqlens"], {"to": TensorProto.INT32})
    graph.node("Gather", [graph.node("Shape", ["mask"], ["shape"]), one], ["total64"], {"axis": 0})
    graph.node("Cast", ["total64"], ["total"], {"to": TensorProto.INT32})
    graph.node(
        "GroupQueryAttention",
        ["qkv", "", "", "past_k", "past_v", "seqlens", "total"],
        ["attention", "present_k", "present_v"],
        {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.25},
        MICROSOFT,
    )
    graph.linear("attention", weights["o"], "o")
    gain = graph.constant("gain2", np.linspace(2, 0.5, WIDTH, dtype=np.float32))
    graph.node("SkipSimplifiedLayerNormalization", [x, "o", gain], ["f", "", "", "sum"], {"epsilon": 1e-5}, MICROSOFT)
    graph.linear("f", weights["y"], "y")
    for name in ("y", "sum"):
        graph.output(name, FLOAT, ["b", "t", None])
    for name in ("present_k", "present_v"):
        graph.output(name, FLOAT, ["b", KV_HEADS, "total", SIZE])


def _decoder(opset: int, weights: dict[str, np.ndarray]) -> TinyGraph:
    graph = TinyGraph(opset=opset)
    graph.input("x", FLOAT, [1, "t", WIDTH])
    _attention(graph, _branches(graph, _halves(graph, _norms(graph, "x"))), weights)
    return graph


def _weights(rng: np.random.Generator) -> dict[str, ExactWeight]:
    qkv = exact_weight(site_of("qkv", "h", WIDTH, (HEADS + 2 * KV_HEADS) * SIZE), spec_of(4), rng, input_scale(rng, 64))
    o = exact_weight(site_of("o", "attention", WIDTH, WIDTH), spec_of(4), rng)
    return {"qkv": qkv, "o": o, "y": exact_weight(site_of("y", "f", WIDTH, 32), spec_of(8), rng)}


def _feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    past = np.zeros((1, KV_HEADS, 0, SIZE), np.float32)
    x = rng.standard_normal((1, 5, WIDTH)).astype(np.float32)
    return {"x": x, "past_k": past, "past_v": past, "mask": np.ones((1, 5), np.int64), "flag": np.array(True)}


def _definitions(model: ir.Model) -> list[str]:
    """Return what makes each value of the graph that is no constant: names, kinds, domains; subgraphs too."""
    return [
        f"{node.name} {node.domain}:{node.op_type} {[value.name for value in node.outputs]}"
        for node in model.graph.all_nodes()
        if node.op_type not in ("Constant", "DequantizeLinear")
    ]


@pytest.mark.parametrize("opset", OPSETS)
def test_a_converted_and_quantized_graph_computes_what_the_old_one_does(
    opset: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    weights = _weights(rng)
    base = _decoder(opset, {name: weight.matrix for name, weight in weights.items()}).model()
    absorbers = {"qkv": NormAbsorber(output="h", parameters=("gain1",))}
    groups = [(group_of([weight], absorber=absorbers.get(name)), [weight]) for name, weight in weights.items()]
    result = rewrite(base, store_of(tmp_path / "weights", groups))
    assert result.model.opset_imports[""] == 21
    assert base.opset_imports[""] == opset
    onnx.checker.check_model(_without_runtimes_own(result.model))
    for flag in (True, False):
        feeds = _feeds(rng) | {"flag": np.array(flag)}
        for found, expected in zip(run(result.model, feeds), run(base, feeds), strict=True):
            assert relative_difference(found, expected) < TOLERANCE


def _without_runtimes_own(model: ir.Model) -> onnx.ModelProto:
    """Return the model as onnx's checker can take it: it has no definition of ONNX Runtime's operators."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = MICROSOFT
    return proto


@pytest.mark.parametrize("opset", OPSETS)
def test_names_nodes_and_other_domains_stay(opset: int, rng: np.random.Generator) -> None:
    base = _decoder(opset, {name: weight.matrix for name, weight in _weights(rng).items()}).model()
    converted = base.clone()
    change = raise_opset(converted, 21)
    assert change is not None
    assert (change.before, change.after) == (opset, 21)
    assert _definitions(converted) == _definitions(base)
    assert [value.name for value in converted.graph.inputs] == [value.name for value in base.graph.inputs]
    assert [value.name for value in converted.graph.outputs] == [value.name for value in base.graph.outputs]
    ours = {node.name: node for node in converted.graph if node.domain == MICROSOFT}
    for node in base.graph:
        if node.domain == MICROSOFT:
            assert ir.to_proto(ours[node.name]) == ir.to_proto(node)


def test_the_same_numbers_would_not_come_from_another_number_on_the_label(rng: np.random.Generator) -> None:
    """The graph of these tests does hold nodes that mean something else, or nothing, in opset 21."""
    base = _decoder(17, {name: weight.matrix for name, weight in _weights(rng).items()}).model()
    base.opset_imports[""] = 21
    with pytest.raises(Exception, match=r"axes|num_outputs"):
        run(base, _feeds(rng))


def test_weights_never_enter_the_converter(rng: np.random.Generator) -> None:
    base = _decoder(17, {name: weight.matrix for name, weight in _weights(rng).items()}).model()
    for value in base.graph.initializers.values():
        value.const_value = _Unreadable(value.const_value)
    raise_opset(base, 21)
    assert base.opset_imports[""] == 21


class _Unreadable:
    """A tensor that fails the test when somebody reads it."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.name, self.shape, self.dtype, self.size, self.nbytes = (
            tensor.name,
            tensor.shape,
            tensor.dtype,
            tensor.size,
            tensor.nbytes,
        )

    def numpy(self) -> np.ndarray:
        pytest.fail(f"{self.name} was read")

    tobytes = __array__ = numpy


@pytest.mark.slow
def test_thousands_of_nodes_are_converted_at_once() -> None:
    graph = TinyGraph(opset=17)
    graph.input("x", FLOAT, ["t", 4])
    last = "x"
    for index in range(3000):
        last = graph.node("ReduceMean", [last], [f"mean{index}"], {"axes": [-1], "keepdims": 1})
    graph.output(last, FLOAT, ["t", 1])
    model = graph.model()
    change = raise_opset(model, 21)
    assert change is not None
    assert change.nodes == 3000
    assert all("axes" not in node.attributes for node in model.graph if node.op_type == "ReduceMean")


@pytest.mark.parametrize(
    ("opset", "op_type", "words"),
    [
        (14, "Gelu", "no operator of its opset 14"),
        (18, "GroupNormalization", "passes over the new length"),
        (6, "Add", "Shape of input 0 is not available"),
    ],
)
def test_what_can_not_be_converted_is_named(opset: int, op_type: str, words: str) -> None:
    graph = TinyGraph(opset=opset)
    graph.input("x", FLOAT, ["n", 4, "t"])
    inputs = {"Gelu": ["x"], "GroupNormalization": ["x", "x", "x"], "Add": ["x", "x"]}[op_type]
    attributes = {"num_groups": 2} if op_type == "GroupNormalization" else {}
    if op_type == "Add":
        attributes = {"axis": 1, "broadcast": 1}
        graph.node("Relu", ["x"], ["harmless"])
    graph.node(op_type, inputs, ["strange"], attributes)
    graph.output("strange", FLOAT, ["n", 4, "t"])
    with pytest.raises(GraphError, match=f"{op_type} 'strange/{op_type}'.*{words}"):
        raise_opset(graph.model(), 21)


def test_a_graph_of_opset_21_or_later_is_left_alone(rng: np.random.Generator) -> None:
    graph = TinyGraph(opset=22)
    graph.input("x", FLOAT, ["t", 4])
    graph.node("Cast", ["x"], ["y"], {"to": TensorProto.FLOAT16})
    graph.output("y", TensorProto.FLOAT16, ["t", 4])
    model = graph.model()
    assert raise_opset(model, 21) is None
    assert model.opset_imports[""] == 22


@pytest.mark.parametrize(
    ("form", "gather", "lowest"),
    [
        (WeightForm.DQ, None, 21),
        (WeightForm.QDQ, None, 21),
        (WeightForm.DQ_COLUMN_MAJOR, None, 21),
        (WeightForm.MATMUL_NBITS, None, 1),
        (WeightForm.MATMUL_NBITS, "gather_block_quantized", 1),
        (WeightForm.MATMUL_NBITS, "dq", 21),
    ],
)
def test_only_dequantize_linear_needs_a_new_opset(form: WeightForm, gather: str | None, lowest: int) -> None:
    recipe = ExportRecipe(
        model_fingerprint="", weight_form=form, fold_input_scales=True, groups=(), kept=(), search="", summary=""
    )
    if gather is not None:
        table = EmbeddingTable(weight="e", gathers=("h",), vocabulary=32, hidden=16, transposed=False, dtype="float32")
        recipe = replace(recipe, embeddings=(EmbeddingPlan(table=table, axis=1, block_size=16, form=gather),))
    assert lowest_opset(recipe) == lowest
