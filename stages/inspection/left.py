"""What a model holds besides its quantized weights: numbers by the kind of node that reads them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from stages.inspection.stored import num_bytes
from stages.site_names import kind_of

_PASSED_THROUGH = frozenset({"Transpose", "Cast", "Identity", "Reshape"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_SUFFIX = re.compile(r"[_/](MatMul|Gemm|Gather|Conv)?_?(Q[248]|DQ|quant|quantized|matmul)(_Q[248])?$", re.IGNORECASE)
"""What quantizers add to the names of nodes."""
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftWeights:
    """Numbers that one kind of node reads as they are."""

    reader: str
    """Operator; empty where no node reads them."""
    kind: str
    """Name of the reading nodes without their layer, or the initializers' where they are small."""
    type: str
    count: int
    """Initializers."""
    bytes: int


def general_kind(node: str) -> str:
    """A node's name without layer, numbers, and what quantizers add: the same for the same place in every layer."""
    return _NUMBER.sub("*", kind_of(_SUFFIX.sub("", node)))


def find_left(model: ir.Model, quantized: Collection[str]) -> tuple[LeftWeights, ...]:
    """Every initializer that isn't among ``quantized``, the largest kinds first. Vectors are one kind a reader."""
    found: dict[tuple[str, str, str], list[ir.Value]] = defaultdict(list)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.name not in quantized:
                found[_place(value)].append(value)
    groups = [
        LeftWeights(reader=reader, kind=kind, type=dtype, count=len(values), bytes=sum(map(num_bytes, values)))
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
        if node.op_type in _PASSED_THROUGH and node.outputs[0].consumers():
            yield from _readers(node.outputs[0])
        else:
            yield node


def is_float(left: LeftWeights) -> bool:
    """Whether the numbers are floating point."""
    return left.type in {dtype.name for dtype in _FLOATS}
