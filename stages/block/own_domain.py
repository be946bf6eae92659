"""Names that the cut graph and its converters agree on."""

from __future__ import annotations

import onnx_ir as ir

OWN_DOMAIN = "genai_quant"
"""Domain, in the cut graph alone, of the operators that stages.block.converters defines."""
LINEAR = "Linear"
"""y = x W^T + beta * bias, with W [N, K] an input of the cut graph."""

_STANDARD = frozenset(
    {"Gelu", "LayerNormalization", "ReduceMean", "RMSNormalization", "SimplifiedLayerNormalization", "Split"}
)
"""Standard operators that onnx2torch lacks, or knows in older versions only."""


def domain_in_cut(node: ir.Node) -> str:
    """The domain that ``node`` has in the cut graph: onnx2torch can't name a module after one with a dot in it."""
    standard = node.domain in ("", "ai.onnx")
    return node.domain if standard and node.op_type not in _STANDARD else OWN_DOMAIN
