"""Build the graphs that input scales are folded into: norms, up projections, attention of two kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from export.fold import FoldOutcome
from export.rewrite import RewriteResult
from stages.model.sites import find_groups
from stages.records.sites import ActivationGroup, HeadSharing, NormAbsorber, ValueAbsorber
from tests.export.builders import (
    ExactWeight,
    check_rewrite,
    exact_weight,
    group_of,
    input_scale,
    site_of,
    spec_of,
    store_of,
)
from tests.support.graphs import MICROSOFT, TinyGraph

K, N, T = 32, 48, 5
HIDDEN = 48
HEADS = HeadSharing(kv_heads=2, group_size=4, head_size=8)
QUERY, VALUE = 64, 16
QUERY_HEADS, HEAD_SIZE, PAST = 4, 8, 3
"""Of MultiHeadAttention."""
QUERY_WIDTH = QUERY_HEADS * HEAD_SIZE
FLOAT = TensorProto.FLOAT
NORM = NormAbsorber(output="x", parameters=("gain",))


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


def require_mul(result: RewriteResult, words: str) -> None:
    """Require one Mul, whose reason has these words."""
    assert only(result).how == "mul"
    assert words in only(result).reason


def rms_norm_graph(rng: np.random.Generator, weights: Sequence[ExactWeight]) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """Build h -> SimplifiedLayerNormalization -> x -> one MatMul for each weight."""
    graph = TinyGraph()
    floats(graph, "h", K)
    graph.node("SimplifiedLayerNormalization", ["h", graph.constant("gain", gain(rng))], ["x"], {"epsilon": 1e-5})
    for weight in weights:
        graph.linear("x", weight.matrix, weight.stored.site.output)
        show(graph, weight.stored.site.output, weight.stored.site.out_features)
    return graph, {"h": rng.standard_normal((1, T, K)).astype(np.float32)}


def siblings(rng: np.random.Generator, scales: Sequence[np.ndarray | None]) -> list[ExactWeight]:
    return [exact_weight(site_of(f"y{index}", "x", K, N), spec_of(), rng, scale) for index, scale in enumerate(scales)]


# --------------------------------------------------------------------------- up_proj


def gated_graph(
    rng: np.random.Generator, up: np.ndarray, down: ExactWeight, bias: np.ndarray | None
) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """Build x -> Sigmoid(gate) * (up [+ bias]) -> down."""
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


def powered_graph(
    rng: np.random.Generator,
    up: np.ndarray,
    down: ExactWeight,
    *,
    nodes: Sequence[str] = ("Relu", "Pow"),
    bias: np.ndarray | None = None,
    exponent: np.ndarray | None = None,
) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """Build x -> up [+ bias] -> ``nodes`` one after another (Mul: with itself) -> down, as Nemotron's MLP has it."""
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


# --------------------------------------------------------------------------- v_proj of GroupQueryAttention


def tied_scale(rng: np.random.Generator) -> np.ndarray:
    per_value = input_scale(rng, VALUE).reshape(HEADS.kv_heads, 1, HEADS.head_size)
    return np.ascontiguousarray(np.broadcast_to(per_value, (2, 4, 8)).reshape(-1))


def attention_graph(
    rng: np.random.Generator, value: ExactWeight, out: ExactWeight, *, packed: bool, bias: bool
) -> tuple[TinyGraph, dict[str, np.ndarray]]:
    """Build x -> q, k, v (or one qkv), each with a bias -> GroupQueryAttention over a past of 3 tokens -> o_proj."""
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


def split_before_attention(graph: TinyGraph, parts: list[str], sizes: list[int]) -> None:
    """Let attention read q, k and v out of a Split of what was packed; q and k are negated on their way."""
    attention = next(node for node in graph.nodes if node.op_type == "GroupQueryAttention")
    packed = attention.input[0]
    graph.constant("sizes", np.array(sizes, np.int64))
    split = helper.make_node("Split", [packed, "sizes"], parts, name="Split", axis=-1)
    negated = [helper.make_node("Neg", [part], [f"{part}_negated"], name=f"{part}/Neg") for part in ("q", "k")]
    attention.input[:3] = ["q_negated", "k_negated", "v"]
    at = graph.nodes.index(attention)
    graph.nodes[at:at] = [split, *negated]


# --------------------------------------------------------------------------- v_proj of MultiHeadAttention


def _random_linear(graph: TinyGraph, rng: np.random.Generator, name: str, width: int) -> str:
    return graph.linear("x", (rng.standard_normal((K, width)) / 6).astype(np.float32), name)


