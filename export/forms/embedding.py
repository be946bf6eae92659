"""Write stored codes of an embedding as GatherBlockQuantized, or as DequantizeLinear before the Gather.

Requires the Gather nodes where the quantized table says, and a shared lm_head that was rewritten before. Ensures that
these nodes read codes of their own, or those of the lm_head that the table is shared with; another reader of the table
keeps the original, which stays in the graph as long as somebody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from jaxtyping import UInt8
from onnx_ir.tensor_adapters import TorchTensor

from export.forms.dequantize_linear import RewrittenSite, ScaleValues, read_scales
from export.graph_edit import MICROSOFT, GraphEditor, describe, import_microsoft, replace_op
from stages.errors import GraphError
from stages.model.patterns import name_of, readers
from stages.quantization.weights.embedding_file import TableFile
from stages.quantization.weights.store import QuantizedStore
from stages.records.formats import EmbeddingPlan, onnx_float, torch_float

_UNSAID_BITS = 4
_SIGN = 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenTable:
    """A table in the rewritten graph: where its numbers come from, and the initializers that now hold them."""

    plan: EmbeddingPlan
    file: TableFile | None
    """None where the numbers are those of the lm_head that the table is shared with."""
    codes: str
    scales: str
    zero_points: str | None = None
    steps: str | None = None
    """What scales that are bytes are multiples of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOutcome:
    """What quantizing a table did to the size; ``still_read_by`` names the nodes that keep the original alive."""

    plan: EmbeddingPlan
    bytes_before: int
    bytes_after: int
    still_read_by: tuple[str, ...]


def rewrite_tables(
    editor: GraphEditor, store: QuantizedStore, sites: Sequence[RewrittenSite] = ()
) -> tuple[RewrittenTable, ...]:
    """Let the Gather nodes of every table in ``store`` read its codes.

    Args:
        editor: of the graph.
        store: the finished weights.
        sites: those that were rewritten before: lm_heads that share their weight are among them.

    Raises:
        GraphError: a Gather isn't in the model, or reads another table.
    """
    heads = {site.source.site.name: site for site in sites}
    return tuple(
        _rewrite_table(editor, plan, store.table_file(index))
        if plan.shared_with is None
        else _share_table(editor, plan, heads[plan.shared_with])
        for index, plan in enumerate(store.recipe.embeddings)
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
    nodes = _lookups(editor, plan)
    name = nodes[0].name or plan.table.weight
    codes = editor.add_initializer(nodes[0], f"{name}/codes", _lazy_codes(plan, file))
    scales = editor.add_initializer(nodes[0], f"{name}/scales", _lazy_scales(plan, file))
    if plan.form == "dq":
        _insert_dequantize(editor, nodes, plan, [codes, _as_read(editor, nodes, scales, plan)], name)
    else:
        _make_block_quantized(nodes, plan, [codes, _as_read(editor, nodes, scales, plan)])
    return RewrittenTable(plan=plan, file=file, codes=name_of(codes), scales=name_of(scales))


def _share_table(editor: GraphEditor, plan: EmbeddingPlan, head: RewrittenSite) -> RewrittenTable:
    """Let the lookups read the initializers that the head's MatMulNBits reads."""
    nodes = _lookups(editor, plan)
    graph = nodes[0].graph
    assert isinstance(graph, ir.Graph)
    steps = None if head.steps is None else graph.initializers[head.steps]
    stored = ScaleValues(numbers=graph.initializers[head.scales], steps=steps)
    scales = read_scales(editor, nodes[0], stored, onnx_float(plan.table.dtype))
    zero_points = () if head.zero_points is None else (graph.initializers[head.zero_points],)
    _make_block_quantized(nodes, plan, [graph.initializers[head.weight], scales, *zero_points])
    return RewrittenTable(
        plan=plan,
        file=None,
        codes=head.weight,
        scales=head.scales,
        zero_points=head.zero_points,
        steps=head.steps,
    )


def _as_read(editor: GraphEditor, nodes: list[ir.Node], scales: ir.Value, plan: EmbeddingPlan) -> ir.Value:
    """Return scales in the type that rows shall have; the first lookup stands before the others."""
    return editor.read_as(nodes[0], scales, onnx_float(plan.table.dtype))


def _lookups(editor: GraphEditor, plan: EmbeddingPlan) -> list[ir.Node]:
    """Return the Gather nodes of the table, once it is sure that they read it."""
    nodes = [editor.producer(output) for output in plan.table.gathers]
    for node in nodes:
        _require_fit(plan, node)
    return nodes


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


def _make_block_quantized(nodes: list[ir.Node], plan: EmbeddingPlan, inputs: list[ir.Value]) -> None:
    """Turn the Gather nodes themselves into GatherBlockQuantized: their names and their outputs' stay.

    An INT4 table of its own has signed codes, which need no zero point, and any width will do; packed in uint8 an odd
    one would not. Its number of bits, which is 4 unless said, stays unsaid: ONNX Runtime up to 1.22 refuses that
    attribute. INT8 and what MatMulNBits shares must be uint8, which 1.23 is the first to read without zero points.

    Args:
        nodes: the lookups.
        plan: how the table is stored.
        inputs: codes, scales and, where the format has them, zero points.
    """
    attributes = {"gather_axis": 0, "quantize_axis": plan.axis, "block_size": plan.block_size}
    if plan.bits != _UNSAID_BITS or plan.shared_with is not None:
        attributes["bits"] = plan.bits
    codes, *others = inputs
    for node in nodes:
        import_microsoft(node)
        replace_op(node, MICROSOFT, "GatherBlockQuantized", [codes, node.inputs[1], *others], attributes)


def _lazy_codes(plan: EmbeddingPlan, file: TableFile) -> ir.LazyTensor:
    shape = ir.Shape(plan.table.shape)
    if plan.bits == 4:
        return ir.LazyTensor(
            lambda: ir.PackedTensor(file.read_packed().numpy(), ir.DataType.INT4, shape=shape),
            dtype=ir.DataType.INT4,
            shape=shape,
        )
    dtype = ir.DataType.INT8 if plan.form == "dq" else ir.DataType.UINT8

    def read() -> ir.TensorProtocol:
        return ir.tensor(as_read(plan, file.read_packed().numpy()).view(dtype.numpy()).reshape(plan.table.shape))

    return ir.LazyTensor(read, dtype=dtype, shape=shape)


def as_read(plan: EmbeddingPlan, packed: UInt8[np.ndarray, " bytes"]) -> UInt8[np.ndarray, " bytes"]:
    """Return stored bytes of codes as their operator reads them: INT8 ones unsigned for GatherBlockQuantized.

    It implies the zero point 128 there, by which signed codes move up: their sign bit is turned round.
    """
    return packed if plan.bits == 4 or plan.form == "dq" else packed ^ np.uint8(_SIGN)


def _lazy_scales(plan: EmbeddingPlan, file: TableFile) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: TorchTensor(file.read_scales()),
        dtype=onnx_float(plan.spec.scale_dtype),
        shape=ir.Shape(plan.scales_shape),
    )
