"""MultiHeadAttention is linear in V too: apart with a cache of its own, or with heads that nodes repeat before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from export.fold import FoldOutcome
from export.rewrite import rewrite
from stages.model.sites import find_groups
from stages.records.sites import ActivationGroup, HeadSharing, ValueAbsorber
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

K, N, T, PAST = 32, 48, 5, 3
HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE
FLOAT = TensorProto.FLOAT
Change = Callable[[TinyGraph], None]


def _linear(graph: TinyGraph, rng: np.random.Generator, name: str, width: int) -> str:
    return graph.linear("x", (rng.standard_normal((K, width)) / 6).astype(np.float32), name)


def _repeat(graph: TinyGraph, source: str, kind: str, kv_heads: int) -> str:
    """[1, T, kv_heads * SIZE] behind a cache, each head copied for its group, as a model builder writes it."""
    past = graph.input(f"past_{kind}", FLOAT, [1, kv_heads, PAST, SIZE])
    group = HEADS // kv_heads

    def constant(name: str, numbers: list[int]) -> str:
        return graph.constant(f"{kind}.{name}", np.array(numbers, np.int64))

    graph.node("Reshape", [source, constant("split", [0, 0, kv_heads, -1])], [f"{kind}.heads"])
    graph.node("Transpose", [f"{kind}.heads"], [f"{kind}.first"], {"perm": [0, 2, 1, 3]})
    graph.node("Concat", [past, f"{kind}.first"], [f"present_{kind}"], {"axis": 2})
    graph.output(f"present_{kind}", FLOAT, [1, kv_heads, PAST + T, SIZE])
    graph.node("Shape", [f"present_{kind}"], [f"{kind}.shape"])
    graph.output(f"{kind}.shape", TensorProto.INT64, [4])
    graph.node("Unsqueeze", [f"present_{kind}", constant("axis", [2])], [f"{kind}.single"])
    copies = constant("copies", [1, kv_heads, group, PAST + T, SIZE])
    graph.node("Expand", [f"{kind}.single", copies], [f"{kind}.copied"])
    graph.node("Reshape", [f"{kind}.copied", constant("merge", [1, HEADS, PAST + T, SIZE])], [f"{kind}.merged"])
    graph.node("Transpose", [f"{kind}.merged"], [f"{kind}.last"], {"perm": [0, 2, 1, 3]})
    return graph.node("Reshape", [f"{kind}.last", constant("flat", [0, 0, WIDTH])], [f"{kind}.repeated"])


def _graph(rng: np.random.Generator, out: ExactWeight, kv_heads: int, value: ExactWeight, bias: bool) -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", FLOAT, [1, T, K])
    query, key = _linear(graph, rng, "q", WIDTH), _linear(graph, rng, "k", kv_heads * SIZE)
    v = graph.linear("x", value.matrix, "v")
    if bias:
        v = graph.node(
            "Add", [v, graph.constant("v.bias", np.linspace(-1, 1, kv_heads * SIZE, dtype=np.float32))], ["v+"]
        )
    if kv_heads == HEADS:
        past = [graph.input(f"past_{kind}", FLOAT, [1, HEADS, PAST, SIZE]) for kind in ("key", "value")]
        inputs, outputs = [query, key, v, "", "", "", *past], ["mixed", "present_key", "present_value"]
        for kind in ("key", "value"):
            graph.output(f"present_{kind}", FLOAT, [1, HEADS, PAST + T, SIZE])
    else:
        inputs = [query, _repeat(graph, key, "key", kv_heads), _repeat(graph, v, "value", kv_heads)]
        outputs = ["mixed"]
    graph.node("MultiHeadAttention", inputs, outputs, {"num_heads": HEADS, "scale": 0.25}, MICROSOFT)
    graph.linear("mixed", out.matrix, "y")
    graph.output("y", FLOAT, [1, T, N])
    return graph


def _model(graph: TinyGraph) -> ir.Model:
    """The model, with the shapes of its reshaped heads declared as the builder declares them."""
    model = graph.model()
    for node in model.graph:
        if node.op_type == "Reshape" and node.outputs[0].name.endswith(("heads", "merged")):
            heads = int(model.graph.initializers[f"{node.outputs[0].name.split('.')[0]}.split"].const_value.numpy()[2])
            merged = node.outputs[0].name.endswith("merged")
            node.outputs[0].shape = ir.Shape(["b", HEADS if merged else "t", "t" if merged else heads, SIZE])
    return model


def _tied_scale(rng: np.random.Generator, kv_heads: int) -> np.ndarray:
    per_value = input_scale(rng, kv_heads * SIZE).reshape(kv_heads, 1, SIZE)
    return np.ascontiguousarray(np.broadcast_to(per_value, (kv_heads, HEADS // kv_heads, SIZE)).reshape(-1))


def _feeds(rng: np.random.Generator, kv_heads: int) -> dict[str, np.ndarray]:
    cache = (1, kv_heads, PAST, SIZE)
    feeds = {"x": rng.standard_normal((1, T, K)), "past_key": rng.standard_normal(cache), "past_value": np.zeros(cache)}
    return {name: value.astype(np.float32) for name, value in feeds.items()}


def _weights(rng: np.random.Generator, kv_heads: int) -> tuple[ExactWeight, ExactWeight]:
    value = exact_weight(site_of("v", "x", K, kv_heads * SIZE), spec_of(), rng)
    return value, exact_weight(site_of("y", "mixed", WIDTH, N), spec_of(), rng, _tied_scale(rng, kv_heads))


def _planned(model: ir.Model) -> ActivationGroup:
    return next(group for group in find_groups(model) if group.activation == "mixed")


def _fold(
    folder: Path,
    graph: TinyGraph,
    out: ExactWeight,
    value: ExactWeight,
    feeds: dict[str, np.ndarray],
    group: ActivationGroup,
) -> FoldOutcome:
    """Rewrite with V quantized too; every output but V's own cache stays as it was."""
    store = store_of(folder / "weights", [(group_of([value]), [value]), (group, [out])])
    return check_rewrite(_model(graph), store, feeds, ignored=["present_value"]).folds[-1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_what_is_planned_is_folded_and_changes_no_output(
    tmp_path: Path, rng: np.random.Generator, kv_heads: int, bias: bool
) -> None:
    value, out = _weights(rng, kv_heads)
    graph = _graph(rng, out, kv_heads, value, bias)
    group = _planned(_model(graph))
    assert group.absorber == ValueAbsorber(
        site="v/MatMul",
        first_channel=0,
        heads=HeadSharing(kv_heads=kv_heads, group_size=HEADS // kv_heads, head_size=SIZE),
        bias="v.bias" if bias else None,
    )
    assert _fold(tmp_path, graph, out, value, _feeds(rng, kv_heads), group).how == "value"


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_value_cache_goes_on_where_it_stopped(tmp_path: Path, rng: np.random.Generator, kv_heads: int) -> None:
    value, out = _weights(rng, kv_heads)
    model = _model(_graph(rng, out, kv_heads, value, bias=False))
    result = rewrite(model, store_of(tmp_path / "weights", [(_planned(model), [out])]))
    assert result.folds[0].how == "value"
    scale = out.stored.input_scale.numpy().reshape(kv_heads, HEADS // kv_heads, SIZE)[:, 0][None, :, None]
    cached = rng.standard_normal((1, kv_heads, PAST, SIZE)).astype(np.float32)
    feeds = _feeds(rng, kv_heads)
    names = [output.name for output in model.graph.outputs]
    before = dict(zip(names, run(model, feeds | {"past_value": cached}), strict=True))
    after = dict(zip(names, run(result.model, feeds | {"past_value": cached / scale}), strict=True))
    assert relative_difference(after["y"], before["y"]) < TOLERANCE
    assert relative_difference(after["present_value"] * scale, before["present_value"]) < TOLERANCE


def _own_bias(graph: TinyGraph) -> None:
    bias = graph.constant("qkv.bias", np.ones(3 * WIDTH, np.float32))
    attention = next(node for node in graph.nodes if node.op_type == "MultiHeadAttention")
    attention.input.extend([""] * (4 - len(attention.input)))
    attention.input[3] = bias


def _constant_past(graph: TinyGraph) -> None:
    graph.constant("prefix", np.ones((1, HEADS, PAST, SIZE), np.float32))
    next(node for node in graph.nodes if node.op_type == "MultiHeadAttention").input[7] = "prefix"


def _read_copies(graph: TinyGraph) -> None:
    graph.output(graph.node("Neg", ["value.copied"], ["seen"]), FLOAT, [1, 2, 2, PAST + T, SIZE])


def _read_cache(graph: TinyGraph) -> None:
    graph.output(graph.node("Neg", ["present_value"], ["seen"]), FLOAT, [1, None, PAST + T, SIZE])


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
            tensor.CopyFrom(helper.make_tensor("value.copies", TensorProto.INT64, [5], [1, 2, 2, PAST + T, SIZE]))


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
def test_what_would_be_seen_elsewhere_keeps_a_mul(
    tmp_path: Path, rng: np.random.Generator, kv_heads: int, change: Change
) -> None:
    value, out = _weights(rng, kv_heads)
    graph = _graph(rng, out, kv_heads, value, bias=False)
    planned = _planned(_model(graph))
    change(graph)
    # The export refuses what was planned for the graph before the change; so does planning where it can see it.
    outcome = _fold(tmp_path, graph, out, value, _feeds(rng, kv_heads), planned)
    assert outcome.how == "mul"
    assert outcome.reason
    if change not in (_constant_past, _read_cache) or kv_heads < HEADS:
        assert _planned(_model(graph)).absorber is None