def _repeat_heads(graph: TinyGraph, source: str, kind: str, kv_heads: int) -> str:
    """Put [1, T, kv_heads * HEAD_SIZE] behind a cache, each head copied for its group, as a model builder writes it."""
    past = graph.input(f"past_{kind}", FLOAT, [1, kv_heads, PAST, HEAD_SIZE])
    group = QUERY_HEADS // kv_heads

    def constant(name: str, numbers: list[int]) -> str:
        return graph.constant(f"{kind}.{name}", np.array(numbers, np.int64))

    graph.node("Reshape", [source, constant("split", [0, 0, kv_heads, -1])], [f"{kind}.heads"])
    graph.node("Transpose", [f"{kind}.heads"], [f"{kind}.first"], {"perm": [0, 2, 1, 3]})
    graph.node("Concat", [past, f"{kind}.first"], [f"present_{kind}"], {"axis": 2})
    graph.output(f"present_{kind}", FLOAT, [1, kv_heads, PAST + T, HEAD_SIZE])
    graph.node("Shape", [f"present_{kind}"], [f"{kind}.shape"])
    graph.output(f"{kind}.shape", TensorProto.INT64, [4])
    graph.node("Unsqueeze", [f"present_{kind}", constant("axis", [2])], [f"{kind}.single"])
    copies = constant("copies", [1, kv_heads, group, PAST + T, HEAD_SIZE])
    graph.node("Expand", [f"{kind}.single", copies], [f"{kind}.copied"])
    graph.node(
        "Reshape", [f"{kind}.copied", constant("merge", [1, QUERY_HEADS, PAST + T, HEAD_SIZE])], [f"{kind}.merged"]
    )
    graph.node("Transpose", [f"{kind}.merged"], [f"{kind}.last"], {"perm": [0, 2, 1, 3]})
    return graph.node("Reshape", [f"{kind}.last", constant("flat", [0, 0, QUERY_WIDTH])], [f"{kind}.repeated"])


def multi_head_graph(
    rng: np.random.Generator, out: ExactWeight, kv_heads: int, value: ExactWeight, bias: bool
) -> TinyGraph:
    graph = TinyGraph()
    graph.input("x", FLOAT, [1, T, K])
    query, key = _random_linear(graph, rng, "q", QUERY_WIDTH), _random_linear(graph, rng, "k", kv_heads * HEAD_SIZE)
    v = graph.linear("x", value.matrix, "v")
    if bias:
        v = graph.node(
            "Add", [v, graph.constant("v.bias", np.linspace(-1, 1, kv_heads * HEAD_SIZE, dtype=np.float32))], ["v+"]
        )
    if kv_heads == QUERY_HEADS:
        past = [graph.input(f"past_{kind}", FLOAT, [1, QUERY_HEADS, PAST, HEAD_SIZE]) for kind in ("key", "value")]
        inputs, outputs = [query, key, v, "", "", "", *past], ["mixed", "present_key", "present_value"]
        for kind in ("key", "value"):
            graph.output(f"present_{kind}", FLOAT, [1, QUERY_HEADS, PAST + T, HEAD_SIZE])
    else:
        inputs = [query, _repeat_heads(graph, key, "key", kv_heads), _repeat_heads(graph, v, "value", kv_heads)]
        outputs = ["mixed"]
    graph.node("MultiHeadAttention", inputs, outputs, {"num_heads": QUERY_HEADS, "scale": 0.25}, MICROSOFT)
    graph.linear("mixed", out.matrix, "y")
    graph.output("y", FLOAT, [1, T, N])
    return graph


def multi_head_model(graph: TinyGraph) -> ir.Model:
    """Return the model, with the shapes of its reshaped heads declared as the builder declares them."""
    model = graph.model()
    for node in model.graph:
        if node.op_type == "Reshape" and node.outputs[0].name.endswith(("heads", "merged")):
            heads = int(model.graph.initializers[f"{node.outputs[0].name.split('.')[0]}.split"].const_value.numpy()[2])
            merged = node.outputs[0].name.endswith("merged")
            node.outputs[0].shape = ir.Shape(["b", QUERY_HEADS if merged else "t", "t" if merged else heads, HEAD_SIZE])
    return model


def multi_head_scale(rng: np.random.Generator, kv_heads: int) -> np.ndarray:
    per_value = input_scale(rng, kv_heads * HEAD_SIZE).reshape(kv_heads, 1, HEAD_SIZE)
    return np.ascontiguousarray(np.broadcast_to(per_value, (kv_heads, QUERY_HEADS // kv_heads, HEAD_SIZE)).reshape(-1))


def multi_head_feeds(rng: np.random.Generator, kv_heads: int) -> dict[str, np.ndarray]:
    cache = (1, kv_heads, PAST, HEAD_SIZE)
    feeds = {"x": rng.standard_normal((1, T, K)), "past_key": rng.standard_normal(cache), "past_value": np.zeros(cache)}
    return {name: value.astype(np.float32) for name, value in feeds.items()}


def multi_head_weights(rng: np.random.Generator, kv_heads: int) -> tuple[ExactWeight, ExactWeight]:
    value = exact_weight(site_of("v", "x", K, kv_heads * HEAD_SIZE), spec_of(), rng)
    return value, exact_weight(site_of("y", "mixed", QUERY_WIDTH, N), spec_of(), rng, multi_head_scale(rng, kv_heads))


def planned_group(model: ir.Model) -> ActivationGroup:
    return next(group for group in find_groups(model) if group.activation == "mixed")


def fold_multi_head(
    folder: Path,
    graph: TinyGraph,
    out: ExactWeight,
    value: ExactWeight,
    feeds: dict[str, np.ndarray],
    group: ActivationGroup,
) -> FoldOutcome:
    """Rewrite with V quantized too; every output but V's own cache stays as it was."""
    store = store_of(folder / "weights", [(group_of([value]), [value]), (group, [out])])
    return check_rewrite(multi_head_model(graph), store, feeds, ignored=["present_value"]).folds[-1]
