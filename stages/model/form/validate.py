"""Validate a parsed graph, so that others may rely on its nodes' inputs and its weights' sizes.

ONNX's own checker refuses the operators that ONNX Runtime adds to the standard domain, so it can't be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from types import MappingProxyType

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

_STANDARD = ("", "ai.onnx")
_HEAD_COUNTS = MappingProxyType(
    {"GroupQueryAttention": ("num_heads", "kv_num_heads"), "MultiHeadAttention": ("num_heads",)}
)
_FEWEST_INPUTS = MappingProxyType(
    {
        "GroupQueryAttention": 1,
        "MultiHeadAttention": 1,
        "SimplifiedLayerNormalization": 2,
        "SkipLayerNormalization": 3,
        "SkipSimplifiedLayerNormalization": 3,
    }
)
"""Of the operators without a schema in ONNX, those whose inputs are looked at."""


def fault_of_proto(proto: onnx.ModelProto) -> str | None:
    """Return what parsing would hide, in words: a name that is given twice; None where there is none."""
    graph = proto.graph
    for what, values in (("input", graph.input), ("output", graph.output), ("initializer", graph.initializer)):
        twice = [name for name, count in Counter(value.name for value in values).items() if count > 1]
        if twice:
            return f"it has the {what} '{twice[0]}' twice"
    return None


def fault_of_graph(model: ir.Model) -> str | None:
    """Return the first fault of ``model``, in words; None where it is valid.

    Ensures: nodes stand behind what they read, in the main graph and in subgraphs.
    """
    version = opset_of(model)
    if version is None:
        return "it doesn't say which opset it has"
    if version < 1:
        return f"its opset {version} never existed"
    try:
        model.graph.sort()
    except ValueError:
        return "its nodes form a cycle"
    nodes = [*model.graph.all_nodes(), *(node for each in model.functions.values() for node in each.all_nodes())]
    weights = [value for graph in model.graphs() for value in graph.initializers.values()]
    faults = chain((_faults_of_node(model, node) for node in nodes), map(_faults_of_weight, weights))
    return next(chain.from_iterable(faults), None)


def opset_of(model: ir.Model) -> int | None:
    """Return the version of ONNX's own operators that ``model`` imports; None where it doesn't say."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx"))


def _describe(node: ir.Node) -> str:
    return f"{node.op_type} node '{node.name}'" if node.name else f"a {node.op_type} node"


def _faults_of_node(model: ir.Model, node: ir.Node) -> Iterator[str]:
    if not node.outputs:
        yield f"{_describe(node)} has no output"
    if isinstance(node.graph, ir.Graph):
        yield from _faults_of_inputs(node)
    schema = _schema(model, node)
    fewest = _FEWEST_INPUTS.get(node.op_type, 0) if schema is None else schema.min_input
    if len(node.inputs) < fewest:
        yield f"{_describe(node)} has {len(node.inputs)} inputs and needs {fewest}"
    yield from _faults_of_attributes(node, schema)


def _faults_of_inputs(node: ir.Node) -> Iterator[str]:
    for value in node.inputs:
        if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        yield f"{_describe(node)} reads '{value.name}', which nothing makes"


def _schema(model: ir.Model, node: ir.Node) -> OpSchema | None:
    version = opset_of(model)
    if node.domain not in _STANDARD or version is None:
        return None
    try:
        return onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _faults_of_attributes(node: ir.Node, schema: OpSchema | None) -> Iterator[str]:
    declared = {} if schema is None else schema.attributes
    for name, attribute in declared.items():
        if attribute.required and name not in node.attributes:
            yield f"{_describe(node)} lacks the attribute {name}"
    for name, given in node.attributes.items():
        if name in declared and given.type.name != str(declared[name].type).rpartition(".")[2]:
            yield f"{_describe(node)} has the attribute {name} of type {given.type.name}"
        if not given.is_ref() and given.type == ir.AttributeType.TENSOR and not _is_readable(given.as_tensor()):
            yield f"{_describe(node)} has the attribute {name}, whose bytes don't fit its shape"
    for name in _HEAD_COUNTS.get(node.op_type, ()):
        count = node.attributes.get(name)
        if count is None or count.type != ir.AttributeType.INT or (not count.is_ref() and count.as_int() < 1):
            yield f"{_describe(node)} needs a {name} of at least 1"


def _faults_of_weight(value: ir.Value) -> Iterator[str]:
    tensor = value.const_value
    if tensor is None:
        yield f"the initializer '{value.name}' has no value"
        return
    dims = tensor.shape.numpy()
    if any(dim < 0 for dim in dims):
        yield f"the initializer '{value.name}' has the shape {list(dims)}"
    elif value.shape is not None and value.shape.is_static() and value.shape.numpy() != dims:
        yield f"the initializer '{value.name}' is declared as {list(value.shape.numpy())} and is {list(dims)}"
    elif value.dtype is not None and value.dtype != tensor.dtype:
        yield f"the initializer '{value.name}' is declared as {value.dtype.name} and is {tensor.dtype.name}"
    elif isinstance(tensor, ir.ExternalTensor):
        length = tensor.nbytes if tensor.length is None else tensor.length
        if length != tensor.nbytes:
            yield f"the initializer '{value.name}' takes {tensor.nbytes} bytes and its external data has {length}"
    elif not _is_readable(tensor):
        yield f"the initializer '{value.name}' has bytes that don't fit its shape"


def _is_readable(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor has as many numbers as its shape says; external data isn't read."""
    if isinstance(tensor, ir.ExternalTensor):
        return True
    try:
        tensor.numpy()
    except Exception:  # numpy, ml_dtypes and onnx-ir each raise classes of their own for sizes that don't fit
        return False
    return True
