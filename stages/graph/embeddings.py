"""Find the tables that token ids are looked up in: what Gather reads with ``input_ids``, and nothing else."""

from __future__ import annotations

import onnx_ir as ir

from stages.graph.sites import swapped_initializer
from stages.records import EmbeddingTable, float_of_onnx

_TOKENS = "input_ids"


def find_embeddings(model: ir.Model) -> tuple[EmbeddingTable, ...]:
    """The embedding tables of the main graph, in graph order.

    A table is a rank-2 floating-point initializer, read directly or through a Transpose by a Gather along the token
    axis whose indices are the graph input ``input_ids``, directly or through Casts. Rotary caches and other tables are
    looked up with something else.
    """
    found: dict[tuple[str, bool], list[ir.Node]] = {}
    for node in model.graph:
        if (source := _table_of(node)) is not None:
            found.setdefault(source, []).append(node)
    return tuple(_as_table(model, weight, transposed, nodes) for (weight, transposed), nodes in found.items())


def _table_of(node: ir.Node) -> tuple[str, bool] | None:
    """Name of the table's initializer and whether a Transpose stands before the Gather; None for any other node."""
    if node.domain not in ("", "ai.onnx") or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    data, indices = node.inputs[:2]
    if data is None or not _are_tokens(indices):
        return None
    source = swapped_initializer(data)
    table = data if source is None else source
    if not table.is_initializer() or table.shape is None or len(table.shape) != 2 or float_of_onnx(table.dtype) is None:
        return None
    return str(table.name), source is not None


def _are_tokens(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast":
            return False
        value = node.inputs[0]
    return value is not None and value.is_graph_input() and value.name == _TOKENS


def _as_table(model: ir.Model, weight: str, transposed: bool, nodes: list[ir.Node]) -> EmbeddingTable:
    value = model.graph.initializers[weight]
    kind = float_of_onnx(value.dtype)
    assert value.shape is not None
    assert kind is not None
    rows, columns = value.shape.numpy()
    return EmbeddingTable(
        weight=weight,
        gathers=tuple(str(node.outputs[0].name) for node in nodes),
        vocabulary=columns if transposed else rows,
        hidden=rows if transposed else columns,
        transposed=transposed,
        dtype=kind.name,
    )
