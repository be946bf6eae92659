"""Find what quantization leaves as it is, with the reason: weights that no MatMul reads.

Expert weights inside a MoE node, kernels of a convolution whose windows overlap, tables of a Gather: a model in which
they are a large part gets only a little smaller, and a person must be told before the search starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from types import MappingProxyType

import onnx_ir as ir

from stages.errors import GraphError
from stages.model.directory import ModelDirectory
from stages.model.form.convolution import is_convolution, why_no_product
from stages.model.form.packed_attention import is_packed_attention, why_stays_packed
from stages.model.patterns import EXPERT_NODES, FLOATING, PASSED_THROUGH, readers
from stages.model.sites import find_embeddings, find_sites
from stages.records.sites import UnquantizedWeights

_NO_REASONS: Mapping[str, str] = MappingProxyType({})
_SMALLEST_SHARE = 0.01
_EXPERTS_RANK = 3
"""What has less holds the experts' biases."""
_WORTH_A_WARNING = 0.05
_LINEAR = frozenset({"MatMul", "Gemm"})
_QUANTIZED_PRODUCTS = frozenset(
    {"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
)
_QUANTIZED = _QUANTIZED_PRODUCTS | {"QMoE", "GatherBlockQuantized", "DequantizeLinear"}
_ROTATION_INPUTS = {"RotaryEmbedding": (2, 3), "GroupQueryAttention": (7, 8)}
"""Inputs that take tables of cosines and sines: computed from positions, never learned."""
_EMBEDDING = "token embedding; --embedding 4 stores it as INT4"
_EXPERTS = "a MoE node multiplies with floating-point experts"
_TABLES = (
    "experts in a table that a Gather chooses from: each token copies its experts whole; built for cpu, cuda or "
    "webgpu, the model has them in MoE nodes, which become QMoE"
)
_OTHERS = "only weights of MatMul and Gemm are quantized"


def find_unquantized(
    model: ir.Model, quantized_tables: Collection[str], experts_stay: Mapping[str, str] = _NO_REASONS
) -> tuple[UnquantizedWeights, ...]:
    """Return weights of rank 2 and more that something other than a MatMul or Gemm reads, by the kind of node.

    Each entry holds at least 1 % of the bytes of all weights; tables of rotary embeddings are no weights.

    Args:
        model: the model.
        quantized_tables: embeddings and experts that will be quantized.
        experts_stay: why experts won't, by initializer.
    """
    embeddings = {table.weight for table in find_embeddings(model)}
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    total = sum(_num_bytes(value) for value in values)
    found: dict[tuple[str, str], list[ir.Value]] = defaultdict(list)
    for value in values:
        node = None if value.name in quantized_tables else _reader(value)
        if node is not None:
            reason = experts_stay.get(str(value.name)) or _reason(node, value)
            found[node.op_type, _EMBEDDING if value.name in embeddings else reason].append(value)
    groups = (_as_group(op_type, reason, members, total) for (op_type, reason), members in found.items())
    return tuple(group for group in groups if group.share >= _SMALLEST_SHARE)


def _reason(node: ir.Node, value: ir.Value) -> str:
    if node.op_type == "MoE":
        return _EXPERTS
    if node.op_type == "Gather" and value.shape is not None and len(value.shape) == _EXPERTS_RANK:
        return _TABLES
    if is_convolution(node):
        return why_no_product(node) or _OTHERS
    if is_packed_attention(node):
        return why_stays_packed(node) or _OTHERS
    return "quantized already" if node.op_type in _QUANTIZED else _OTHERS


def _reader(value: ir.Value) -> ir.Node | None:
    """Return the node, other than MatMul, that reads this weight; None without one, or for vectors."""
    if value.shape is None or len(value.shape) < 2:
        return None
    found = [
        node
        for node, index in readers(value, PASSED_THROUGH)
        if not _takes_rotation(node, index) and not (node.op_type in EXPERT_NODES and len(value.shape) < _EXPERTS_RANK)
    ]
    others = [node for node in found if node.op_type not in _LINEAR]
    if value.dtype not in FLOATING:
        others = [node for node in others if node.op_type in _QUANTIZED]
    return others[0] if others else None


def _takes_rotation(node: ir.Node, index: int) -> bool:
    return index in _ROTATION_INPUTS.get(node.op_type, ())


def _num_bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _as_group(op_type: str, reason: str, members: list[ir.Value], total: int) -> UnquantizedWeights:
    num_bytes = sum(_num_bytes(value) for value in members)
    return UnquantizedWeights(
        op_type=op_type,
        weights=tuple(str(value.name) for value in members),
        num_bytes=num_bytes,
        share=num_bytes / max(total, 1),
        reason=reason,
    )


def unquantized_warning(
    unquantized: tuple[UnquantizedWeights, ...], *, quantized: int, routers: int, experts: int = 0
) -> str:
    """Return one line about what a person may have expected to shrink; empty where there is nothing to say.

    An embedding is no surprise; experts are always named, and anything else from 5 % of the weights.

    Args:
        unquantized: what ``find_unquantized`` found.
        quantized: how many MatMuls will be quantized.
        routers: how many routers of experts won't.
        experts: how many matrices of experts will be.
    """
    named = [f"kept as it is: {weights.description}" for weights in unquantized if _is_worth_a_warning(weights)]
    if not named and (experts or not routers):
        return ""
    counts = {"matrices of experts": experts, "routers of experts kept": routers}
    mixture = [f"{what}: {count}" for what, count in counts.items() if count]
    return "; ".join([f"MatMuls that are quantized: {quantized}", *mixture, *named])


def _is_worth_a_warning(weights: UnquantizedWeights) -> bool:
    return weights.op_type in EXPERT_NODES or (weights.reason != _EMBEDDING and weights.share >= _WORTH_A_WARNING)


def require_float_base(model: ir.Model, directory: ModelDirectory) -> None:
    """Raise GraphError where most of a model's MatMuls hold quantized weights: a quantizer made it."""
    quantized, left = _quantized_and_left(model)
    if quantized > left:
        raise GraphError(
            f"{directory.onnx_file} is quantized already ({quantized} of its {quantized + left} MatMuls hold "
            "integer weights), and a base model must be in floating point; pass the model that "
            "it was made from."
        )


def is_quantized(model: ir.Model) -> bool:
    """Return whether most of a model's MatMuls hold quantized weights."""
    quantized, left = _quantized_and_left(model)
    return quantized > left


def _quantized_and_left(model: ir.Model) -> tuple[int, int]:
    """Return how many MatMuls hold quantized weights, and how many could be quantized."""
    quantized = sum(node.op_type in _QUANTIZED_PRODUCTS or _reads_codes(node) for node in model.graph.all_nodes())
    return quantized, len(find_sites(model))


def _reads_codes(node: ir.Node) -> bool:
    """Return whether a MatMul or Gemm takes its weight from DequantizeLinear."""
    value = node.inputs[1] if node.op_type in _LINEAR and len(node.inputs) > 1 else None
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in PASSED_THROUGH and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    return maker is not None and maker.op_type == "DequantizeLinear"
