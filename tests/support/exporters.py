"""Changes that turn a tiny model into what exporters other than onnxruntime-genai's builder write."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
Exporter = Callable[[onnx.ModelProto], None]


def _weights(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".weight")]


def _inputs(proto: onnx.ModelProto, ir_version: int) -> None:
    proto.ir_version = ir_version
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _constant_nodes(proto: onnx.ModelProto) -> None:
    for tensor in list(proto.graph.initializer):
        value = onnx.TensorProto()
        value.CopyFrom(tensor)
        value.name = ""
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=value))
    del proto.graph.initializer[:]


def behind(*nodes: tuple[str, dict[str, object]], stored: Callable[[np.ndarray], np.ndarray] = lambda _: _) -> Exporter:
    """Return an exporter that puts ``nodes`` between the ``stored`` weights and their readers.

    An attribute "shape" becomes the second input.
    """

    def change(proto: onnx.ModelProto) -> None:
        for tensor in _weights(proto):
            numbers, name, value = numpy_helper.to_array(tensor), tensor.name, tensor.name
            tensor.CopyFrom(numpy_helper.from_array(stored(numbers), name))
            made = []
            for number, (op_type, attributes) in enumerate(nodes):
                others = {key: each for key, each in attributes.items() if key != "shape"}
                inputs = [value]
                if "shape" in attributes:
                    shape = np.array(numbers.shape if attributes["shape"] is None else attributes["shape"])
                    inputs.append(f"{name}/{number}/shape")
                    proto.graph.initializer.append(numpy_helper.from_array(shape, inputs[1]))
                value = f"{name}/{number}"
                made.append(helper.make_node(op_type, inputs, [value], **others))
            for node in proto.graph.node:
                node.input[:] = [value if each == name else each for each in node.input]
            for node in reversed(made):
                proto.graph.node.insert(0, node)

    return change


def _functions(proto: onnx.ModelProto) -> None:
    """Call functions that name another opset than the graph."""
    body = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    opsets = [helper.make_opsetid("", 18)]
    proto.functions.append(helper.make_function("exporter", "Linear", ["x", "w"], ["y"], body, opsets))
    proto.opset_import.append(helper.make_opsetid("exporter", 1))
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            node.op_type, node.domain = "Linear", "exporter"


def _taken_names(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            for end in ("codes", "scales", "zero_points", "DequantizeLinear", "DequantizeLinear/output_0"):
                tensor = numpy_helper.from_array(np.ones(1, np.float32), f"{node.name}/{end}")
                proto.graph.initializer.append(tensor)
                kept = helper.make_tensor_value_info(tensor.name, FLOAT, [1])
                proto.graph.output.append(kept)


EXPORTERS: dict[str, Exporter] = {
    "weights are inputs": lambda proto: _inputs(proto, 8),
    "weights are inputs in IR 3": lambda proto: _inputs(proto, 3),
    "Constant nodes": _constant_nodes,
    "Identity": behind(("Identity", {})),
    "Cast": behind(("Cast", {"to": FLOAT}), stored=lambda numbers: numbers.astype(np.float16)),
    "two Casts": behind(("Cast", {"to": TensorProto.FLOAT16}), ("Cast", {"to": FLOAT})),
    "Transpose without perm": behind(("Transpose", {}), stored=np.transpose),
    "two Transposes": behind(("Transpose", {"perm": [1, 0]}), ("Transpose", {"perm": [1, 0]})),
    "Reshape of a vector": behind(("Reshape", {"shape": None}), stored=np.ravel),
    "Reshape of three axes": behind(("Reshape", {"shape": None}), stored=lambda numbers: numbers[None]),
    "Cast, Transpose, Identity": behind(
        ("Identity", {}),
        ("Cast", {"to": FLOAT}),
        ("Transpose", {"perm": [1, 0]}),
        stored=lambda w: w.T.astype(np.float16),
    ),
    "functions": _functions,
    "names that are taken": _taken_names,
}
