"""Raise a graph's opset with onnx's own version converter, without showing it the model.

The converter needs a definition of every operator and copies every weight: it can take neither com.microsoft nodes nor
gigabytes. So it gets one small model of isolated nodes, those whose definition changed between the two opsets: their
inputs and outputs are bare names, their subgraphs empty. What it makes of each is put back in the node's place.
Nodes of other domains, weights, and the names of nodes and values stay as they are; subgraphs are converted like the
main graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import defs, helper, version_converter

from export.graph_edit import GraphEditor, describe
from stages.errors import GraphError
from stages.records.formats import WeightForm
from stages.records.results import ExportRecipe

DEQUANTIZE_OPSET = 21
"""First opset whose DequantizeLinear has 4-bit codes and blocks."""
_ONNX_DOMAIN = frozenset({"", "ai.onnx"})
_RUNTIMES_OWN = frozenset({"LayerNormalization"})
"""ONNX Runtime had these in ONNX's domain before ONNX did, with the same inputs and attributes."""
_LEFT_WRONG = frozenset({"GroupNormalization"})
"""Opset 21 gave its scale and bias another length, which the converter of onnx 1.23 passes over in silence."""
_IR_VERSION = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsetChange:
    """The conversion that was done: the opset before and after, and how many nodes have another definition there."""

    before: int
    after: int
    nodes: int

    def __str__(self) -> str:
        return f"converted from opset {self.before} to {self.after}; nodes with another definition there: {self.nodes}"


def lowest_opset(recipe: ExportRecipe) -> int:
    """Return the opset that the nodes which ``recipe`` writes need: MatMulNBits and GatherBlockQuantized need none."""
    writes_dq = recipe.weight_form is not WeightForm.MATMUL_NBITS
    writes_dq = writes_dq or any(plan.form == "dq" for plan in recipe.embeddings)
    return DEQUANTIZE_OPSET if writes_dq else 1


def raise_opset(model: ir.Model, lowest: int) -> OpsetChange | None:
    """Convert ``model`` in place to opset ``lowest``; None where it has that opset or a later one.

    Raises:
        GraphError: the model names no opset or has functions of its own, or onnx can't convert a node.
    """
    before = max(model.opset_imports.get(name, 0) for name in _ONNX_DOMAIN)
    if before >= lowest:
        return None
    _require_convertible(model, before)
    nodes = [node for node in model.graph.all_nodes() if _changes(node, before, lowest)]
    isolated = [_IsolatedNode(node=node, key=f"node{index}") for index, node in enumerate(nodes)]
    converted = _convert(isolated, before, lowest)
    editor = GraphEditor.of(model)
    for item in isolated:
        _put_back(editor, item, converted, lowest)
    for graph in model.graphs():
        for name in _ONNX_DOMAIN & graph.opset_imports.keys():
            graph.opset_imports[name] = lowest
    return OpsetChange(before=before, after=lowest, nodes=len(nodes))


def _require_convertible(model: ir.Model, before: int) -> None:
    if before < 1:
        raise GraphError("The base model doesn't say which opset it has; build it again.")
    if model.functions:
        name = next(iter(model.functions.values())).name
        raise GraphError(
            f"The base model has opset {before} and a function of its own ('{name}'), which can't be converted; "
            "inline its functions or build it again."
        )


def _changes(node: ir.Node, before: int, after: int) -> bool:
    """Say whether ONNX defines the node's operator anew between the two opsets.

    Raises:
        GraphError: ONNX has the operator, but not yet in opset ``before``; or it can't be converted rightly.
    """
    if node.domain not in _ONNX_DOMAIN or not defs.has(node.op_type):
        return False
    old = _defined_in(node.op_type, before)
    if old is None and node.op_type not in _RUNTIMES_OWN:
        raise GraphError(f"{describe(node)} of the base model is no operator of its opset {before}; build it again.")
    changes = old is not None and old != _defined_in(node.op_type, after)
    if changes and node.op_type in _LEFT_WRONG:
        raise _refusal(node, after, "its converter passes over the new length of scale and bias")
    return changes


def _defined_in(op_type: str, opset: int) -> int | None:
    try:
        return int(defs.get_schema(op_type, opset).since_version)
    except defs.SchemaError:
        return None


# --------------------------------------------------------------------------- what the converter is given


