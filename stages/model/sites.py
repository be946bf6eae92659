"""Find what can be quantized: MatMul and Gemm nodes with a constant weight, and embedding tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from stages.errors import GraphError
from stages.model.absorbers import find_absorber
from stages.model.genai_config import LOGITS
from stages.model.patterns import gates_state, readers, routes_experts
from stages.records.formats import EmbeddingTable, float_of_onnx
from stages.records.sites import ActivationGroup, MatMulSite, WeightLayout

_SHAPE_KEEPING = frozenset({"Cast", "Mul", "Div", "Tanh", "Add", "Identity", "Reshape"})
_TOKENS = "input_ids"


def find_sites(model: ir.Model) -> tuple[MatMulSite, ...]:
    """Return all sites of the main graph, in graph order.

    A site is a MatMul, or a Gemm without transA and with alpha = 1, whose second input is a rank-2 floating-point
    initializer, directly or through a Transpose. Nodes of the same name get their output added to it.
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
        raise GraphError(
            "The model holds no MatMul or Gemm with a constant floating-point weight, so there is nothing to quantize; "
            "pass the decoder that is to be quantized."
        )
    by_activation: dict[str, list[MatMulSite]] = {}
    for site in sites:
        by_activation.setdefault(site.activation, []).append(site)
    by_output = {site.output: site for site in sites}
    values = {output.name: output for node in model.graph for output in node.outputs}
    return tuple(
        _as_group(activation, members, values.get(activation), by_output)
        for activation, members in by_activation.items()
    )


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
    layout_and_weight = weight_of(node)
    if layout_and_weight is None:
        return None
    layout, weight = layout_and_weight
    assert weight.shape is not None
    kind = float_of_onnx(weight.dtype)
    assert kind is not None
    rows, columns = weight.shape.numpy()
    activation, output = node.inputs[0], node.outputs[0]
    if activation is None:
        return None
    in_features, out_features = (rows, columns) if layout is WeightLayout.K_BY_N else (columns, rows)
    _require_width(node, activation, in_features)
    return MatMulSite(
        name=node.name or f"{weight.name}->{output.name}",  # the output tells two readers of one weight apart
        op_type="MatMul" if node.op_type == "MatMul" else "Gemm",
        weight=_name(weight),
        activation=_name(activation),
        output=_name(output),
        in_features=in_features,
        out_features=out_features,
        layout=layout,
        dtype=kind.name,
        weight_shared_with=tuple(
            dict.fromkeys(_name(other.outputs[0]) for other, _ in readers(weight) if other is not node)
        ),
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
            f"'{node.name or _name(node.outputs[0])}' has a weight of {in_features} inputs and reads {width} channels; "
            "build the model again."
        )


def _name(value: ir.Value) -> str:
    assert value.name, "onnx-ir names every value it loads"
    return value.name


def weight_of(node: ir.Node) -> tuple[WeightLayout, ir.Value] | None:
    """Return the constant weight of a MatMul or Gemm and how it is stored, or None where the node isn't a site."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    if gemm_faults(node):
        return None
    value = node.inputs[1]
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    layout = WeightLayout.N_BY_K if transposed else WeightLayout.K_BY_N
    if value is not None and not transposed and (source := _swapped_initializer(value)) is not None:
        layout, value = WeightLayout.N_BY_K_TRANSPOSED, source
    if value is None or not value.is_initializer() or float_of_onnx(value.dtype) is None:
        return None
    if value.shape is None or len(value.shape) != 2 or 0 in value.shape.numpy():
        return None
    return layout, value


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
    return source if source is not None and source.is_initializer() else None


def _becomes_logits(value: ir.Value) -> bool:
    """Return whether ``value`` becomes the graph's logits, directly or through casts and a soft cap."""
    while not value.is_graph_output():
        consumers = value.consumers()
        if len(consumers) != 1 or consumers[0].op_type not in _SHAPE_KEEPING:
            return False
        value = consumers[0].outputs[0]
    return value.name == LOGITS


def find_embeddings(model: ir.Model) -> tuple[EmbeddingTable, ...]:
    """Return the embedding tables of the main graph, in graph order.

    A table is a rank-2 floating-point initializer, read directly or through a Transpose by a Gather along the token
    axis whose indices are the graph input ``input_ids``, directly or through Casts. Rotary caches and other tables are
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
    if not table.is_initializer() or table.shape is None or len(table.shape) != 2 or float_of_onnx(table.dtype) is None:
        return None
    return str(table.name), source is not None


def _are_tokens(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast":
            return False
        value = node.inputs[0]
    return value is not None and value.is_graph_input() and value.name == _TOKENS


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
