"""Recognise the small patterns of nodes that planning and export look for in a graph.

These are constants, squares, sole readers, casts, key/value heads that nodes repeat, routers of experts, and gates of
recurrent states.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

_REPETITION_BACKWARDS = ("Reshape", "Transpose", "Reshape", "Expand", "Unsqueeze", "Concat", "Transpose", "Reshape")
_HEADS_FIRST = (0, 2, 1, 3)
EXPERT_NODES = frozenset({"MoE", "QMoE"})
FLOATING = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
"""Types of weights that no quantizer has made."""
STANDARD_DOMAINS = ("", "ai.onnx")
_ROUTING_INPUT = 1
_RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
PASSED_THROUGH = _RESHAPING | {"Transpose", "Cast", "Identity"}
"""Operators that a constant weight may pass on its way to the node that reads it."""
_STATE_GATES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"LinearAttentionGate": (0, 3), "LinearAttention": (4, 5), "GatedDeltaNet": (4, 5)}
)
"""Inputs that hold decay and update rate, by operator."""
_ELEMENTWISE = frozenset(
    {
        *("Reshape", "Cast", "Identity", "Flatten", "Squeeze", "Unsqueeze"),
        *("Add", "Sub", "Mul", "Div", "Neg", "Exp", "Log", "Reciprocal", "Clip", "Where"),
        *("Sigmoid", "Softmax", "Tanh", "Relu", "Softplus"),
    }
)


def constant_values(value: ir.Value) -> np.ndarray | None:
    """Return the numbers of an initializer or Constant node; None where ``value`` is neither, or its file is missing.

    A graph can be looked at without its weights, and model builders put small constants into the same file.
    """
    tensor = ir.convenience.get_const_tensor(value)
    try:
        return None if tensor is None else np.asarray(tensor.numpy())
    except FileNotFoundError:
        return None


def is_constant(value: ir.Value) -> bool:
    """Return whether ``value`` is an initializer that callers can't replace: an optional input of the graph is none."""
    return value.is_initializer() and not value.is_graph_input()


def name_of(value: ir.Value) -> str:
    """Return a value's name; onnx-ir names every value it loads."""
    assert value.name, "onnx-ir names every value it loads"
    return value.name


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input of ``node``; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantMatrix:
    """A matrix that is the same in every run: an initializer, and what nodes do to it before it is read."""

    value: ir.Value
    """The initializer."""
    rows: int
    """Of the initializer's numbers before they are transposed, as are the columns."""
    columns: int
    transposed: bool
    dtype: ir.DataType | None
    """As it is read, behind any Cast."""


def constant_matrix(value: ir.Value) -> ConstantMatrix | None:
    """Return what ``value`` [rows, columns] is made of; None where it isn't constant, or other nodes make it.

    The nodes in between are Identity, Cast, Transpose, and before any Transpose Reshape, Flatten, Squeeze, Unsqueeze.
    """
    passed: list[ir.Node] = []
    while not is_constant(value):
        node = value.producer()
        if node is None or node.domain not in STANDARD_DOMAINS or node.op_type not in PASSED_THROUGH:
            return None
        passed.append(node)
        if not node.inputs or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    casts = [ir.DataType(node.attributes.get_int("to", 0)) for node in passed if node.op_type == "Cast"]
    form = None if value.shape is None else _form([int(size) for size in value.shape.numpy()], passed[::-1])
    if form is None:
        return None
    (rows, columns), transposed = form
    return ConstantMatrix(
        value=value, rows=rows, columns=columns, transposed=transposed, dtype=casts[0] if casts else value.dtype
    )


def _form(shape: list[int], nodes: list[ir.Node]) -> tuple[list[int], bool] | None:
    """Return the matrix that ``nodes`` make of numbers of ``shape``, and whether it is transposed then."""
    transposed = False
    for node in nodes:
        if node.op_type == "Transpose":
            permutation = list(node.attributes.get_ints("perm", [1, 0]))
            if len(shape) != 2 or sorted(permutation) != [0, 1]:
                return None
            transposed ^= permutation == [1, 0]
        elif node.op_type in _RESHAPING:
            made = None if transposed else _made_shape(node, shape)
            if made is None:
                return None
            shape = made
    return (shape, transposed) if len(shape) == 2 else None


