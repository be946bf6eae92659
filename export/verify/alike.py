"""Tell graphs that ONNX Runtime treats alike: they differ in names and in the numbers of large weights only.

What it fuses depends on operators, attributes, types, shapes and small constants, which the layers of a decoder share.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_LARGEST_COMPARED = 1024
"""Bytes of a constant whose numbers count: shapes and axes have few, weights many."""
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

Form = tuple[object, ...]


def form_of(graph: ir.Graph) -> Form | None:
    """Return what two graphs that are alike have in common; None where nodes hold graphs, which aren't compared."""
    places: dict[ir.Value, int] = {}

    def place(value: ir.Value | None) -> int | None:
        return None if value is None else places.setdefault(value, len(places))

    attributes = [attribute for node in graph for attribute in node.attributes.values()]
    if any(attribute.type in _GRAPHS for attribute in attributes):
        return None
    inputs = tuple((place(value), *_kind(value)) for value in graph.inputs)
    nodes = tuple(
        (
            node.domain,
            node.op_type,
            tuple(sorted(_content(attribute) for attribute in node.attributes.values())),
            tuple(map(place, node.inputs)),
            tuple((place(value), bool(value.name), *_kind(value)) for value in node.outputs),
        )
        for node in graph
    )
    constants = tuple(sorted(_constants(graph, places)))
    return inputs, nodes, constants, tuple(map(place, graph.outputs))


def _kind(value: ir.Value) -> tuple[str, str]:
    return str(value.dtype), str(value.shape)


def _content(attribute: ir.Attr) -> tuple[str, str, str]:
    is_tensor = attribute.type is ir.AttributeType.TENSOR
    content = _tensor(attribute.as_tensor()) if is_tensor else repr(attribute.value)
    return attribute.name, attribute.type.name, content


def _tensor(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype} {tensor.shape} {tensor.tobytes().hex()}"


def _constants(graph: ir.Graph, places: dict[ir.Value, int]) -> Iterator[tuple[int, str]]:
    """Yield the place of each initializer that is read, with its type, shape and, where they are few, numbers."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if value in places and tensor is not None:
            small = tensor.nbytes <= _LARGEST_COMPARED
            yield places[value], _tensor(tensor) if small else f"{tensor.dtype} {tensor.shape}"
