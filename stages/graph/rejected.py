"""MatMul and Gemm nodes that are no sites, each with the reason: no weight is skipped silently."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from stages.graph.sites import weight_of
from stages.records import float_of_onnx

_NO_WEIGHT = "it multiplies two activations"


def find_rejected(model: ir.Model) -> tuple[tuple[str, str], ...]:
    """(node, why) for every MatMul and Gemm that can't be quantized, subgraphs included, in graph order."""
    main = set(model.graph)
    return tuple(
        (str(node.name or node.outputs[0].name), _reason(node, in_main_graph=node in main))
        for node in model.graph.all_nodes()
        if node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm")
        if node not in main or weight_of(node) is None
    )


def _reason(node: ir.Node, *, in_main_graph: bool) -> str:
    left, right = node.inputs[:2]
    if right is None or not _is_constant(right):
        return "its weight is the first input" if left is not None and _is_constant(left) else _NO_WEIGHT
    if not in_main_graph:
        return "it lies in a subgraph"
    return "; ".join(_faults_of_gemm(node)) or _fault_of_weight(right)


def _faults_of_gemm(node: ir.Node) -> Iterator[str]:
    if node.attributes.get_int("transA", 0):
        yield "its Gemm transposes the activation (transA)"
    if node.attributes.get_float("alpha", 1.0) != 1:
        yield "its Gemm scales the product (alpha)"


def _fault_of_weight(weight: ir.Value) -> str:
    maker = weight.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        return "its weight is quantized already"
    if maker is not None:
        return f"its weight is no initializer but computed in the graph ({maker.op_type})"
    if float_of_onnx(weight.dtype) is None:
        return f"its weight is {'of unknown type' if weight.dtype is None else weight.dtype.name}"
    if weight.shape is not None and 0 in weight.shape:
        return "its weight is empty"
    return "its weight's rank is unknown" if weight.shape is None else f"its weight has rank {len(weight.shape)}"


def _is_constant(value: ir.Value) -> bool:
    """Whether ``value`` is the same in every run: an initializer, or made from nothing but such values."""
    pending, seen = [value], {id(value)}
    while pending:
        current = pending.pop()
        if current.is_initializer():
            continue
        maker = current.producer()
        if maker is None or any(attribute.type is ir.AttributeType.GRAPH for attribute in maker.attributes.values()):
            return False
        for source in maker.inputs:
            if source is not None and id(source) not in seen:
                seen.add(id(source))
                pending.append(source)
    return True
