"""Insert nodes before another one, and let that read others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir


def insert_before(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | float | list[int] | ir.TensorProtocol] | None = None,
    *,
    name: str = "",
    outputs: int = 1,
    domain: str = "",
) -> Sequence[ir.Value]:
    """Insert a node before ``node`` and return its outputs.

    Args:
        node: gives the new names their beginning.
        op_type: the new node's operator.
        inputs: what it reads.
        attributes: all that it has.
        name: the end of its name and of its outputs'; the operator where there is none.
        outputs: how many it has.
        domain: the operator's.
    """
    label = f"{node.outputs[0].name}/{name or op_type}"
    made = ir.node(op_type, inputs, attributes=dict(attributes or {}), num_outputs=outputs, name=label, domain=domain)
    for index, value in enumerate(made.outputs):
        value.name = f"{label}/output_{index}"
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return made.outputs


def replace_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Let ``node`` read ``inputs`` and nothing else."""
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def integers(node: ir.Node, name: str, values: list[int]) -> ir.Value:
    """Insert a constant of int64 [len(values)] before ``node`` and return it."""
    return insert_before(node, "Constant", [], {"value_ints": values}, name=name)[0]
