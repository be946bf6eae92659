"""Make small edits on an onnx-ir graph, each in constant time: every lookup is in a dictionary built once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from stages.errors import GraphError
from stages.model.form.insert import replace_inputs
from stages.model.patterns import name_of

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def describe(node: ir.Node) -> str:
    """Name a node for a message: its type and its name, or its output's where it has none."""
    return f"{node.op_type} '{node.name or node.outputs[0].name}'"


def replace_op(
    node: ir.Node, domain: str, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int]
) -> None:
    """Turn ``node`` into another operator; its name and outputs stay.

    Args:
        node: changed in place.
        domain: of the new operator; empty for ONNX's own.
        op_type: the new operator.
        inputs: all that it reads.
        attributes: all that it has.
    """
    node.domain, node.op_type = domain, op_type
    replace_inputs(node, inputs)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, number)


def import_microsoft(node: ir.Node) -> None:
    """Let ``node``'s graph hold ONNX Runtime's own operators."""
    assert isinstance(node.graph, ir.Graph)
    node.graph.opset_imports.setdefault(MICROSOFT, 1)


@dataclass(frozen=True, slots=True)
class GraphEditor:
    """Finds nodes by their output and adds nodes and initializers under names that nothing has yet."""

    by_output: dict[str, ir.Node]
    _taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: ir.Model) -> GraphEditor:
        """Index all nodes of ``model``, subgraphs included."""
        nodes = list(model.graph.all_nodes())
        by_output = {output.name: node for node in nodes for output in node.outputs if output.name}
        taken = set(by_output)
        for graph in model.graphs():
            taken.update(graph.initializers)
            taken.update(name_of(value) for value in graph.inputs)
        return cls(by_output, taken)

    def producer(self, output: str) -> ir.Node:
        """Return the node that makes the value ``output``.

        Raises:
            GraphError: no node does.
        """
        node = self.by_output.get(output)
        if node is None:
            raise GraphError(
                f"The base model has no node that makes '{output}', which the quantized weights name; pass the base "
                "model that they were made from."
            )
        return node

    def add_initializer(self, node: ir.Node, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register ``tensor`` in the graph that holds ``node``.

        Args:
            node: a reader of the new initializer.
            name: its name, or the beginning of it where that is taken.
            tensor: its content.
        """
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=self._free(name), shape=shape, type=dtype, const_value=tensor)
        tensor.name = value.name
        assert isinstance(node.graph, ir.Graph)
        node.graph.register_initializer(value)
        return value

    def insert_before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Iterable[ir.Value | None],
        name: str,
        attributes: Mapping[str, int | Sequence[int] | ir.Attr],
        *,
        shape: ir.Shape | None = None,
        kind: ir.TypeProtocol | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a one-output node before ``node`` and return its output.

        Args:
            node: stays where it is and reads what it did.
            op_type: the new node's operator.
            inputs: what the new node reads.
            name: the new node's name, or the beginning of it where that is taken.
            attributes: the new node's attributes.
            shape: of the output, where it is known.
            kind: the output's type, where it is known.
            domain: of the operator; empty for ONNX's own.
        """
        name = self._free(name)
        made = ir.Value(name=self._free(f"{name}/output_0"), shape=shape, type=kind)
        new = ir.node(op_type, list(inputs), attributes=dict(attributes), domain=domain, outputs=[made], name=name)
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, new)
        return made

    def read_as(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the constant ``value`` in ``dtype``: behind a Cast before ``node``, where it has another type.

        ONNX Runtime computes the Cast of a constant when it loads, before it looks for nodes to fuse.
        """
        if value.dtype == dtype:
            return value
        attributes, kind = {"to": int(dtype)}, ir.TensorType(dtype)
        return self.insert_before(node, "Cast", [value], f"{value.name}/Cast", attributes, shape=value.shape, kind=kind)

    def _free(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name
