"""Find what can be quantized: MatMul and Gemm nodes with a constant weight, experts of MoE nodes, embedding tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import get_args

import onnx_ir as ir

from stages.errors import GraphError
from stages.model.absorbers import find_absorber
from stages.model.genai_config import LOGITS, TOKEN_INPUTS
from stages.model.patterns import (
    PASSED_THROUGH,
    STANDARD_DOMAINS,
    ConstantMatrix,
    constant_matrix,
    gates_state,
    input_of,
    is_constant,
    name_of,
    readers,
    routes_experts,
)
from stages.records.experts import ActivationKind, ExpertActivation, ExpertLayer, GateLayout, Routing
from stages.records.formats import EmbeddingTable, float_of_onnx
from stages.records.sites import ActivationGroup, ExpertPlace, FloatName, MatMulSite, Projection, WeightLayout

_SHAPE_KEEPING = frozenset({"Cast", "Mul", "Div", "Tanh", "Add", "Identity", "Reshape"})
_FUSED = frozenset({"FusedMatMul", "FusedGemm", "FusedMatMulActivation"})
_ADVICE = "pass"
_IN_SUBGRAPH = (
    "it lies in a subgraph, as in merged decoders; pass the one for later tokens (decoder_with_past_model.onnx), which "
    "optimum-cli export onnx writes with --no-post-process"
)

_EXPERT_TOKENS, _EXPERT_SCORES, _FC1, _FC1_BIAS, _FC2, _FC2_BIAS, _FC3 = range(7)
"""Inputs of a MoE node."""
_GATES: Mapping[int, GateLayout] = MappingProxyType({0: "none", 1: "interleaved", 2: "halves"})
_KNOWN_OF_EXPERTS = frozenset(
    {
        *("activation_type", "activation_alpha", "activation_beta", "swiglu_fusion", "swiglu_limit"),
        *("k", "normalize_routing_weights", "use_sparse_mixer"),
    }
)
_EXPERTS_SHARE = "experts share their input"


def find_sites(model: ir.Model) -> tuple[MatMulSite, ...]:
    """Return all sites of the main graph, in graph order.

    A site is a MatMul, or a Gemm without transA and with alpha = 1, whose second input is a constant rank-2
    floating-point matrix (see ``constant_matrix``). Nodes of the same name get their output added to it.
    """
    sites = [site for node in model.graph if (site := _as_site(node)) is not None]
    nodes = Counter(site.name for site in sites)
    return tuple(site if nodes[site.name] == 1 else replace(site, name=f"{site.name}->{site.output}") for site in sites)


def find_groups(model: ir.Model) -> tuple[ActivationGroup, ...]:
    """Return the sites grouped by the activation they read, with the place where an input scale could be folded.

    Raises:
        GraphError: the graph holds no site.
    """
    sites = find_sites(model)
    if not sites:
        raise GraphError(_why_nothing(model))
    by_activation: dict[str, list[MatMulSite]] = {}
    for site in sites:
        by_activation.setdefault(site.activation, []).append(site)
    by_output = {site.output: site for site in sites}
    values = {output.name: output for node in model.graph for output in node.outputs}
    return tuple(
        _as_group(activation, members, values.get(activation), by_output)
        for activation, members in by_activation.items()
    )


def _why_nothing(model: ir.Model) -> str:
    """Return why the graph holds no site, as a sentence with its fix: the commonest reasons of its products."""
    skipped = find_skipped_matmuls(model)
    counts = Counter(reason for _, reason in skipped).most_common(2)
    reasons = ", ".join(f"{count} x {why}" for why, count in counts) or "it has none"
    fix = "" if _ADVICE in reasons else f"; {_ADVICE} the decoder that is to be quantized"
    return f"There is nothing to quantize among the model's {len(skipped)} MatMul and Gemm nodes: {reasons}{fix}."


def widest_input(groups: Sequence[ActivationGroup]) -> int:
    """Return the number of input channels of the widest MatMul; 0 where there is none."""
    return max((group.in_features for group in groups), default=0)


def _as_group(
    activation: str, members: list[MatMulSite], value: ir.Value | None, by_output: dict[str, MatMulSite]
) -> ActivationGroup:
    found = _other_reader(value, members) or find_absorber(value, members[0].in_features, by_output)
    absorber, reason = (None, found) if isinstance(found, str) else (found, "")
    return ActivationGroup(
        activation=activation,
        in_features=members[0].in_features,
        sites=tuple(members),
        absorber=absorber,
        unfoldable_because=reason,
    )


def _other_reader(value: ir.Value | None, members: list[MatMulSite]) -> str:
    """Return which node besides the sites reads the activation, in words; empty where none does."""
    outputs = {site.output for site in members}
    consumers = () if value is None else value.consumers()
    others = [node.op_type for node in consumers if node.outputs[0].name not in outputs]
    return f"a {others[0]} node reads the activation too" if others else ""


def _as_site(node: ir.Node) -> MatMulSite | None:
    matrix = weight_of(node)
    activation = None if matrix is None else node.inputs[0]
    if matrix is None or activation is None:
        return None
    output = node.outputs[0]
    layout, weight = _layout(node, matrix), matrix.value
    kind, stored = float_of_onnx(matrix.dtype), float_of_onnx(weight.dtype)
    assert kind is not None
    assert stored is not None
    turned = layout is not WeightLayout.K_BY_N
    in_features, out_features = (matrix.columns, matrix.rows) if turned else (matrix.rows, matrix.columns)
    _require_width(node, activation, in_features)
    return MatMulSite(
        name=node.name or f"{weight.name}->{output.name}",  # the output tells two readers of one weight apart
        op_type="MatMul" if node.op_type == "MatMul" else "Gemm",
        weight=name_of(weight),
        activation=name_of(activation),
        output=name_of(output),
        in_features=in_features,
        out_features=out_features,
        layout=layout,
        dtype=kind.name,
        stored_dtype=None if stored is kind else stored.name,
        weight_shared_with=_other_readers(weight, node),
        feeds_logits=_becomes_logits(output),
        # Experts are fewer than hidden channels; a vocabulary that TopK samples from is no router.
        routes_experts=out_features < in_features and routes_experts(output),
        gates_state=out_features < in_features and gates_state(output),
    )


def _require_width(node: ir.Node, activation: ir.Value, in_features: int) -> None:
    """Raise GraphError where the activation's declared width isn't the weight's number of inputs."""
    width = activation.shape[-1] if activation.shape is not None and len(activation.shape) else None
    if isinstance(width, int) and width != in_features:
        raise GraphError(
            f"'{node.name or name_of(node.outputs[0])}' has a weight of {in_features} inputs and reads {width} "
            "channels; build the model again."
        )


