"""Write a Relu behind a quantized MatMul so that ONNX Runtime still fuses the MatMul.

Behind a MatMul whose only reader is a Relu (or Clip) with one reader of its own, ONNX Runtime looks for the
QuantizeLinear that would make it redundant; where there is none it fuses nothing, and dequantizes the weight at every
token (qdq_selectors.cc, GetQDQSelection; measured with 1.31). Max(x, 0) is the same function and not looked at.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from export.graph_edit import GraphEditor
from stages.graph.patterns import sole_reader
from stages.records import FloatName, torch_float


def blocks_fusion(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip behind ``node`` that keeps ONNX Runtime from fusing it, if there is one."""
    reader = sole_reader(node.outputs[0])
    if reader is None or reader.op_type not in ("Relu", "Clip"):
        return None
    result = reader.outputs[0]
    return reader if len(result.uses()) == 1 and not result.is_graph_output() else None


def replace_relu(editor: GraphEditor, node: ir.Node, dtype: FloatName) -> None:
    """Put Max(x, 0) in the place of the Relu that keeps the quantized ``node`` from being fused."""
    relu = blocks_fusion(node)
    if relu is None or relu.op_type != "Relu":
        return
    zero = editor.add_initializer(relu, f"{relu.name}/zero", TorchTensor(torch.zeros((), dtype=torch_float(dtype))))
    x, y = node.outputs[0], relu.outputs[0]
    clamped = editor.insert_before(
        relu, "Max", [x, zero], f"{relu.name}/Max", {}, lambda name: ir.Value(name=name, shape=y.shape, type=y.type)
    )
    for use in tuple(y.uses()):
        use.node.replace_input_with(use.idx, clamped)
