"""Key/value heads repeated by nodes, as model builders write grouped-query attention for MultiHeadAttention.

[batch, length, kv_heads * head_size] is split into heads, put behind the cache, and every head is copied for its group
of query heads: Reshape, Transpose, Concat, Unsqueeze, Expand, Reshape, Transpose, Reshape.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from stages.constants import constant_numbers

_BACKWARDS = ("Reshape", "Transpose", "Reshape", "Expand", "Unsqueeze", "Concat", "Transpose", "Reshape")
_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedHeads:
    """Where the repetition begins: ``entry`` reads the linear layer's output, ``kv_heads`` heads next to each other."""

    entry: ir.Node
    kv_heads: int


def repeated_heads(value: ir.Value, heads: int) -> RepeatedHeads | None:
    """The repetition that ``value`` [batch, length, heads * head_size] comes from; None where it is made otherwise.

    What is matched shows each number of the linear layer only to attention and to the cache that it belongs to.
    """
    nodes: list[ir.Node] = []
    source: ir.Value | None = value
    for op_type in _BACKWARDS:
        node = None if source is None else source.producer()
        if node is None or node.op_type != op_type:
            return None
        nodes.append(node)
        source = node.inputs[1 if op_type == "Concat" and len(node.inputs) == 2 else 0]
    _, back, merge, _, unsqueeze, cache, front, entry = nodes
    split = _constant(entry.inputs[1])
    if split is None or len(split) != 4 or split[:2] != [0, 0]:
        return None
    kv_heads = split[2]
    fits = (
        all(list(node.attributes.get_ints("perm", [])) == _HEADS_FIRST for node in (back, front))
        and _appends_to_cache(cache)
        and _axes(unsqueeze) == [2]
        and kv_heads > 0
        and heads % kv_heads == 0
        and _declared(merge.outputs[0], 1) == heads
        and _declared(merge.outputs[0], 3) == _declared(entry.outputs[0], 3) is not None
        and _seen_by_each_other_alone(nodes, cache)
    )
    return RepeatedHeads(entry=entry, kv_heads=kv_heads) if fits else None


def _appends_to_cache(node: ir.Node) -> bool:
    """[batch, heads, length, head_size]: new tokens behind those of a graph input that nobody else reads."""
    past = node.inputs[0]
    along_length = node.attributes.get_int("axis", 0) in (2, -2)
    return along_length and past is not None and past.is_graph_input() and len(past.uses()) == 1


def _seen_by_each_other_alone(nodes: list[ir.Node], cache: ir.Node) -> bool:
    """The cache itself is an output of the graph, and its shape is read."""
    members = {id(node) for node in nodes}
    for node in nodes[1:]:
        value = node.outputs[0]
        outsiders = [reader for reader in value.consumers() if id(reader) not in members]
        if any(reader.op_type != "Shape" for reader in outsiders) or (value.is_graph_output() and node is not cache):
            return False
    return True


def _axes(node: ir.Node) -> list[int] | None:
    """Unsqueeze's axes: an input since opset 13, an attribute before."""
    return _constant(node.inputs[1]) if len(node.inputs) > 1 else list(node.attributes.get_ints("axes", []))


def _constant(value: ir.Value | None) -> list[int] | None:
    numbers = None if value is None else constant_numbers(value)
    return None if numbers is None else [int(number) for number in numbers.reshape(-1)]


def _declared(value: ir.Value, axis: int) -> int | None:
    """A dimension of a rank-4 value that the model declares as a number."""
    if value.shape is None or len(value.shape) != 4:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None
