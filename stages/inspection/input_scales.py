"""Mul nodes that divide an activation by an AWQ input scale before quantized products read it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})
_NORMALIZING = frozenset({"Div", "Sqrt", "Reciprocal", "ReduceMean", "Pow", "Rsqrt"})
"""What makes the factors of a norm that is written out in small nodes, whose gain is a Mul by a vector too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScaleMul:
    """One Mul; it costs a pass over the activation for every token."""

    node: str
    channels: int
    readers: tuple[str, ...]
    """The quantized products that read the result."""


def find_input_scales(model: ir.Model, quantized: Collection[str]) -> tuple[InputScaleMul, ...]:
    """The Muls by a constant vector whose result only nodes of the names ``quantized`` multiply with.

    The gain that ends a norm in small nodes is none.
    """
    found = []
    for node in model.graph.all_nodes():
        vector = _vector(node) if node.op_type == "Mul" else None
        readers = [str(reader.name or reader.outputs[0].name) for reader in node.outputs[0].consumers()]
        products = all(reader.op_type in _PRODUCTS for reader in node.outputs[0].consumers())
        if vector and readers and products and set(readers) <= set(quantized) and not _ends_norm(node):
            found.append(
                InputScaleMul(node=str(node.name or node.outputs[0].name), channels=vector, readers=tuple(readers))
            )
    return tuple(found)


def _vector(node: ir.Node) -> int:
    """Length of the constant factor; 0 where neither is a constant vector."""
    for value in node.inputs:
        if value is None or (tensor := ir.convenience.get_const_tensor(value)) is None:
            continue
        shape = tuple(tensor.shape.numpy())
        if shape and shape[-1] > 1 and all(size == 1 for size in shape[:-1]):
            return int(shape[-1])
    return 0


def _ends_norm(node: ir.Node) -> bool:
    for value in node.inputs:
        maker = None if value is None else value.producer()
        while maker is not None and maker.op_type == "Cast" and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        if maker is None:
            continue
        makers = [maker, *(each.producer() for each in maker.inputs if maker.op_type == "Mul" and each is not None)]
        if any(each is not None and each.op_type in _NORMALIZING for each in makers):
            return True
    return False