def _other_readers(weight: ir.Value, node: ir.Node) -> tuple[str, ...]:
    """Return the outputs of the nodes besides ``node`` that read ``weight``, and its own name if it is an output."""
    others = [name_of(other.outputs[0]) for other, _ in readers(weight, PASSED_THROUGH) if other is not node]
    return tuple(dict.fromkeys([*others, *([name_of(weight)] if weight.is_graph_output() else [])]))


def _layout(node: ir.Node, matrix: ConstantMatrix) -> WeightLayout:
    if matrix.transposed:
        return WeightLayout.N_BY_K_TRANSPOSED
    return WeightLayout.N_BY_K if _transposes(node) else WeightLayout.K_BY_N


def _transposes(node: ir.Node) -> bool:
    """Return whether a Gemm transposes its weight."""
    return node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1


def weight_of(node: ir.Node) -> ConstantMatrix | None:
    """Return the constant weight of a MatMul or Gemm, or None where the node isn't a site."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    if gemm_faults(node) or node.inputs[1] is None:
        return None
    matrix = constant_matrix(node.inputs[1])
    if matrix is None or (matrix.transposed and _transposes(node)):
        return None
    types = matrix.dtype, matrix.value.dtype
    return matrix if matrix.rows and matrix.columns and all(map(float_of_onnx, types)) else None


def gemm_faults(node: ir.Node) -> str:
    """Return what a Gemm does besides multiplying and adding a bias, in words; empty for any other node."""
    if node.op_type != "Gemm":
        return ""
    transposes, scales = node.attributes.get_int("transA", 0) != 0, node.attributes.get_float("alpha", 1.0) != 1
    words = ("its Gemm transposes the activation (transA)", transposes), ("its Gemm scales the product (alpha)", scales)
    return "; ".join(fault for fault, there in words if there)


def _swapped_initializer(value: ir.Value) -> ir.Value | None:
    """Return the initializer behind a Transpose that swaps its two axes; None where there is none."""
    node = value.producer()
    if node is None or node.op_type != "Transpose":
        return None
    permutation = node.attributes.get("perm")
    if permutation is not None and list(permutation.as_ints()) != [1, 0]:
        return None
    source = node.inputs[0]
    return source if source is not None and is_constant(source) else None


def _becomes_logits(value: ir.Value) -> bool:
    """Return whether ``value`` becomes the graph's logits, directly or through casts and a soft cap."""
    while not value.is_graph_output():
        consumers = value.consumers()
        if len(consumers) != 1 or consumers[0].op_type not in _SHAPE_KEEPING:
            return False
        value = consumers[0].outputs[0]
    return value.name == LOGITS


