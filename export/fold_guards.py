"""What must hold in the graph before a division may move; each function raises CannotFold with the reason."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch
from jaxtyping import Float32
from torch import Tensor

from export.divide import CannotFold
from export.graph_edit import called, name_of
from stages.records import HeadSharing, MatMulSite, ValueAbsorber
from stages.repeated_heads import repeated_heads
from stages.squares import squares

_VALUE_INPUT = 2
_BIAS_INPUT = 3
_PAST_INPUTS = {"GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7)}


def require_seen_only_by(sites: Collection[MatMulSite], activation: ir.Value) -> None:
    """Every reader of ``activation`` must be one of ``sites``, through its first input."""
    if activation.is_graph_output():
        raise CannotFold("the activation is an output of the graph")
    members = {site.output for site in sites}
    for node, index in activation.uses():
        if index != 0 or name_of(node.outputs[0]) not in members:
            raise CannotFold(f"the activation is also read by {called(node)}")


def before_cast(activation: ir.Value) -> ir.Value:
    """What a Cast makes ``activation`` from, which it alone may read; the activation itself where there is no Cast."""
    cast = activation.producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
        return activation
    _sole_reader(cast.inputs[0])
    return cast.inputs[0]


def require_producer(activation: ir.Value, *op_types: str) -> ir.Node:
    """The node that makes ``activation`` as its first output, which must be one of ``op_types``."""
    node = activation.producer()
    if node is None or node.op_type not in op_types or activation.index() != 0:
        found = "a graph input" if node is None else called(node)
        raise CannotFold(f"the activation comes from {found}, not from {' or '.join(op_types)}")
    return node


def require_power(activation: ir.Value, power: Literal[1, 2]) -> ir.Node:
    """The node that a linear layer must reach for ``activation`` to be proportional to its ``power``-th power.

    That is the Mul with another factor, or a Relu; where it is squared, the Relu behind the square, or the square.
    """
    node = activation.producer()
    if node is None or activation.index() != 0:
        raise CannotFold("the activation is a graph input")
    if power == 1:
        if node.op_type not in ("Mul", "Relu") or squares(node):
            raise CannotFold(f"the activation comes from {called(node)}, not from the product that was planned")
        return node
    if not squares(node):
        raise CannotFold(f"the activation comes from {called(node)}, which is not the square that was planned")
    base = node.inputs[0]
    relu = None if base is None else base.producer()
    if base is None or relu is None or relu.op_type != "Relu":
        return node
    _sole_reader(base)
    return relu


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPath:
    """How a linear layer reaches ``target``: the (node, input) of its bias, and the input of ``target`` it enters."""

    bias: tuple[tuple[ir.Node, int], ...]
    entry: int


def require_path(linear: ir.Node, target: ir.Node, planned_bias: str | None) -> LinearPath:
    """From ``linear`` to ``target`` there is nothing but the planned bias, and nobody else reads on the way."""
    bias = []
    if linear.op_type == "Gemm" and len(linear.inputs) > 2 and linear.inputs[2] is not None:
        bias.append((linear, 2))
    reader, entry = _sole_reader(linear.outputs[0])
    if reader is not target and reader.op_type == "Add":
        bias.append((reader, 1 - entry))
        reader, entry = _sole_reader(reader.outputs[0])
    if reader is not target:
        raise CannotFold(f"{called(reader)} lies between {called(linear)} and the activation")
    found = [None if (value := node.inputs[index]) is None else value.name for node, index in bias]
    if found != ([] if planned_bias is None else [planned_bias]):
        raise CannotFold(f"the bias of {called(linear)} isn't the one that was planned")
    return LinearPath(bias=tuple(bias), entry=entry)


def _sole_reader(value: ir.Value) -> tuple[ir.Node, int]:
    uses = list(value.uses())
    squared = len(uses) == 2 and uses[0].node is uses[1].node and squares(uses[0].node)
    if value.is_graph_output() or not (len(uses) == 1 or squared):
        raise CannotFold(f"'{value.name}' is also read elsewhere, where the change would be seen")
    return uses[0].node, uses[0].idx


def value_reader(attention: ir.Node) -> ir.Node:
    """The node that must read the layer which makes V.

    That is attention itself, the Split whose last part is V alone, or the first node of those that repeat V's heads.
    """
    value = _input(attention, _VALUE_INPUT)
    if value is None:
        return attention
    if attention.op_type == "MultiHeadAttention":
        repeated = repeated_heads(value, attention.attributes.get_int("num_heads", 0))
        return attention if repeated is None else repeated.entry
    split = value.producer()
    if split is None or split.op_type != "Split":
        return attention
    _sole_reader(value)
    # V has rank 3: batch, length, channels.
    if value is not split.outputs[-1] or split.attributes.get_int("axis", 0) not in (-1, 2):
        raise CannotFold(f"{called(split)} doesn't split off V's channels last")
    return split


def require_linear_in_value(attention: ir.Node, path: LinearPath, absorber: ValueAbsorber, out_features: int) -> None:
    """Attention reads V where planned, and its cache holds only what it wrote itself, unrounded."""
    width = absorber.heads.kv_heads * absorber.heads.head_size
    fits = absorber.first_channel + width == out_features
    if attention.op_type == "MultiHeadAttention":
        fits = fits and _reads_planned_heads(attention, path, absorber)
    else:
        fits = fits and _reads_planned_channels(attention, path, absorber)
    if not fits:
        raise CannotFold(f"{called(attention)} doesn't read V from the planned channels")
    if attention.attributes.get_string("v_quant_type", "NONE") != "NONE":
        raise CannotFold(f"{called(attention)} quantizes its value cache")
    _require_own_cache(attention)


def _reads_planned_channels(attention: ir.Node, path: LinearPath, absorber: ValueAbsorber) -> bool:
    """GroupQueryAttention: V apart, or behind Q and K in one packed input."""
    apart = _input(attention, _VALUE_INPUT) is not None and value_reader(attention) is attention
    return path.entry == (_VALUE_INPUT if apart else 0) and not (apart and absorber.first_channel)


def _reads_planned_heads(attention: ir.Node, path: LinearPath, absorber: ValueAbsorber) -> bool:
    """MultiHeadAttention: V apart and without another bias, its heads as they are or repeated by nodes."""
    value, heads = _input(attention, _VALUE_INPUT), attention.attributes.get_int("num_heads", 0)
    if value is None or _input(attention, _BIAS_INPUT) is not None or absorber.first_channel:
        return False
    repeated = repeated_heads(value, heads)
    entry, kv_heads = (_VALUE_INPUT, heads) if repeated is None else (0, repeated.kv_heads)
    return (path.entry, absorber.heads.kv_heads, absorber.heads.group_size) == (entry, kv_heads, heads // kv_heads)


def _require_own_cache(attention: ir.Node) -> None:
    for index in _PAST_INPUTS[attention.op_type]:
        past = _input(attention, index)
        if past is not None and (not past.is_graph_input() or len(past.uses()) != 1):
            raise CannotFold(f"{called(attention)} shares its cache with another node")
    if any(output.uses() for output in attention.outputs[1:]):
        raise CannotFold(f"another node reads the cache of {called(attention)}")


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def untie_heads(scale: Float32[Tensor, " K"], heads: HeadSharing) -> Float32[Tensor, " V"]:
    """One scale a V channel, [kv_heads * head_size], from o_proj's [kv_heads * group_size * head_size]."""
    shape = (heads.kv_heads, heads.group_size, heads.head_size)
    if scale.numel() != heads.kv_heads * heads.group_size * heads.head_size:
        raise CannotFold("the input scale's length doesn't fit the attention's head counts")
    grouped = scale.reshape(shape)
    if not torch.equal(grouped, grouped[:, :1].expand(shape)):
        raise CannotFold("the input scale differs between query heads that share one value head")
    return grouped[:, 0].reshape(-1)
