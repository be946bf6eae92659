"""Write stored codes of an embedding as GatherBlockQuantized, or as DequantizeLinear before the Gather.

Requires the Gather nodes where the quantized table says. Ensures that only these nodes read the codes: another reader
of the table (a tied lm_head) keeps the original, which stays in the graph as long as somebody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor

from export.graph_edit import MICROSOFT, GraphEditor, describe, import_microsoft, name_of, replace_op
from stages.errors import GraphError
from stages.model.patterns import readers
from stages.quantization.weights.embedding_file import TableFile
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import EmbeddingPlan, onnx_float, torch_float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenTable:
    """A table in the rewritten graph: where its numbers come from, and the initializers that now hold them."""

    plan: EmbeddingPlan
    file: TableFile
    codes: str
    scales: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOutcome:
    """What quantizing a table did to the size; ``still_read_by`` names the nodes that keep the original alive."""

    plan: EmbeddingPlan
    bytes_before: int
    bytes_after: int
    still_read_by: tuple[str, ...]


def rewrite_tables(editor: GraphEditor, store: QuantizedStore) -> tuple[RewrittenTable, ...]:
    """Let the Gather nodes of every table in ``store`` read its codes.

    Raises:
        GraphError: a Gather isn't in the model, or reads another table.
    """
    return tuple(
        _rewrite_table(editor, plan, store.table_file(index)) for index, plan in enumerate(store.recipe.embeddings)
    )


def table_outcomes(model: ir.Model, tables: Sequence[RewrittenTable]) -> tuple[TableOutcome, ...]:
    """Return sizes before and after; call it when unused nodes are gone from ``model``."""
    return tuple(_outcome(model, table.plan) for table in tables)


def _outcome(model: ir.Model, plan: EmbeddingPlan) -> TableOutcome:
    rows, columns = plan.table.shape
    original = model.graph.initializers.get(plan.table.weight)
    kept_by = () if original is None else dict.fromkeys(node for node, _ in readers(original))
    return TableOutcome(
        plan=plan,
        bytes_before=rows * columns * torch_float(plan.table.dtype).itemsize,
        bytes_after=plan.format_bytes,
        still_read_by=tuple(str(node.name) for node in kept_by),
    )


def _rewrite_table(editor: GraphEditor, plan: EmbeddingPlan, file: TableFile) -> RewrittenTable:
    nodes = [editor.producer(output) for output in plan.table.gathers]
    for node in nodes:
        _require_fit(plan, node)
    name = nodes[0].name or plan.table.weight
    codes = editor.add_initializer(nodes[0], f"{name}/codes", _lazy_codes(plan, file))
    scales = editor.add_initializer(nodes[0], f"{name}/scales", _lazy_scales(plan, file))
    if plan.form == "dq":
        _insert_dequantize(editor, nodes, plan, [codes, scales], name)
    else:
        for node in nodes:
            _make_block_quantized(node, plan, codes, scales)
    return RewrittenTable(plan=plan, file=file, codes=name_of(codes), scales=name_of(scales))


def _require_fit(plan: EmbeddingPlan, node: ir.Node) -> None:
    table = node.inputs[0] if node.op_type == "Gather" else None
    maker = None if table is None else table.producer()
    source = maker.inputs[0] if maker is not None and plan.table.transposed else table
    if source is None or source.name != plan.table.weight or not source.is_initializer():
        raise GraphError(
            f"{describe(node)} of the base model does not look tokens up in '{plan.table.weight}'; pass the base model "
            "that the quantized weights were made from."
        )


def _insert_dequantize(
    editor: GraphEditor, nodes: list[ir.Node], plan: EmbeddingPlan, inputs: list[ir.Value], name: str
) -> None:
    floats = editor.insert_before(
        nodes[0],
        "DequantizeLinear",
        inputs,
        f"{name}/DequantizeLinear",
        {"axis": plan.axis, "block_size": plan.block_size},
        shape=ir.Shape(plan.table.shape),
        kind=ir.TensorType(onnx_float(plan.table.dtype)),
    )
    for node in nodes:
        node.replace_input_with(0, floats)


def _make_block_quantized(node: ir.Node, plan: EmbeddingPlan, codes: ir.Value, scales: ir.Value) -> None:
    """Turn the Gather itself into GatherBlockQuantized: its name and its output's stay.

    Signed codes need no zero point, and any width of the table will do; packed in uint8 an odd one would not. The
    number of bits, which is 4 unless said, stays unsaid: ONNX Runtime up to 1.22 refuses that attribute.
    """
    import_microsoft(node)
    attributes = {"gather_axis": 0, "quantize_axis": plan.axis, "block_size": plan.block_size}
    replace_op(node, MICROSOFT, "GatherBlockQuantized", [codes, node.inputs[1], scales], attributes)


def _lazy_codes(plan: EmbeddingPlan, file: TableFile) -> ir.LazyTensor:
    shape = ir.Shape(plan.table.shape)
    return ir.LazyTensor(
        lambda: ir.PackedTensor(file.read_packed().numpy(), ir.DataType.INT4, shape=shape),
        dtype=ir.DataType.INT4,
        shape=shape,
    )


def _lazy_scales(plan: EmbeddingPlan, file: TableFile) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: TorchTensor(file.read_scales()), dtype=onnx_float(plan.table.dtype), shape=ir.Shape(plan.scales_shape)
    )
