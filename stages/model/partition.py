"""Cut a graph into partitions that run one after another, so that only one's weights and results are in memory.

Cuts lie where the fewest bytes a token cross, which in a decoder is between two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

import onnx_ir as ir

_WITH_CACHES = frozenset({"GroupQueryAttention", "MultiHeadAttention"})
"""Operators that may leave out the present keys and values among their outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Some consecutive nodes as a model of their own, whose weights still point into the data file.

    Its outputs are the wanted values of its nodes, and what later partitions read.
    """

    model: ir.Model
    boundary_inputs: tuple[str, ...]
    """Inputs that earlier partitions compute."""


def cut_into_partitions(
    model: ir.Model,
    *,
    wanted: Collection[str],
    limit: int,
    together: Collection[str] = (),
    extra_bytes: Mapping[str, int] | None = None,
    weight_bytes: Callable[[ir.TensorProtocol], int] = lambda weight: weight.nbytes,
) -> Iterator[Partition]:
    """Cut the part of the main graph that ``wanted`` values are computed from.

    Args:
        model: a model in topological order; it is left as it was.
        wanted: names of values. Nodes that none of them depends on are left out.
        limit: bytes of the weights of one partition and the ``extra_bytes`` of its values, unless nodes that can't be
            separated have more.
        together: names of values that stay in the partition that makes them.
        extra_bytes: bytes that the value of this name takes besides, in its partition.
        weight_bytes: bytes that a weight takes; by default its stored size.
    """
    nodes = _needed_nodes(model, wanted)
    order = _Order(nodes, frozenset(wanted), frozenset(together))
    cuts = order.choose_cuts(_costs(nodes, extra_bytes or {}, weight_bytes), limit)
    boundary: list[ir.Value] = []
    for start, end in pairwise(cuts):
        made = [value for node in nodes[start:end] for value in node.outputs if value not in order.constant]
        read_later = [value for value in made if order.last_reader.get(value, 0) >= end]
        outputs = dict.fromkeys([*(value for value in made if value.name in wanted), *read_later])
        if outputs:  # else these nodes compute constants, which come with those that read them
            yield _partition(model, boundary, list(outputs))
        boundary += read_later


def nodes_reading(model: ir.Model, names: Collection[str]) -> Iterator[ir.Node]:
    """Yield the nodes of the main graph that read a value of one of these ``names``."""
    return (node for node in model.graph if any(value.name in names for value in _read_by(node)))


@dataclass(frozen=True)
class _Order:
    """Nodes in their order, and where it may be cut."""

    nodes: list[ir.Node]
    wanted: frozenset[str]
    together: frozenset[str]

    @cached_property
    def last_reader(self) -> dict[ir.Value, int]:
        """Return the place of the last node that reads each value."""
        return {value: place for place, node in enumerate(self.nodes) for value in _read_by(node)}

    @cached_property
    def constant(self) -> set[ir.Value]:
        """Return the values that depend on no graph input: each partition computes those that it reads itself."""
        found: set[ir.Value] = set()
        for node in self.nodes:
            if all(value.const_value is not None or value in found for value in _read_by(node)):
                found.update(node.outputs)
        return found

    def choose_cuts(self, costs: list[int], limit: int) -> list[int]:
        """Return 0, the places that cut into partitions of at most ``limit`` bytes, and the end."""
        total = [0, *accumulate(costs)]
        crossing = self._crossing_bytes()
        cuts = [0]
        while total[-1] - total[cuts[-1]] > limit:
            start = cuts[-1]
            behind = [place for place in crossing if place > start]
            fitting = [place for place in behind if total[place] - total[start] <= limit]
            full = [place for place in fitting if total[place] - total[start] > limit // 2]
            if not behind:
                break
            # The last of the cheapest places; where one node alone is too much, the first behind it.
            choice = full or fitting
            cuts.append(min(reversed(choice), key=crossing.__getitem__) if choice else behind[0])
        return [*cuts, len(self.nodes)]

    def _crossing_bytes(self) -> dict[int, int]:
        """Return, for each place before a node that may be cut, the bytes a token of the values that cross it."""
        crossing = [0] * (len(self.nodes) + 1)
        forbidden: set[int] = set()
        uncut = self._dequantized()
        for place, node in enumerate(self.nodes):
            for value in node.outputs:
                crossed = range(place + 1, self.last_reader.get(value, place) + 1)
                if value.name in self.together or value in uncut:
                    forbidden.update(crossed)
                elif value not in self.constant:
                    for cut in crossed:
                        crossing[cut] += _bytes_a_token(value)
        return {place: crossing[place] for place in range(1, len(self.nodes)) if place not in forbidden}

    def _dequantized(self) -> set[ir.Value]:
        """Return the weights behind DequantizeLinear, transposed or not, which the runtime fuses with their reader."""
        found: set[ir.Value] = set()
        for node in self.nodes:
            if node.op_type == "DequantizeLinear" or (node.op_type == "Transpose" and node.inputs[0] in found):
                found.update(node.outputs)
        return found & self.constant


def _needed_nodes(model: ir.Model, wanted: Collection[str]) -> list[ir.Node]:
    """Return the nodes that ``wanted`` values are computed from, in the graph's order."""
    waiting = [node for node in model.graph if any(value.name in wanted for value in node.outputs)]
    needed: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(source for value in _read_by(node) if (source := value.producer()) is not None)
    return [node for node in model.graph if node in needed]


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what ``node`` reads, in its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        for graph in _graphs_of(attribute):
            inside = {output for inner in graph.all_nodes() for output in inner.outputs}
            for inner in graph.all_nodes():
                yield from (value for value in inner.inputs if value is not None and value not in inside)


