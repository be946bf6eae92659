"""Check one saved embedding: its bytes against the store, and what ONNX Runtime looks up against float64 arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from jaxtyping import Float64, Int64
from onnx_ir.tensor_adapters import TorchTensor

from export.forms.embedding import RewrittenTable
from export.save import read_initializer
from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from stages.errors import GraphError
from stages.records.formats import onnx_float
from stages.records.results import TableError

_TOKENS = 8
_TOKENS_INPUT = 1
_TOLERANCE = {
    # One product of float32 numbers, rounded once.
    "float32": 1e-6,
    # The same, rounded to float16: 2^-11.
    "float16": 6e-4,
    # Computed in float32, with numbers that bfloat16 holds.
    "bfloat16": 1e-6,
}


def check_stored_table(node: ir.Node, table: RewrittenTable) -> None:
    """Raise GraphError where saved codes or scales aren't exactly the store's."""
    for name, expected in (
        (table.codes, table.file.read_packed().numpy().tobytes()),
        (table.scales, TorchTensor(table.file.read_scales()).tobytes()),
    ):
        if _bytes_of(node, name) != expected:
            raise GraphError(
                f"What was saved as '{name}' differs from the quantized embedding '{table.plan.table.weight}'; check "
                "the disk and export again."
            )


def measure_table(folder: Path, node: ir.Node, table: RewrittenTable) -> TableError:
    """Measure the error of a saved table's lookups.

    Args:
        folder: holds the saved data file.
        node: the saved Gather or GatherBlockQuantized.
        table: what was written there.

    Raises:
        GraphError: ONNX Runtime refuses the table, or looks up something else than its numbers.
    """
    last = table.plan.table.vocabulary - 1
    tokens = np.random.default_rng(0).integers(0, last + 1, _TOKENS)
    tokens[:2] = 0, last
    rows = run_isolated(_isolated(node, table), tokens, folder)
    error = relative_error(rows, _reference(node, table, tokens))
    tolerance = _TOLERANCE[table.plan.table.dtype]
    if not error < tolerance:
        raise GraphError(
            f"The saved embedding '{table.plan.table.weight}' gives rows {error:.1e} away from its own numbers (at "
            f"most {tolerance:.0e} is rounding) on ONNX Runtime; try another version of it or --gather_form dq."
        )
    return TableError(table=table.plan.table.weight, error=error)


def _isolated(node: ir.Node, table: RewrittenTable) -> ir.Model:
    """Return tokens -> the node itself [behind its DequantizeLinear]."""
    entry = table.plan.table
    x = ir.Value(name="x", shape=ir.Shape((_TOKENS,)), type=ir.TensorType(ir.DataType.INT64))
    rows = ir.Value(name="rows", shape=ir.Shape((_TOKENS, entry.hidden)), type=ir.TensorType(onnx_float(entry.dtype)))
    model, graph = IsolatedModel(), node.graph
    assert isinstance(graph, ir.Graph)
    inputs = [
        x if index == _TOKENS_INPUT else model.copy(value)
        for index, value in enumerate(node.inputs)
        if value is not None
    ]
    last = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=[rows])
    return model.ending_in(last, x, graph)


# --------------------------------------------------------------------------- float64 arithmetic on the saved numbers


def _reference(node: ir.Node, table: RewrittenTable, tokens: Int64[np.ndarray, " T"]) -> Float64[np.ndarray, "T D"]:
    """Return code * scale of the tokens' rows, from the file's bytes."""
    plan = table.plan
    hidden = plan.table.hidden
    packed = np.frombuffer(_bytes_of(node, table.codes), np.uint8)
    position = tokens[:, None] * hidden + np.arange(hidden)
    nibbles = (packed[position // 2] >> (position % 2 * 4).astype(np.uint8)) & 0x0F
    codes = (nibbles.astype(np.int64) ^ 8) - 8
    scales = read_initializer(node, table.scales).astype(np.float64)
    if plan.axis == 0:
        steps = scales[tokens // plan.block_size]
    else:
        steps = scales[tokens][:, np.arange(hidden) // plan.block_size]
    rows: np.ndarray = codes * steps
    return rows


def _bytes_of(node: ir.Node, name: str) -> bytes:
    assert isinstance(node.graph, ir.Graph)
    tensor = node.graph.initializers[name].const_value
    assert tensor is not None
    content = tensor.tobytes()
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return content
