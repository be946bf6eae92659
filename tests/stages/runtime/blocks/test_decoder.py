"""Residual norms are split up without a change in names or values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.runtime.blocks.decoder import write_out_residuals
from tests.support.graphs import MICROSOFT, TinyGraph


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("operator", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_outputs_keep_their_names_and_values(operator: str, bias: bool) -> None:
    rng = np.random.default_rng(0)
    graph = TinyGraph()
    shape = (2, 5, 16)
    for name in ("x", "skip"):
        graph.input(name, TensorProto.FLOAT, shape)
    vectors = {name: rng.standard_normal(16).astype(np.float32) for name in ("gain", "beta", "bias")}
    inputs = ["x", "skip", graph.constant("gain", vectors["gain"])]
    if operator == "SkipLayerNormalization":
        inputs.append(graph.constant("beta", vectors["beta"]))
    if bias:
        inputs.append(graph.constant("bias", vectors["bias"]))
    graph.node(operator, inputs, ["normed", "", "", "total"], {"epsilon": 0.25}, MICROSOFT)
    graph.output("normed", TensorProto.FLOAT, shape)
    graph.output("total", TensorProto.FLOAT, shape)
    model = graph.model()
    written = write_out_residuals(model)
    assert operator not in {node.op_type for node in written.graph}
    assert operator in {node.op_type for node in model.graph}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name in ("x", "skip")}
    for expected, found in zip(_run(model, feeds), _run(written, feeds), strict=True):
        # The same additions; the norm's sixteen squares in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    # Else ONNX Runtime fuses the nodes again.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["normed", "total"], feeds)
