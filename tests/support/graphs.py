"""Tiny ONNX models, built node by node, with every pattern that the exporter knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
MICROSOFT = "com.microsoft"


@dataclass
class TinyGraph:
    """Collects nodes, initializers, inputs and outputs of one graph."""

    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def input(self, name: str, elem_type: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, elem_type, list(shape)))
        return name

    def output(self, name: str, elem_type: int, shape: Sequence[int | str] | None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, elem_type, None if shape is None else list(shape)))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: dict[str, int | float | str | list[int]] | None = None,
        domain: str = "",
    ) -> str:
        """Add a node called after its first output; returns that output."""
        self.nodes.append(
            helper.make_node(
                op_type,
                list(inputs),
                list(outputs),
                name=f"{outputs[0]}/{op_type}",
                domain=domain,
                **(attributes or {}),
            )
        )
        return outputs[0]

    def linear(self, x: str, weight: np.ndarray, output: str) -> str:
        """Add a MatMul with a [K, N] initializer called "<output>.weight"."""
        return self.node("MatMul", [x, self.constant(f"{output}.weight", weight)], [output])

    def proto(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def save(self, folder: Path) -> Path:
        """Save model.onnx with its weights in model.onnx.data, in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.onnx"
        ir.save(self.model(), path, external_data="model.onnx.data")
        return path


def onnx_type(dtype: np.dtype) -> int:
    return _TYPES[np.dtype(dtype)]


VOCABULARY = 32


def tiny_decoder(up: np.ndarray, down: np.ndarray, rng: np.random.Generator, opset: int = 21) -> TinyGraph:
    """Return a graph: input_ids -> embedding h -> norm x; Sigmoid(gate(h)) * up(x) -> down -> tied logits.

    ``up`` is [64, 96] and ``down`` [96, 64] in the model's type; the embedding has 32 rows.
    """
    dtype = up.dtype
    graph = TinyGraph(opset=opset)
    graph.input("input_ids", TensorProto.INT64, ["batch", "length"])
    embedding = graph.constant("embedding", (rng.standard_normal((VOCABULARY, up.shape[0])) / 8).astype(dtype))
    graph.node("Gather", [embedding, "input_ids"], ["h"])
    gain = graph.constant("gain", rng.uniform(0.5, 2, up.shape[0]).astype(dtype))
    graph.node("SimplifiedLayerNormalization", ["h", gain], ["x"])
    gate = graph.linear("h", (rng.standard_normal(up.shape) / 8).astype(dtype), "gate")
    graph.node("Mul", [graph.node("Sigmoid", [gate], ["act"]), graph.linear("x", up, "up")], ["product"])
    graph.linear("product", down, "down")
    graph.node("Transpose", [embedding], ["head"], {"perm": [1, 0]})
    graph.node("MatMul", ["down", "head"], ["logits"])
    graph.output("logits", onnx_type(dtype), ["batch", "length", VOCABULARY])
    return graph
