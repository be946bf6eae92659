"""A Relu alone behind a MatMul keeps ONNX Runtime from fusing it; Max(x, 0) in its place computes the same, fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from export.fusion import why_not_fused
from export.rewrite import rewrite
from tests.export.builders import exact_weight, run, site_of, spec_of, store_of_each
from tests.graphs import TinyGraph

TOKENS = 3


def squared_relu(matrix: np.ndarray, *, second_reader: bool = False, relu: str = "Relu") -> TinyGraph:
    """x -> up -> Relu -> Pow 2 -> y, as Nemotron's MLP has it."""
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [1, TOKENS, 64])
    graph.linear("x", matrix, "up")
    graph.node(relu, ["up"], ["positive"])
    graph.node("Pow", ["positive", graph.constant("two", np.array([2], np.int32))], ["y"])
    graph.output("y", TensorProto.FLOAT, [1, TOKENS, 32])
    if second_reader:
        graph.node("Neg", ["positive"], ["z"])
        graph.output("z", TensorProto.FLOAT, [1, TOKENS, 32])
    return graph


def fused_types(model: ir.Model, feeds: dict[str, np.ndarray], folder: Path) -> list[str]:
    run(model, feeds, optimized_file=folder / "optimized.onnx")
    return [node.op_type for node in ir.load(folder / "optimized.onnx").graph]


def test_a_relu_behind_a_site_becomes_a_max_and_the_site_is_fused(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    base = squared_relu(up.matrix).model()
    result = rewrite(base, store_of_each(tmp_path / "weights", up))
    feeds = {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    # Sums of 64 products in another order, then squared.
    np.testing.assert_allclose(run(result.model, feeds)[0], run(base, feeds)[0], rtol=1e-4, atol=1e-4)
    assert "Relu" not in [node.op_type for node in result.model.graph]
    assert "MatMulNBits" in fused_types(result.model, feeds, tmp_path)


def test_the_runtime_still_needs_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """When this fails, ONNX Runtime has learnt to fuse in front of a Relu, and export/relu.py can go."""
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    model = rewrite(squared_relu(up.matrix).model(), store_of_each(tmp_path / "weights", up)).model
    clamp = next(node for node in model.graph if node.op_type == "Max")
    clamp.op_type = "Relu"
    clamp.resize_inputs(1)
    feeds = {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    assert "MatMulNBits" not in fused_types(model, feeds, tmp_path)
    site = clamp.inputs[0].producer()
    assert "a Relu alone reads its result" in why_not_fused(site, spec_of(4), (1, 31))


def test_a_relu_that_two_nodes_read_stays(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    base = squared_relu(up.matrix, second_reader=True).model()
    result = rewrite(base, store_of_each(tmp_path / "weights", up))
    feeds = {"x": rng.standard_normal((1, TOKENS, 64)).astype(np.float32)}
    assert "Relu" in [node.op_type for node in result.model.graph]
    assert "MatMulNBits" in fused_types(result.model, feeds, tmp_path)


def test_another_activation_stays(tmp_path: Path, rng: np.random.Generator) -> None:
    up = exact_weight(site_of("up", "x", 64, 32), spec_of(4), rng)
    base = squared_relu(up.matrix, relu="Sigmoid").model()
    result = rewrite(base, store_of_each(tmp_path / "weights", up))
    assert [node.op_type for node in result.model.graph] == ["DequantizeLinear", "MatMul", "Sigmoid", "Pow"]