def find_skipped_matmuls(model: ir.Model) -> tuple[tuple[str, str], ...]:
    """Return (node, why) for every MatMul and Gemm that can't be quantized, subgraphs included, in graph order."""
    main = set(model.graph)
    return tuple(
        (str(node.name or node.outputs[0].name), _skip_reason(node, in_main_graph=node in main))
        for node in model.graph.all_nodes()
        if _is_product(node) and (node not in main or weight_of(node) is None)
    )


def _is_product(node: ir.Node) -> bool:
    """Return whether ``node`` multiplies matrices: a MatMul or Gemm, or what ONNX Runtime's optimizer makes of one."""
    return node.op_type in _FUSED or (node.domain in STANDARD_DOMAINS and node.op_type in ("MatMul", "Gemm"))


def _skip_reason(node: ir.Node, *, in_main_graph: bool) -> str:
    left, right = node.inputs[:2]
    if right is not None and right.is_initializer() and right.is_graph_input():
        return "its weight is an input of the graph with a default (as of LoRA), which callers replace"
    if right is None or not _is_constant(right):
        return (
            "its weight is the first input"
            if left is not None and _is_constant(left)
            else "it multiplies two activations"
        )
    if node.op_type in _FUSED:
        return f"ONNX Runtime's optimizer made a {node.op_type} of it; pass the model from before"
    if not in_main_graph:
        return _IN_SUBGRAPH
    return gemm_faults(node) or _fault_of_weight(right)


def _fault_of_weight(weight: ir.Value) -> str:
    maker = weight.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        return "its weight is quantized already"
    if maker is not None:
        return f"{maker.op_type} nodes compute its weight; fold constants first"
    if float_of_onnx(weight.dtype) is None:
        return f"its weight is {'of unknown type' if weight.dtype is None else weight.dtype.name}"
    if weight.shape is not None and 0 in weight.shape:
        return "its weight is empty"
    return "its weight's rank is unknown" if weight.shape is None else f"its weight has rank {len(weight.shape)}"


