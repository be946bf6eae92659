"""Initializers divided by an input scale, and the reasons not to."""

from __future__ import annotations

import onnx_ir as ir
import torch
from jaxtyping import Float, Float32
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor

from export.graph_edit import called
from stages.finite import all_finite


class CannotFold(Exception):
    """A guard failed; the message is the reason that the summary shows."""


def leaves_range(before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"]) -> bool:
    """Whether a division overflowed, or shrank values to below the smallest normal number, where precision is lost."""
    smallest = torch.finfo(after.dtype).smallest_normal
    old, new = before.float().abs(), after.float().abs()
    shrunk = (new < smallest) & (new < old)
    return bool(shrunk.any()) or not all_finite(new)


def divided_vector(node: ir.Node, index: int, divisor: Float32[Tensor, " N"]) -> ir.TensorProtocol:
    """The initializer that ``node`` reads at ``index``, divided along its last axis; its other axes have length 1.

    Raises:
        CannotFold: it is no initializer, has another length, or would leave its type's normal range.
    """
    tensor = _constant(node, index)
    if not tensor.shape or tensor.shape[-1] != divisor.numel() or tensor.size != divisor.numel():
        raise CannotFold(f"'{tensor.name}' doesn't have one number for each scale")
    values = _divide(tensor, divisor)
    if leaves_range(_read(tensor), values):
        raise CannotFold(f"'{tensor.name}' would leave its type's normal range")
    return TorchTensor(values)


def divided_matrix(node: ir.Node, divisor: Float32[Tensor, " N"]) -> ir.TensorProtocol:
    """A linear layer's floating-point weight with its output channels divided, computed again when it is written.

    Raises:
        CannotFold: the weight is no initializer, or would overflow.
    """
    tensor = _constant(node, 1)
    along_outputs = divisor[:, None] if node.attributes.get_int("transB", 0) == 1 else divisor
    if not all_finite(_divide(tensor, along_outputs)):
        raise CannotFold(f"'{tensor.name}' would overflow")
    return ir.LazyTensor(
        lambda: TorchTensor(_divide(tensor, along_outputs)), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy())
    )


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    if value is None or not value.is_initializer() or value.const_value is None:
        raise CannotFold(f"an input of {called(node)} that should be divided is not an initializer")
    return value.const_value


def _read(tensor: ir.TensorProtocol) -> Tensor:
    # A copy of its own: mapped files are read-only, which torch does not accept.
    values = torch.frombuffer(bytearray(tensor.tobytes()), dtype=to_torch_dtype(tensor.dtype))
    return values.reshape(tuple(tensor.shape.numpy()))


def _divide(tensor: ir.TensorProtocol, divisor: Float32[Tensor, "*axes"]) -> Tensor:
    values = _read(tensor)
    return (values.float() / divisor).to(values.dtype)