def _made_shape(node: ir.Node, shape: list[int]) -> list[int] | None:
    """Return the shape that a reshaping node gives numbers of ``shape``; None where only a run tells it."""
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1)
        return [prod(shape[:axis]), prod(shape[axis:])]
    if node.op_type == "Reshape":
        asked = _integers(node.inputs[1])
        if asked is None or asked.count(-1) > 1 or node.attributes.get_int("allowzero", False):
            return None
        made = [shape[axis] if size == 0 and axis < len(shape) else size for axis, size in enumerate(asked)]
        others = prod(size for size in made if size != -1)
        return [prod(shape) // others if size == -1 and others else size for size in made]
    axes = _axes(node)
    if axes is None:
        return None
    if node.op_type == "Squeeze":
        gone = {axis % len(shape) for axis in axes} or {axis for axis, size in enumerate(shape) if size == 1}
        return [size for axis, size in enumerate(shape) if axis not in gone]
    places = {axis % (len(shape) + len(axes)) for axis in axes}
    sizes = iter(shape)
    return [1 if axis in places else next(sizes) for axis in range(len(shape) + len(axes))]


def is_square(node: ir.Node) -> bool:
    """Return whether ``node`` squares its first input: Mul with itself, or Pow with the constant exponent 2."""
    if node.op_type == "Mul":
        return node.inputs[0] is not None and node.inputs[0] is node.inputs[1]
    if node.op_type != "Pow" or node.inputs[1] is None:
        return False
    exponent = constant_values(node.inputs[1])
    return exponent is not None and exponent.size == 1 and float(exponent.item()) == 2


def sole_reader(value: ir.Value) -> ir.Node | None:
    """Return the only node that sees ``value``, through one input or as a square; None where others see it too."""
    uses = tuple(value.uses())
    if value.is_graph_output() or not uses:
        return None
    node: ir.Node = uses[0].node
    squared = len(uses) == 2 and uses[1].node is node and is_square(node)
    return node if len(uses) == 1 or squared else None


def readers(value: ir.Value, through: Collection[str] = ("Transpose",)) -> Iterator[tuple[ir.Node, int]]:
    """Yield the (node, input) that read ``value``; nodes of the types ``through`` count as those behind them."""
    for node, index in value.uses():
        if node.op_type in through:
            yield from readers(node.outputs[0], through)
        else:
            yield node, index


def before_cast(value: ir.Value) -> ir.Value:
    """Return what a Cast makes ``value`` from, where only the Cast reads it (float32 norms of 16-bit models)."""
    cast = value.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return value if source is None or sole_reader(source) is not cast else source


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedHeads:
    """The repetition's beginning: ``entry`` reads the linear layer's output, ``kv_heads`` heads side by side."""

    entry: ir.Node
    kv_heads: int


def repeated_kv_heads(value: ir.Value, heads: int) -> RepeatedHeads | None:
    """Return the repetition that ``value`` [batch, length, heads * head_size] comes from; None where there is none.

    Model builders write grouped-query attention for MultiHeadAttention in this way: [batch, length, kv_heads *
    head_size] is split into heads, appended to the cache, and every head is copied for its group of query heads, by
    Reshape, Transpose, Concat, Unsqueeze, Expand, Reshape, Transpose, Reshape.

    Ensures: only attention and the cache see the linear layer's numbers.

    Args:
        value: V as MultiHeadAttention reads it.
        heads: attention's query heads.
    """
    nodes: list[ir.Node] = []
    source: ir.Value | None = value
    for op_type in _REPETITION_BACKWARDS:
        node = None if source is None else source.producer()
        if node is None or node.op_type != op_type:
            return None
        nodes.append(node)
        source = node.inputs[1 if op_type == "Concat" and len(node.inputs) == 2 else 0]
    _, back, merge, _, unsqueeze, cache, front, entry = nodes
    split = _integers(entry.inputs[1])
    if split is None or len(split) != 4 or split[:2] != [0, 0]:
        return None
    kv_heads = split[2]
    fits = (
        all(tuple(node.attributes.get_ints("perm", [])) == _HEADS_FIRST for node in (back, front))
        and _appends_to_cache(cache)
        and _axes(unsqueeze) == [2]
        and kv_heads > 0
        and heads % kv_heads == 0
        and _declared(merge.outputs[0], 1) == heads
        and _declared(merge.outputs[0], 3) == _declared(entry.outputs[0], 3) is not None
        and _seen_only_by_each_other(nodes, cache)
    )
    return RepeatedHeads(entry=entry, kv_heads=kv_heads) if fits else None


def _appends_to_cache(node: ir.Node) -> bool:
    """Return whether ``node`` appends tokens to a graph input [batch, heads, length, head_size] that no other reads."""
    past = node.inputs[0]
    along_length = node.attributes.get_int("axis", 0) in (2, -2)
    return along_length and past is not None and past.is_graph_input() and len(past.uses()) == 1


def _seen_only_by_each_other(nodes: list[ir.Node], cache: ir.Node) -> bool:
    """Return whether no other node reads the repetition's values, but for shapes and the cache as a graph output."""
    members = {id(node) for node in nodes}
    for node in nodes[1:]:
        value = node.outputs[0]
        outsiders = [reader for reader in value.consumers() if id(reader) not in members]
        if any(reader.op_type != "Shape" for reader in outsiders) or (value.is_graph_output() and node is not cache):
            return False
    return True


def _axes(node: ir.Node) -> list[int] | None:
    """Return the axes of Unsqueeze or Squeeze: an input since opset 13, an attribute before."""
    return _integers(node.inputs[1]) if len(node.inputs) > 1 else list(node.attributes.get_ints("axes", []))


def _integers(value: ir.Value | None) -> list[int] | None:
    numbers = None if value is None else constant_values(value)
    return None if numbers is None else [int(number) for number in numbers.reshape(-1)]


def _declared(value: ir.Value, axis: int) -> int | None:
    """Return a dimension of a rank-4 value that the model declares as a number; None for any other."""
    if value.shape is None or len(value.shape) != 4:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def routes_experts(value: ir.Value) -> bool:
    """Return whether ``value`` decides which experts of a mixture a token goes to.

    A router's output reaches the routing input of a MoE or QMoE node, or the TopK that chooses experts where a mixture
    is written out in small nodes, through nothing but reshapes and elementwise nodes.
    """
    return any(
        node.op_type == "TopK" or (node.op_type in EXPERT_NODES and index == _ROUTING_INPUT)
        for node, index in _readers_behind(value)
    )


def gates_state(value: ir.Value) -> bool:
    """Return whether ``value`` decides how fast a recurrent state decays, or how much a token changes it.

    It reaches the decay or the update rate of linear attention through nothing but reshapes and elementwise nodes.
    """
    return any(index in _STATE_GATES.get(node.op_type, ()) for node, index in _readers_behind(value))


def _readers_behind(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the (node, input) that read ``value``, or what nothing but reshapes and elementwise nodes make of it."""
    waiting, known = [value], {id(value)}
    while waiting:
        for use in waiting.pop().uses():
            yield use.node, use.idx
            if use.node.op_type in _ELEMENTWISE:
                found = [output for output in use.node.outputs if id(output) not in known]
                waiting += found
                known |= {id(output) for output in found}