def _is_constant(value: ir.Value) -> bool:
    """Return whether ``value`` is the same in every run: an initializer, or made from nothing but such values."""
    pending, seen = [value], {id(value)}
    while pending:
        current = pending.pop()
        if is_constant(current):
            continue
        maker = current.producer()
        if maker is None or any(attribute.type is ir.AttributeType.GRAPH for attribute in maker.attributes.values()):
            return False
        for source in maker.inputs:
            if source is not None and id(source) not in seen:
                seen.add(id(source))
                pending.append(source)
    return True


def find_embeddings(model: ir.Model) -> tuple[EmbeddingTable, ...]:
    """Return the embedding tables of the main graph, in graph order.

    A table is a rank-2 floating-point initializer, read directly or through a Transpose by a Gather along the token
    axis whose indices are one of ``TOKEN_INPUTS``, directly or through Casts. Rotary caches and other tables are
    looked up with something else.
    """
    found: dict[tuple[str, bool], list[ir.Node]] = {}
    for node in model.graph:
        if (source := _table_of(node)) is not None:
            found.setdefault(source, []).append(node)
    return tuple(_as_table(model, weight, transposed, nodes) for (weight, transposed), nodes in found.items())


def _table_of(node: ir.Node) -> tuple[str, bool] | None:
    """Return the table's initializer and whether a Transpose stands before the Gather; None for any other node."""
    if node.domain not in ("", "ai.onnx") or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    data, indices = node.inputs[:2]
    if data is None or not _are_tokens(indices):
        return None
    source = _swapped_initializer(data)
    table = data if source is None else source
    if not is_constant(table) or table.shape is None or len(table.shape) != 2 or float_of_onnx(table.dtype) is None:
        return None
    return str(table.name), source is not None


