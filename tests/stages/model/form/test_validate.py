"""Check that each fault of a graph is found and told, and that a valid graph has none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from stages.model.form.validate import fault_of_graph, fault_of_proto
from tests.support.graphs import MICROSOFT, TinyGraph

FLOAT = TensorProto.FLOAT
Edit = Callable[[onnx.ModelProto], object]


def model() -> onnx.ModelProto:
    """Return x -> MatMul -> Cast -> y, and attention over y."""
    graph = TinyGraph()
    graph.input("x", FLOAT, ["t", 6])
    graph.linear("x", np.ones((6, 4), np.float32), "product")
    graph.node("Cast", ["product"], ["y"], {"to": FLOAT})
    graph.node("GroupQueryAttention", ["y"], ["z"], {"num_heads": 2, "kv_num_heads": 1}, MICROSOFT)
    graph.output("z", FLOAT, ["t", 4])
    return graph.proto()


def fault(edit: Edit) -> str | None:
    proto = model()
    edit(proto)
    return fault_of_proto(proto) or fault_of_graph(ir.from_proto(proto))


def test_a_valid_graph_has_no_fault() -> None:
    assert fault_of_proto(model()) is None
    assert fault_of_graph(ir.from_proto(model())) is None


def test_nodes_are_put_behind_what_they_read() -> None:
    proto = model()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    parsed = ir.from_proto(proto)
    assert fault_of_graph(parsed) is None
    assert [node.op_type for node in parsed.graph] == ["MatMul", "Cast", "GroupQueryAttention"]


def _set_dims(proto: onnx.ModelProto, *dims: int) -> None:
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)


def _constant_of_wrong_size(proto: onnx.ModelProto) -> None:
    tensor = helper.make_tensor("c", FLOAT, [1], [1.0])
    tensor.dims[0] = 3
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _no_heads(proto: onnx.ModelProto) -> None:
    next(attribute for attribute in proto.graph.node[2].attribute if attribute.name == "num_heads").i = 0


def _declared_as(proto: onnx.ModelProto, elem_type: int, shape: list[int]) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("product.weight", elem_type, shape))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda proto: proto.graph.input.append(proto.graph.input[0]), "it has the input 'x' twice"),
        (lambda proto: proto.graph.output.append(proto.graph.output[0]), "it has the output 'z' twice"),
        (
            lambda proto: proto.graph.initializer.append(proto.graph.initializer[0]),
            "it has the initializer 'product.weight' twice",
        ),
        (lambda proto: proto.opset_import.pop(0), "it doesn't say which opset it has"),
        (lambda proto: setattr(proto.opset_import[0], "version", 0), "its opset 0 never existed"),
        (lambda proto: proto.graph.node[0].input.__setitem__(0, "z"), "its nodes form a cycle"),
        (
            lambda proto: proto.graph.node[0].input.__setitem__(0, "other"),
            "MatMul node 'product/MatMul' reads 'other', which nothing makes",
        ),
        (lambda proto: proto.graph.node[0].input.pop(), "MatMul node 'product/MatMul' has 1 inputs and needs 2"),
        (
            lambda proto: proto.graph.node[2].input.pop(),
            "GroupQueryAttention node 'z/GroupQueryAttention' has 0 inputs and needs 1",
        ),
        (
            lambda proto: proto.graph.node.append(helper.make_node("Neg", ["y"], [])),
            "a Neg node has no output",
        ),
        (lambda proto: proto.graph.node[1].attribute.pop(), "Cast node 'y/Cast' lacks the attribute to"),
        (
            lambda proto: proto.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("to", 1.5)),
            "Cast node 'y/Cast' has the attribute to of type FLOAT",
        ),
        (_constant_of_wrong_size, "a Constant node has the attribute value, whose bytes don't fit its shape"),
        (
            _no_heads,
            "GroupQueryAttention node 'z/GroupQueryAttention' needs a num_heads of at least 1",
        ),
        (lambda proto: _set_dims(proto, 6, 5), "the initializer 'product.weight' has bytes that don't fit its shape"),
        (lambda proto: _set_dims(proto, -6, 4), "the initializer 'product.weight' has the shape [-6, 4]"),
        (
            lambda proto: _declared_as(proto, FLOAT, [4, 6]),
            "the initializer 'product.weight' is declared as [4, 6] and is [6, 4]",
        ),
        (
            lambda proto: _declared_as(proto, TensorProto.FLOAT16, [6, 4]),
            "the initializer 'product.weight' is declared as FLOAT16 and is FLOAT",
        ),
    ],
)
def test_a_fault_is_told(edit: Edit, words: str) -> None:
    found = fault(edit)
    assert found is not None
    assert found.startswith(words)
    if not words.endswith("the"):
        assert found == words


def test_external_data_of_another_length_is_a_fault() -> None:
    parsed = ir.from_proto(model())
    weight = parsed.graph.initializers["product.weight"]
    weight.const_value = ir.ExternalTensor(
        "data", 0, 95, ir.DataType.FLOAT, shape=ir.Shape([6, 4]), name="product.weight", base_dir="."
    )
    assert fault_of_graph(parsed) == ("the initializer 'product.weight' takes 96 bytes and its external data has 95")


def test_nodes_of_subgraphs_are_validated_too() -> None:
    def branch(name: str, reads: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, FLOAT, ["t", 4])
        return helper.make_graph([helper.make_node("MatMul", [reads], [name])], name, [], [output])

    def add(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
        branches = {"then_branch": branch("a", "y"), "else_branch": branch("b", "y")}
        proto.graph.node.append(helper.make_node("If", ["flag"], ["chosen"], **branches))

    assert fault(add) == "a MatMul node has 1 inputs and needs 2"