@dataclass(frozen=True, slots=True, kw_only=True)
class _IsolatedNode:
    """A node whose inputs and outputs have names made from its own key."""

    node: ir.Node
    key: str

    def inputs(self) -> list[str]:
        return [f"{self.key}.in{index}" if value else "" for index, value in enumerate(self.node.inputs)]

    def outputs(self) -> list[str]:
        return [f"{self.key}.out{index}" if value.name else "" for index, value in enumerate(self.node.outputs)]

    def proto(self) -> onnx.NodeProto:
        made = helper.make_node(self.node.op_type, self.inputs(), self.outputs(), name=self.key)
        made.attribute.extend(_attribute(attribute) for attribute in self.node.attributes.values())
        return made


def _attribute(attribute: ir.Attr) -> onnx.AttributeProto:
    if attribute.type is ir.AttributeType.GRAPH:
        return helper.make_attribute(attribute.name, helper.make_graph([], attribute.name, [], []))
    made: onnx.AttributeProto = ir.to_proto(attribute)
    return made


def _convert(isolated: Sequence[_IsolatedNode], before: int, after: int) -> dict[str, onnx.NodeProto]:
    """Return the converted nodes by each of their outputs.

    Raises:
        GraphError: onnx has no way to convert one of them; it is named.
    """
    try:
        model = version_converter.convert_version(_model_of(isolated, before), after)
    except RuntimeError as error:
        if len(isolated) > 1:
            # The converter names the operator but not the node: each for itself until it fails.
            return {name: node for item in isolated for name, node in _convert([item], before, after).items()}
        raise _refusal(isolated[0].node, after, f"from opset {before}: {str(error).rpartition(': ')[2]}") from error
    return {output: node for node in model.graph.node for output in node.output if output}


def _model_of(isolated: Sequence[_IsolatedNode], opset: int) -> onnx.ModelProto:
    inputs = [onnx.ValueInfoProto(name=name) for item in isolated for name in item.inputs() if name]
    outputs = [onnx.ValueInfoProto(name=name) for item in isolated for name in item.outputs() if name]
    graph = helper.make_graph([item.proto() for item in isolated], "changed nodes", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION)


def _refusal(node: ir.Node, after: int, reason: str) -> GraphError:
    return GraphError(
        f"onnx can't convert {describe(node)} of the base model to opset {after} ({reason}); build the model again "
        "with a newer model builder."
    )


# --------------------------------------------------------------------------- back into the graph


def _put_back(editor: GraphEditor, item: _IsolatedNode, converted: dict[str, onnx.NodeProto], after: int) -> None:
    """Let ``item``'s node be what it was converted to; nodes that the converter put before it are inserted."""
    wanted = [name for name in item.outputs() if name]
    made = converted.get(wanted[0])
    if made is None or [name for name in made.output if name] != wanted:
        raise _refusal(item.node, after, "several nodes would have to make its results")
    known = {name: value for name, value in zip(item.inputs(), item.node.inputs, strict=True) if value}
    inputs = [_value(editor, item, name, known, converted) for name in made.input]
    item.node.op_type = made.op_type
    item.node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        item.node.replace_input_with(index, value)
    _replace_attributes(item.node, made)


def _value(
    editor: GraphEditor,
    item: _IsolatedNode,
    name: str,
    known: dict[str, ir.Value],
    converted: dict[str, onnx.NodeProto],
) -> ir.Value | None:
    """Return the graph's value for a name of the converter's; the node that makes it is inserted."""
    if not name or name in known:
        return known.get(name)
    made = converted[name]
    inputs = [_value(editor, item, source, known, converted) for source in made.input]
    attributes = {proto.name: ir.from_proto(proto) for proto in made.attribute}
    where = f"{item.node.name or item.node.outputs[0].name}/{made.op_type}"
    known[name] = editor.insert_before(item.node, made.op_type, inputs, where, attributes)
    return known[name]


def _replace_attributes(node: ir.Node, made: onnx.NodeProto) -> None:
    kept = {name: attribute for name, attribute in node.attributes.items() if attribute.type is ir.AttributeType.GRAPH}
    node.attributes.clear()
    for proto in made.attribute:
        node.attributes[proto.name] = kept.get(proto.name) or ir.from_proto(proto)