def _are_tokens(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast":
            return False
        value = node.inputs[0]
    return value is not None and value.is_graph_input() and value.name in TOKEN_INPUTS


def _as_table(model: ir.Model, weight: str, transposed: bool, nodes: list[ir.Node]) -> EmbeddingTable:
    value = model.graph.initializers[weight]
    kind = float_of_onnx(value.dtype)
    assert value.shape is not None
    assert kind is not None
    rows, columns = value.shape.numpy()
    return EmbeddingTable(
        weight=weight,
        gathers=tuple(str(node.outputs[0].name) for node in nodes),
        vocabulary=columns if transposed else rows,
        hidden=rows if transposed else columns,
        transposed=transposed,
        dtype=kind.name,
    )


# --------------------------------------------------------------------------- experts of com.microsoft MoE nodes


def find_expert_layers(model: ir.Model) -> tuple[ExpertLayer, ...]:
    """Return the MoE nodes of the main graph whose experts can be sites, in graph order."""
    return tuple(layer for node in model.graph if (layer := expert_layer(node)) is not None)


def expert_layer(node: ir.Node) -> ExpertLayer | None:
    """Return a MoE node as a record; None for any other node, and where its experts can't be sites."""
    return _as_expert_layer(node) if node.op_type == "MoE" and not why_no_sites(node) else None


def why_no_sites(node: ir.Node) -> str:
    """Return why the experts of a MoE node can't be sites, in words; empty where they can."""
    fc1, fc2 = _experts_table(node, _FC1), _experts_table(node, _FC2)
    if fc1 is None or fc2 is None:
        return "its experts are no constant floating-point matrices of its own"
    if input_of(node, _FC3) is not None:
        return "it has a third projection (fc3), which QMoE doesn't run"
    if unknown := sorted(set(node.attributes) - _KNOWN_OF_EXPERTS):
        return f"it has the attribute {unknown[0]}, which is unknown here"
    if node.attributes.get_string("activation_type", "relu") not in get_args(ActivationKind):
        return "its activation is unknown here"
    rows = fc1.shape[1] // (1 if _gate_layout(node) == "none" else 2)
    fits = fc1.shape[::2] == fc2.shape[:2] and rows == fc2.shape[2] and fc1.dtype == fc2.dtype
    return "" if fits else "the shapes of its experts don't fit each other"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpertsTable:
    """A constant [experts, N, K]."""

    name: str
    shape: tuple[int, ...]
    dtype: FloatName


def _experts_table(node: ir.Node, index: int) -> _ExpertsTable | None:
    value = input_of(node, index)
    if value is None or value.shape is None or len(value.shape) != 3 or not is_constant(value):
        return None
    kind = float_of_onnx(value.dtype)
    if kind is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return _ExpertsTable(name=str(value.name), shape=tuple(value.shape.numpy()), dtype=kind.name)


def _gate_layout(node: ir.Node) -> GateLayout:
    if node.attributes.get_string("activation_type", "relu") != "swiglu":
        return "none"
    return _GATES[node.attributes.get_int("swiglu_fusion", 0)]


def _as_expert_layer(node: ir.Node) -> ExpertLayer:
    fc1, fc2 = _experts_table(node, _FC1), _experts_table(node, _FC2)
    assert fc1 is not None
    assert fc2 is not None
    experts, _, hidden = fc1.shape
    inputs = [None if value is None else str(value.name) for value in (input_of(node, i) for i in range(_FC3))]
    tokens, scores = inputs[_EXPERT_TOKENS], inputs[_EXPERT_SCORES]
    assert tokens is not None
    assert scores is not None
    return ExpertLayer(
        name=node.name or str(node.outputs[0].name),
        output=str(node.outputs[0].name),
        tokens=tokens,
        scores=scores,
        experts=experts,
        hidden=hidden,
        inner=fc2.shape[2],
        dtype=fc1.dtype,
        fc1=fc1.name,
        fc1_bias=inputs[_FC1_BIAS],
        fc2=fc2.name,
        fc2_bias=inputs[_FC2_BIAS],
        activation=_expert_activation(node),
        routing=Routing(
            top_k=node.attributes.get_int("k", 1),
            over_chosen=node.attributes.get_int("normalize_routing_weights", 0) == 1,
        ),
        groups=tuple(
            _expert_group(node, table, projection, index)
            for index in range(experts)
            for projection, table in _projections(fc1, fc2)
        ),
    )


def _projections(fc1: _ExpertsTable, fc2: _ExpertsTable) -> tuple[tuple[Projection, _ExpertsTable], ...]:
    return ("fc1", fc1), ("fc2", fc2)


def _expert_activation(node: ir.Node) -> ExpertActivation:
    kind = node.attributes.get_string("activation_type", "relu")
    limit = node.attributes.get("swiglu_limit")
    return ExpertActivation(
        kind=next(each for each in get_args(ActivationKind) if each == kind),
        gate=_gate_layout(node),
        alpha=node.attributes.get_float("activation_alpha", 1.0),
        beta=node.attributes.get_float("activation_beta", 0.0),
        limit=None if limit is None else limit.as_float(),
    )


def _expert_group(node: ir.Node, table: _ExpertsTable, projection: Projection, index: int) -> ActivationGroup:
    output, top_k = str(node.outputs[0].name), node.attributes.get_int("k", 1)
    prefix = (node.name or output).removesuffix("/MoE")
    word = "down_proj" if projection == "fc2" else "up_proj" if _gate_layout(node) == "none" else "gate_up_proj"
    site = MatMulSite(
        name=f"{prefix}/experts.{index}/{word}",
        op_type="MoE",
        weight=table.name,
        activation=f"{output}#{index}.{projection}.in",
        output=f"{output}#{index}.{projection}",
        in_features=table.shape[2],
        out_features=table.shape[1],
        layout=WeightLayout.N_BY_K,
        dtype=table.dtype,
        expert=ExpertPlace(node=output, projection=projection, index=index, share=min(1.0, top_k / table.shape[0])),
    )
    return ActivationGroup(
        activation=site.activation,
        in_features=site.in_features,
        sites=(site,),
        absorber=None,
        unfoldable_because=_EXPERTS_SHARE,
    )
