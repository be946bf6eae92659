"""Check one saved embedding: its bytes against the store, and what ONNX Runtime looks up against float64 arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from jaxtyping import Float64, Int64, UInt8
from onnx_ir.tensor_adapters import TorchTensor

from export.forms.embedding import RewrittenTable, as_read
from export.save import read_initializer, saved_bytes, saved_tensor
from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from stages.errors import GraphError
from stages.records.formats import onnx_float
from stages.records.results import TableError

_TOKENS = 8
_PART = 1 << 18
"""Bytes that are compared at once."""
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
    """Raise GraphError where saved numbers aren't exactly the store's; shared ones were checked as lm_head's."""
    if table.file is None:
        return
    packed, scales = table.file.read_packed().numpy(), TorchTensor(table.file.read_scales()).tobytes()
    codes = saved_bytes(saved_tensor(node, table.codes))
    parts = (slice(start, start + _PART) for start in range(0, len(packed), _PART))
    for name, same in (
        (table.codes, all(np.array_equal(codes[part], as_read(table.plan, packed[part])) for part in parts)),
        (table.scales, saved_bytes(saved_tensor(node, table.scales)).tobytes() == scales),
    ):
        if not same:
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
    """Return (code - zero point) * scale of the tokens' rows, from the file's bytes."""
    plan, dtype = table.plan, saved_tensor(node, table.codes).dtype
    columns = np.arange(plan.table.hidden)
    codes = _numbers(
        saved_bytes(saved_tensor(node, table.codes)), tokens[:, None] * plan.table.hidden + columns, plan.bits
    )
    if dtype in (ir.DataType.INT4, ir.DataType.INT8):
        codes = (codes ^ (1 << (plan.bits - 1))) - (1 << (plan.bits - 1))
    scales = read_initializer(node, table.scales).astype(np.float64)
    if table.steps is not None:
        scales *= read_initializer(node, table.steps)
    if plan.axis == 0:
        steps = scales[tokens // plan.block_size]
    else:
        blocks = columns // plan.block_size
        codes = codes - _zero_points(node, table, tokens, dtype)[..., blocks]
        steps = scales[tokens][:, blocks]
    rows: np.ndarray = codes * steps
    return rows


def _zero_points(
    node: ir.Node, table: RewrittenTable, tokens: Int64[np.ndarray, " T"], dtype: ir.DataType
) -> Int64[np.ndarray, "#T nB"]:
    """Return the zero points of the tokens' rows: those that the operator implies where none are stored."""
    plan = table.plan
    blocks = plan.scales_shape[1]
    if table.zero_points is None:
        return np.full((1, blocks), 1 << (plan.bits - 1) if dtype == ir.DataType.UINT8 else 0)
    per_row = -(-blocks * plan.bits // 8) * 8 // plan.bits  # each row begins with a new byte
    return _numbers(
        saved_bytes(saved_tensor(node, table.zero_points)), tokens[:, None] * per_row + np.arange(blocks), plan.bits
    )


def _numbers(
    stored: UInt8[np.ndarray, " bytes"], places: Int64[np.ndarray, "T n"], bits: int
) -> Int64[np.ndarray, "T n"]:
    """Return the unsigned numbers at ``places`` of bytes that hold one or, low nibble first, two each."""
    held: np.ndarray = stored[places if bits == 8 else places // 2].astype(np.int64)
    return held if bits == 8 else held >> places % 2 * 4 & 0x0F
