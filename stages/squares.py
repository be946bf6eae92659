"""The squares that model builders write: Mul with itself, or Pow."""

from __future__ import annotations

import onnx_ir as ir

from stages.constants import constant_numbers


def squares(node: ir.Node) -> bool:
    """Whether ``node`` makes the square of its first input: Mul with itself, or Pow with the constant exponent 2."""
    if node.op_type == "Mul":
        return node.inputs[0] is not None and node.inputs[0] is node.inputs[1]
    if node.op_type != "Pow" or node.inputs[1] is None:
        return False
    exponent = constant_numbers(node.inputs[1])
    return exponent is not None and exponent.size == 1 and float(exponent.item()) == 2
