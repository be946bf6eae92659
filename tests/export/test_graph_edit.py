"""New nodes and initializers get names that are free anywhere in the model, and a missing producer is named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from export.graph_edit import GraphEditor, describe, replace_op
from stages.errors import GraphError
from tests.support.graphs import MICROSOFT, TinyGraph


@pytest.fixture
def model() -> ir.Model:
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [2, 3])
    graph.linear("x", np.ones((3, 4), np.float32), "y")
    graph.output("y", TensorProto.FLOAT, [2, 4])
    return graph.model()


def test_a_name_that_is_taken_is_counted_up(model: ir.Model) -> None:
    editor = GraphEditor.of(model)
    node = editor.producer("y")
    names = [editor.add_initializer(node, name, ir.tensor([1.0])).name for name in ("y.weight", "y.weight", "x", "new")]
    assert names == ["y.weight_2", "y.weight_3", "x_2", "new"]
    inserted = [editor.insert_before(node, "Neg", [node.inputs[0]], "y/Neg", {}).name for _ in range(2)]
    assert inserted == ["y/Neg/output_0", "y/Neg_2/output_0"]
    assert [each.name for each in model.graph] == ["y/Neg", "y/Neg_2", "y/MatMul"]


def test_an_inserted_node_stands_before_its_reader_and_declares_what_it_makes(model: ir.Model) -> None:
    editor = GraphEditor.of(model)
    node = editor.producer("y")
    shape, kind = ir.Shape((2, 3)), ir.TensorType(ir.DataType.FLOAT)
    made = editor.insert_before(node, "Neg", [node.inputs[0]], "before", {}, shape=shape, kind=kind)
    assert [each.name for each in model.graph] == ["before", "y/MatMul"]
    assert (made.shape, made.type) == (shape, kind)


def test_a_missing_producer_is_named_with_the_fix(model: ir.Model) -> None:
    with pytest.raises(GraphError, match=r"no node that makes 'nowhere'.*; pass the base model"):
        GraphEditor.of(model).producer("nowhere")


def test_a_replaced_operator_keeps_name_and_output_and_nothing_else(model: ir.Model) -> None:
    node = GraphEditor.of(model).producer("y")
    node.attributes["old"] = ir.AttrInt64("old", 1)
    replace_op(node, MICROSOFT, "MatMulNBits", [node.inputs[0]], {"K": 3})
    assert (node.name, node.outputs[0].name, node.domain) == ("y/MatMul", "y", MICROSOFT)
    assert [value.name for value in node.inputs] == ["x"]
    assert {name: attribute.as_int() for name, attribute in node.attributes.items()} == {"K": 3}
    assert describe(node) == "MatMulNBits 'y/MatMul'"