def _graphs_of(attribute: ir.Attr) -> Iterable[ir.Graph]:
    match attribute.type:
        case ir.AttributeType.GRAPH:
            return (attribute.as_graph(),)
        case ir.AttributeType.GRAPHS:
            return attribute.as_graphs()
        case _:
            return ()


def _costs(
    nodes: list[ir.Node], extra_bytes: Mapping[str, int], weight_bytes: Callable[[ir.TensorProtocol], int]
) -> list[int]:
    """Return the bytes of the initializers that each node is the first to read, and the extra ones of its outputs."""
    seen: set[ir.Value] = set()
    costs = []
    for node in nodes:
        new = set(_read_by(node)) - seen
        weights = sum(weight_bytes(value.const_value) for value in new if value.const_value is not None)
        costs.append(weights + sum(extra_bytes.get(str(value.name), 0) for value in node.outputs))
        seen |= new
    return costs


def _bytes_a_token(value: ir.Value) -> int:
    """Return the bytes of what the graph fixes of a value's shape; batch and length are open."""
    if value.shape is None or value.dtype is None:
        return 1 << 20
    return int(prod(dim for dim in value.shape if isinstance(dim, int)) * value.dtype.itemsize)


def _partition(model: ir.Model, boundary: list[ir.Value], outputs: list[ir.Value]) -> Partition:
    graph = ir.convenience.extract(model.graph, [*boundary, *model.graph.inputs], outputs)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    _drop_unread_caches(graph)
    read = {value.name for value in graph.inputs}
    return Partition(
        model=ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values())),
        boundary_inputs=tuple(str(value.name) for value in boundary if value.name in read),
    )


def _drop_unread_caches(graph: ir.Graph) -> None:
    """Remove the names of present keys and values without readers, at which ONNX Runtime 1.31 stops in float16.

    Attention over a windowed or a quantized cache keeps them: it refuses to run without.
    """
    for node in graph:
        if node.op_type not in _WITH_CACHES or _needs_caches(node):
            continue
        for value in node.outputs[1:]:
            if not value.uses() and not value.is_graph_output():
                value.name = ""


def _needs_caches(node: ir.Node) -> bool:
    is_quantized = node.attributes.get_string("k_quant_type", "NONE") != "NONE"
    return is_quantized or node.attributes.get_int("sliding_window_cache", 0) == 1
