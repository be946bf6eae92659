"""List what a model holds besides quantized weights: tensors by the kind of their reader, and input-scale Muls."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from stages.inspect.quantized_weights import PASSED_THROUGH, node_name, num_bytes
from stages.model.patterns import FLOATING
from stages.records.sites import kind_of

_SUFFIX = re.compile(r"[_/](MatMul|Gemm|Gather|Conv)?_?(Q[248]|DQ|quant|quantized|matmul)(_Q[248])?$", re.IGNORECASE)
"""What quantizers add to the names of nodes."""
_NUMBER = re.compile(r"\d+")
_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})
_NORMALIZING = frozenset({"Div", "Sqrt", "Reciprocal", "ReduceMean", "Pow", "Rsqrt"})
"""Operators that compute the factors of a norm written out in small nodes, whose gain is a Mul by a vector too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnquantizedTensors:
    """Initializers that one kind of node reads and that aren't part of a quantized weight."""

    reader: str
    """Operator; empty where no node reads them."""
    kind: str
    """Name of the reading nodes without their layer; all vectors and scalars are of one kind."""
    type: str
    count: int
    """Initializers."""
    bytes: int


def general_kind(node: str) -> str:
    """Return a node's name without its layer, numbers, and what quantizers add: the same in every layer."""
    return _NUMBER.sub("*", kind_of(_SUFFIX.sub("", node)))


def find_unquantized(model: ir.Model, quantized: Collection[str]) -> tuple[UnquantizedTensors, ...]:
    """Return every initializer whose name isn't among ``quantized``, the largest kinds first."""
    found: dict[tuple[str, str, str], list[ir.Value]] = defaultdict(list)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.name not in quantized:
                found[_place(value)].append(value)
    groups = [
        UnquantizedTensors(reader=reader, kind=kind, type=dtype, count=len(values), bytes=sum(map(num_bytes, values)))
        for (reader, kind, dtype), values in found.items()
    ]
    return tuple(sorted(groups, key=lambda group: -group.bytes))


def _place(value: ir.Value) -> tuple[str, str, str]:
    dtype = "" if value.dtype is None else value.dtype.name
    reader = next(_readers(value), None)
    if reader is None:
        return "", "read by no node", dtype
    if value.shape is None or len(value.shape) < 2:
        return reader.op_type, "vectors and scalars", dtype
    return reader.op_type, general_kind(reader.name or str(value.name)), dtype


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    for node in value.consumers():
        if node.op_type in PASSED_THROUGH and node.outputs[0].consumers():
            yield from _readers(node.outputs[0])
        else:
            yield node


def is_float(tensors: UnquantizedTensors) -> bool:
    """Return whether the numbers are floating point."""
    return tensors.type in {dtype.name for dtype in FLOATING}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScaleMul:
    """A Mul that applies an input scale; it costs a pass over the activation for every token."""

    node: str
    channels: int
    readers: tuple[str, ...]
    """The quantized MatMuls that read the result."""


def find_input_scales(model: ir.Model, quantized: Collection[str]) -> tuple[InputScaleMul, ...]:
    """Return the Muls by a constant vector whose result only the nodes named in ``quantized`` multiply with.

    The gain that ends a norm written out in small nodes is not an input scale.
    """
    found = []
    for node in model.graph.all_nodes():
        vector = _vector(node) if node.op_type == "Mul" else None
        readers = [node_name(reader) for reader in node.outputs[0].consumers()]
        products = all(reader.op_type in _PRODUCTS for reader in node.outputs[0].consumers())
        if vector and readers and products and set(readers) <= set(quantized) and not _ends_norm(node):
            found.append(InputScaleMul(node=node_name(node), channels=vector, readers=tuple(readers)))
    return tuple(found)


def _vector(node: ir.Node) -> int:
    """Return the length of the constant factor; 0 where neither factor is a constant vector."""
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
