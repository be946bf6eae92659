"""Mixtures of experts: which linear layer decides where a token goes.

A router's output reaches the routing input of a MoE or QMoE node, or the TopK that chooses experts where a mixture is
written out in small nodes, through nothing but reshapes and elementwise nodes.
"""

from __future__ import annotations

import onnx_ir as ir

EXPERT_NODES = frozenset({"MoE", "QMoE"})
_ROUTING_INPUT = 1
_BETWEEN = frozenset(
    {
        *("Reshape", "Cast", "Identity", "Flatten", "Squeeze", "Unsqueeze"),
        *("Add", "Sub", "Mul", "Div", "Neg", "Exp", "Log", "Reciprocal", "Clip", "Where"),
        *("Sigmoid", "Softmax", "Tanh", "Relu", "Softplus"),
    }
)


def routes_experts(value: ir.Value) -> bool:
    """Whether ``value`` decides which experts a token goes to."""
    waiting, known = [value], {id(value)}
    while waiting:
        for use in waiting.pop().uses():
            if use.node.op_type == "TopK" or (use.node.op_type in EXPERT_NODES and use.idx == _ROUTING_INPUT):
                return True
            if use.node.op_type in _BETWEEN:
                found = [output for output in use.node.outputs if id(output) not in known]
                waiting += found
                known |= {id(output) for output in found}
    return False
