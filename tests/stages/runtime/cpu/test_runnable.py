"""Norms inside attention run as nodes before it on the CPU, with the same numbers; what it can't run is named early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.runtime.cpu.norms import must_write_out_norms, write_out_norms
from stages.runtime.cpu.runnable import open_file, runnable_graph
from stages.runtime.providers import CPU, CPU_ONLY, CUDA, choose_providers
from stages.runtime.session import SessionSettings, open_session
from stages.runtime.tap import require_kernels
from tests.support.graphs import MICROSOFT, TinyGraph

HEADS, KV_HEADS, SIZE, LENGTH = 4, 2, 16, 5
WIDTHS = {"query": HEADS * SIZE, "key": KV_HEADS * SIZE, "value": KV_HEADS * SIZE}
FLOAT = TensorProto.FLOAT
# Sums of 16 float32 squares in another order.
TOLERANCE = 1e-5


def attention(*, packed: bool, norms: tuple[str, str], epsilon: float) -> TinyGraph:
    """Return attention over full windows; ``norms`` name the gains of q's and k's norm, or are empty."""
    graph, rng = TinyGraph(), np.random.default_rng(0)
    parts = {"query": sum(WIDTHS.values())} if packed else WIDTHS
    inputs = [graph.input(name, FLOAT, [1, LENGTH, width]) for name, width in parts.items()]
    inputs += [""] * (3 - len(inputs))
    inputs += [graph.constant(f"past_{name}", np.zeros((1, KV_HEADS, 0, SIZE), np.float32)) for name in "kv"]
    inputs += [
        graph.constant("last", np.array([LENGTH - 1], np.int32)),
        graph.constant("all", np.array(LENGTH, np.int32)),
    ]
    angles = np.arange(LENGTH)[:, None] * np.logspace(0, -3, SIZE // 2)
    inputs += [graph.constant(name, f(angles).astype(np.float32)) for name, f in (("cos", np.cos), ("sin", np.sin))]
    inputs += [""] * 5
    for name in norms:
        inputs.append(graph.constant(name, rng.uniform(0.5, 2, SIZE).astype(np.float32)) if name else "")
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1}
    if any(norms):
        attributes["qk_norm_epsilon"] = epsilon
    graph.node("GroupQueryAttention", inputs, ["y", "present_k", "present_v"], attributes, MICROSOFT)
    graph.output("y", FLOAT, [1, LENGTH, HEADS * SIZE])
    graph.output("present_k", FLOAT, [1, KV_HEADS, LENGTH, SIZE])
    return graph


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return open_session(ir.to_proto(model).SerializeToString(), SessionSettings()).run(None, feeds)


def normalized(heads: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    apart = heads.reshape(1, LENGTH, -1, SIZE).astype(np.float64)
    apart = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + epsilon) * gain
    return apart.reshape(heads.shape).astype(np.float32)


@pytest.mark.parametrize("norms", [("q_gain", "k_gain"), ("q_gain", ""), ("", "k_gain")])
@pytest.mark.parametrize("packed", [False, True])
def test_written_out_norms_give_what_attention_reads_of_normalized_heads(packed: bool, norms: tuple[str, str]) -> None:
    epsilon = 0.3
    model = attention(packed=packed, norms=norms, epsilon=epsilon).model()
    rng = np.random.default_rng(1)
    parts = {name: rng.standard_normal((1, LENGTH, width)).astype(np.float32) for name, width in WIDTHS.items()}
    feeds = {"query": np.concatenate(list(parts.values()), axis=-1)} if packed else parts
    found = run(write_out_norms(model), feeds)
    for name, gain in zip(("query", "key"), norms, strict=True):
        if gain:
            numbers = model.graph.initializers[gain].const_value
            assert numbers is not None
            parts[name] = normalized(parts[name], numbers.numpy(), epsilon)
    expected = run(attention(packed=False, norms=("", ""), epsilon=epsilon).model(), parts)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
    with pytest.raises(Exception, match="not supported"):  # if this fails, the CPU has learned it: delete the rewrite
        run(model, feeds)


@pytest.mark.parametrize(
    ("norms", "providers", "rewritten"),
    [(("q", "k"), CPU_ONLY, True), (("q", "k"), (CUDA, CPU), False), (("", ""), CPU_ONLY, False)],
)
def test_only_what_the_providers_lack_is_rewritten(
    tmp_path: Path, norms: tuple[str, str], providers: tuple[str, ...], rewritten: bool
) -> None:
    graph = attention(packed=False, norms=norms, epsilon=1e-6)
    path = graph.save(tmp_path)
    assert must_write_out_norms(graph.model(), providers) == rewritten
    with runnable_graph(graph.model(), providers, tmp_path) as source:
        assert isinstance(source, bytes)
        assert (b"SimplifiedLayerNormalization" in source) == rewritten
    if providers == CPU_ONLY:
        with open_file(path, SessionSettings(), tmp_path) as session:
            assert [value.name for value in session.get_outputs()] == ["y", "present_k"]


def test_operators_without_a_cpu_kernel_are_named_before_anything_runs(tmp_path: Path) -> None:
    graph = TinyGraph()
    graph.input("x", FLOAT, [1, 4, 16])
    graph.linear("x", np.ones((16, 64), np.float32), "h")
    graph.node("BiasSplitGelu", ["h", graph.constant("b", np.ones(64, np.float32))], ["y"], None, MICROSOFT)
    graph.output("y", FLOAT, [1, 4, 32])
    directory = locate_model(graph.save(tmp_path))
    directory.onnx_file.with_name("model.onnx.data").write_bytes(b"")  # nothing of the weights is read
    with pytest.raises(GraphError, match=r"BiasSplitGelu.*--algo rtn_dq"):
        require_kernels(ir.load(directory.onnx_file), directory, choose_providers("cpu"))
