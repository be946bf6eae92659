"""Compare tables that the saved graph computes with those that the base stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.forms.rotary import ComputedTable
from export.verify.isolated import IsolatedModel, relative_error, run_isolated
from stages.errors import GraphError
from stages.quantization.weights.rotary import TOLERANCE, stored_numbers
from stages.records.results import TableError


def measure_computed(folder: Path, graph: ir.Graph, node: ir.Node, table: ComputedTable) -> TableError:
    """Measure how far a computed table is from the base's.

    Args:
        folder: holds the saved data file.
        graph: the saved main graph.
        node: its node that makes the table.
        table: what was written there.

    Raises:
        GraphError: ONNX Runtime refuses the nodes, or computes other numbers.
    """
    stored = stored_numbers(table.stored)
    assert stored is not None, "it was found by its numbers"
    positions = np.arange(len(stored))
    computed = run_isolated(_isolated(graph, node, stored.shape), positions, folder)
    error = relative_error(computed, stored.astype(np.float64))
    if not error <= TOLERANCE:
        raise GraphError(
            f"The installed ONNX Runtime computes '{table.stored.name}' {error:.1e} away from the base's numbers (at "
            f"most {TOLERANCE:.0e} is rounding); pass --rotary_tables stored to stages.quantize."
        )
    return TableError(table=str(table.stored.name), error=error)


def _isolated(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...]) -> ir.Model:
    """Return positions -> their rows of the table."""
    x = ir.Value(name="x", shape=ir.Shape(shape[:1]), type=ir.TensorType(ir.DataType.INT64))
    rows = ir.Value(name="rows", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    model = IsolatedModel()
    last = ir.Node("", "Gather", [model.copy(node.outputs[0]), x], outputs=[rows])
    return model.ending_in(last, x, graph)
