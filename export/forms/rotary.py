"""Let the graph compute tables of rotary embeddings: ONNX Runtime does so once, when it loads the model.

The nodes depend on constants only, so that the runtime's constant folding puts their results in their place before it
gives nodes to execution providers (run on the CPU with 1.20 to 1.32, in the branches of an If too).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.graph_edit import GraphEditor
from stages.model.patterns import name_of
from stages.quantization.weights.rotary import RotaryTables, find_rotary_tables

_FLOAT = ir.TensorType(ir.DataType.FLOAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedTable:
    """A table that nodes compute now."""

    output: str
    """The value that is read in its place."""
    stored: ir.Value
    """The base's."""
    magnitude: float


def compute_rotary_tables(editor: GraphEditor, model: ir.Model) -> tuple[ComputedTable, ...]:
    """Put nodes in the place of the tables that frequencies give; others stay.

    Args:
        editor: of the graph.
        model: the graph, which is changed.
    """
    return tuple(made for tables in find_rotary_tables(model) for made in _compute(editor, tables))


def _compute(editor: GraphEditor, tables: RotaryTables) -> tuple[ComputedTable, ...]:
    graph = tables.cosines.graph
    assert isinstance(graph, ir.Graph)
    first = graph[0]
    angles = _angles(editor, first, tables)
    return (
        _replace(editor, first, "Cos", angles, tables.cosines, tables.magnitude),
        _replace(editor, first, "Sin", angles, tables.sines, tables.magnitude),
    )


def _angles(editor: GraphEditor, first: ir.Node, tables: RotaryTables) -> ir.Value:
    """Return position * frequency, [positions, D]."""
    name = f"{name_of(tables.cosines)}/angles"

    def constant(part: str, numbers: np.ndarray | np.generic) -> ir.Value:
        return editor.add_initializer(first, f"{name}/{part}", ir.tensor(np.asarray(numbers)))

    def insert(op_type: str, inputs: list[ir.Value], *shape: int) -> ir.Value:
        shaped = ir.Shape(shape)
        return editor.insert_before(first, op_type, inputs, f"{name}/{op_type}", {}, shape=shaped, kind=_FLOAT)

    ends = (("start", 0), ("limit", tables.positions), ("delta", 1))
    row = insert("Range", [constant(part, np.float32(number)) for part, number in ends], tables.positions)
    column = insert("Reshape", [row, constant("column", np.array([-1, 1]))], tables.positions, 1)
    frequencies = constant("frequencies", tables.frequencies)
    return insert("Mul", [column, frequencies], tables.positions, len(tables.frequencies))


def _replace(
    editor: GraphEditor, first: ir.Node, op_type: str, angles: ir.Value, stored: ir.Value, magnitude: float
) -> ComputedTable:
    name = name_of(stored)
    made = editor.insert_before(first, op_type, [angles], f"{name}/{op_type}", {}, shape=angles.shape, kind=_FLOAT)
    if magnitude != 1:
        factor = editor.add_initializer(first, f"{name}/magnitude", ir.tensor(np.float32(magnitude)))
        made = editor.insert_before(first, "Mul", [made, factor], f"{name}/Mul", {}, shape=angles.shape, kind=_FLOAT)
    stored.replace_all_uses_with(made, replace_graph_outputs=True)
    return ComputedTable(output=name_of(made), stored=stored, magnitude=magnitude)
