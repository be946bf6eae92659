"""One node with what makes its weight runs by itself, and gives what it gives in the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from tests.support.graphs import TinyGraph


def test_a_node_runs_with_the_weight_from_the_data_file_and_without_the_rest(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    graph = TinyGraph()
    graph.input("before", TensorProto.FLOAT, [2, 3])
    graph.node("Tanh", ["before"], ["x"])
    graph.node("Transpose", [graph.constant("rows", weight)], ["columns"], {"perm": [1, 0]})
    graph.node("MatMul", ["x", "columns"], ["product"])
    graph.output(graph.node("Neg", ["product"], ["y"]), TensorProto.FLOAT, [2, 4])
    saved = ir.load(graph.save(tmp_path))
    node = next(node for node in saved.graph if node.op_type == "MatMul")
    kind = ir.TensorType(ir.DataType.FLOAT)
    x, y = (ir.Value(name=name, shape=ir.Shape((2, size)), type=kind) for name, size in (("x", 3), ("y", 4)))
    isolated = IsolatedModel()
    last = ir.node("MatMul", [x, isolated.copy(node.inputs[1])], outputs=[y])
    model = isolated.ending_in(last, x, saved.graph)
    assert [each.op_type for each in model.graph] == ["Transpose", "MatMul"]
    rows = rng.standard_normal((2, 3)).astype(np.float32)
    np.testing.assert_allclose(run_isolated(model, rows, tmp_path), rows @ weight.T, rtol=1e-5)
    assert len(node.inputs[1].uses()) == 1, "the saved graph stays as it was"


def test_errors_are_relative_to_the_largest_number() -> None:
    reference = np.array([[2.0, -4.0]])
    assert relative_error(np.array([[2.0, -3.0]], np.float32), reference) == 0.25
    assert relative_error(np.zeros((1, 2), np.float32), np.zeros((1, 2))) == 0.0
