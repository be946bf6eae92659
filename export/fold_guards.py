"""Guard the folding of input scales: divisions that stay exact, and what must hold in the graph before one may move.

Each function that finds a reason against folding raises CannotFold with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict

import onnx_ir as ir
import torch
from jaxtyping import Float, Float32
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor

from export.graph_edit import describe
from stages.model.absorbers import find_absorber
from stages.model.patterns import is_constant, name_of
from stages.model.weights import all_finite
from stages.records.sites import ActivationGroup, HeadSharing, MatMulSite

_PAST_INPUTS = {"GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7)}


class CannotFold(Exception):
    """A guard failed; the message is the reason that the summary shows."""


# --------------------------------------------------------------------------- the graph


def require_seen_only_by(sites: Collection[MatMulSite], activation: ir.Value) -> None:
    """Raise CannotFold unless every reader of ``activation`` is one of ``sites``, through its first input."""
    if activation.is_graph_output():
        raise CannotFold("the activation is an output of the graph")
    members = {site.output for site in sites}
    for node, index in activation.uses():
        if index != 0 or name_of(node.outputs[0]) not in members:
            raise CannotFold(f"the activation is also read by {describe(node)}")


def require_as_planned(group: ActivationGroup, activation: ir.Value, sites: Mapping[str, MatMulSite]) -> None:
    """Raise CannotFold unless the graph still has the absorber that was planned for ``group``.

    Args:
        group: the sites that share an input scale, and their plan.
        activation: what they read.
        sites: all sites of the graph by their output value.
    """
    found = find_absorber(activation, group.in_features, sites)
    if isinstance(found, str):
        raise CannotFold(f"what was planned is not in the graph: {found}")
    planned = {} if group.absorber is None else asdict(group.absorber)
    differing = [name for name, value in asdict(found).items() if planned.get(name) != value]
    if differing:
        raise CannotFold(f"the {found.kind} absorber isn't the one that was planned ({', '.join(differing)})")


def require_own_cache(attention: ir.Node) -> None:
    """Raise CannotFold unless the value cache of ``attention`` holds only what it wrote itself, unrounded."""
    if attention.attributes.get_string("v_quant_type", "NONE") != "NONE":
        raise CannotFold(f"{describe(attention)} quantizes its value cache")
    for past in (attention.inputs[index] for index in _PAST_INPUTS[attention.op_type] if index < len(attention.inputs)):
        if past is not None and (not past.is_graph_input() or len(past.uses()) != 1):
            raise CannotFold(f"{describe(attention)} shares its cache with another node")
    if any(output.uses() for output in attention.outputs[1:]):
        raise CannotFold(f"another node reads the cache of {describe(attention)}")


def places_of(names: Sequence[str], nodes: Collection[ir.Node]) -> list[tuple[ir.Node, int]]:
    """Return the (node, input) through which ``nodes`` read the values called ``names``.

    Raises:
        CannotFold: they aren't read once each.
    """
    places = [
        (node, index) for node in nodes for index, value in enumerate(node.inputs) if value and value.name in names
    ]
    if len(places) != len(names):
        raise CannotFold(f"{', '.join(map(describe, nodes))} don't read {', '.join(names)} once each")
    return places


# --------------------------------------------------------------------------- divisions


def scale_per_value_channel(scale: Float32[Tensor, " K"], heads: HeadSharing) -> Float32[Tensor, " V"]:
    """Return one scale a V channel, [kv_heads * head_size], from o_proj's [kv_heads * group_size * head_size].

    Raises:
        CannotFold: query heads that share a value head have different scales.
    """
    shape = (heads.kv_heads, heads.group_size, heads.head_size)
    if scale.numel() != heads.kv_heads * heads.group_size * heads.head_size:
        raise CannotFold("the input scale's length doesn't fit the attention's head counts")
    grouped = scale.reshape(shape)
    if not torch.equal(grouped, grouped[:, :1].expand(shape)):
        raise CannotFold("the input scale differs between query heads that share one value head")
    return grouped[:, 0].reshape(-1)


def divided_vector(node: ir.Node, index: int, divisor: Float32[Tensor, " N"]) -> ir.TensorProtocol:
    """Divide an initializer along its last axis; its other axes have length 1.

    Args:
        node: a reader of the initializer.
        index: the input through which ``node`` reads it.
        divisor: one number for each of the initializer's.

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
    """Divide the output channels of a linear layer's floating-point weight, computed again when it is written.

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


def leaves_range(before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"]) -> bool:
    """Say whether a division overflowed, or shrank values below the smallest normal number, where precision is lost."""
    smallest = torch.finfo(after.dtype).smallest_normal
    old, new = before.float().abs(), after.float().abs()
    shrunk = (new < smallest) & (new < old)
    return bool(shrunk.any()) or not all_finite(new)


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    if value is None or not is_constant(value) or value.const_value is None:
        raise CannotFold(f"an input of {describe(node)} that should be divided is not an initializer")
    return value.const_value


def _divide(tensor: ir.TensorProtocol, divisor: Float32[Tensor, "*axes"]) -> Tensor:
    values = _read(tensor)
    return (values.float() / divisor).to(values.dtype)


def _read(tensor: ir.TensorProtocol) -> Tensor:
    # A copy of its own: mapped files are read-only, which torch does not accept.
    values = torch.frombuffer(bytearray(tensor.tobytes()), dtype=to_torch_dtype(tensor.dtype))
    return values.reshape(tuple(tensor.shape.numpy()))
