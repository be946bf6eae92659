"""Find where an AWQ input scale can be folded: the layer before an activation that can be divided by it exactly.

x / s is folded into the gain of the norm that makes x; into the output channels of up_proj where x = act(gate) * up is
linear in up; into v_proj's channels where x is attention's output, which is linear in V (AWQ, Lin et al. 2023, section
3.2; the grouped-query case needs one scale for all query heads of a key/value head). Relu lets positive factors
through, so x = relu(up) takes s and x = relu(up)^2 takes sqrt(s) in up_proj too.

Only the graph's structure is judged here: when a run is planned, so that the search knows the shape of the scale that
will really be used, and again by the exporter, which folds only where it finds what was planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from stages.model.patterns import before_cast, is_constant, is_square, repeated_kv_heads, sole_reader
from stages.records.sites import (
    Absorber,
    ActivationGroup,
    HeadSharing,
    LinearAbsorber,
    MatMulSite,
    NormAbsorber,
    ValueAbsorber,
)

_GAIN_INPUT = {
    "SimplifiedLayerNormalization": 1,
    "RMSNormalization": 1,
    "LayerNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
    "SkipLayerNormalization": 2,
}
_BIAS_INPUT = {"LayerNormalization": 2, "SkipLayerNormalization": 3}


def find_absorber(value: ir.Value | None, in_features: int, sites: Mapping[str, MatMulSite]) -> Absorber | str:
    """Return the absorber for the activation ``value``, or the reason why there is none.

    Args:
        value: the activation; None where it is a graph input.
        in_features: K, the activation's last dimension.
        sites: all sites of the graph by their output value.
    """
    node = None if value is None else value.producer()
    if value is None or node is None:
        return "the activation is an input of the graph"
    if value.is_graph_output():
        return "the activation is an output of the graph"
    if (norm := _norm(before_cast(value), in_features)) is not None:
        return norm
    if node.op_type in ("Relu", "Pow") or is_square(node):
        return _power_of_linear(node, in_features, sites)
    if node.op_type == "Mul":
        return _elementwise_product(node, in_features, sites)
    if node.op_type in ("GroupQueryAttention", "MultiHeadAttention") and value is node.outputs[0]:
        return _attention_value(node, in_features, sites)
    return f"it comes from {node.op_type}, which can't take a scale exactly"


def _norm(value: ir.Value, in_features: int) -> Absorber | str | None:
    """Return the norm whose first output is ``value``, or the Mul by a gain that ends a norm written out."""
    node = value.producer()
    if node is None or value is not node.outputs[0]:
        return None
    if node.op_type == "Mul":
        gains = [factor for factor in node.inputs if factor is not None and _is_vector(factor, in_features)]
        return NormAbsorber(output=str(value.name), parameters=(str(gains[0].name),)) if len(gains) == 1 else None
    if node.op_type not in _GAIN_INPUT:
        return None
    return _norm_node(node, value)


def _is_vector(value: ir.Value, size: int) -> bool:
    return is_constant(value) and value.shape is not None and list(value.shape.numpy()) == [size]


def _norm_node(node: ir.Node, value: ir.Value) -> Absorber | str:
    gain = node.inputs[_GAIN_INPUT[node.op_type]]
    if gain is None or not is_constant(gain):
        return f"the gain of its {node.op_type} is not a constant"
    parameters = [gain]
    bias_index = _BIAS_INPUT.get(node.op_type)
    if bias_index is not None and len(node.inputs) > bias_index and (bias := node.inputs[bias_index]) is not None:
        if not is_constant(bias):
            return f"the bias of its {node.op_type} is not a constant"
        parameters.append(bias)
    return NormAbsorber(output=str(value.name), parameters=tuple(str(parameter.name) for parameter in parameters))


def _elementwise_product(node: ir.Node, in_features: int, sites: Mapping[str, MatMulSite]) -> Absorber | str:
    """Return the factor of act(gate) * up that comes straight from a linear site of the same width."""
    for factor in node.inputs:
        linear = None if factor is None else _linear_source(factor, node, sites)
        if linear is not None and linear[0].out_features == in_features:
            site, bias = linear
            return LinearAbsorber(site=site.name, bias=bias)
    return "no factor of its Mul comes from a linear layer alone"


def _power_of_linear(node: ir.Node, in_features: int, sites: Mapping[str, MatMulSite]) -> Absorber | str:
    """Return up of relu(up), relu(up)^2 or up^2 where it comes straight from a linear site of the same width."""
    if node.op_type == "Pow" and not is_square(node):
        return "it comes from Pow, whose exponent isn't the constant 2"
    reader = node if node.op_type == "Relu" else _relu_before(node)
    base = reader.inputs[0]
    linear = None if base is None else _linear_source(base, reader, sites)
    if linear is None or linear[0].out_features != in_features:
        return f"what its {reader.op_type} reads does not come from a linear layer alone"
    site, bias = linear
    return LinearAbsorber(site=site.name, bias=bias, power=1 if node.op_type == "Relu" else 2)


def _relu_before(square: ir.Node) -> ir.Node:
    """Return the Relu whose output only ``square`` reads, or ``square`` itself."""
    base = square.inputs[0]
    relu = None if base is None else base.producer()
    if base is None or relu is None or relu.op_type != "Relu" or sole_reader(base) is not square:
        return square
    return relu


def _linear_source(
    value: ir.Value, reader: ir.Node, sites: Mapping[str, MatMulSite]
) -> tuple[MatMulSite, str | None] | None:
    """Return the site that makes ``value``, and the bias added to it, where only ``reader`` sees them."""
    if sole_reader(value) is not reader:
        return None
    if (site := sites.get(str(value.name))) is not None:
        return site, _gemm_bias(value.producer())
    node = value.producer()
    if node is None or node.op_type != "Add":
        return None
    for linear, bias in (node.inputs, tuple(reversed(node.inputs))):
        site = None if linear is None else sites.get(str(linear.name))
        if linear is None or site is None or bias is None or not is_constant(bias):
            continue
        if sole_reader(linear) is not node or _gemm_bias(linear.producer()) is not None:
            return None
        return site, str(bias.name)
    return None


def _gemm_bias(node: ir.Node | None) -> str | None:
    if node is None or node.op_type != "Gemm" or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    return str(node.inputs[2].name)


def _attention_value(node: ir.Node, in_features: int, sites: Mapping[str, MatMulSite]) -> Absorber | str:
    heads = node.attributes["num_heads"].as_int()
    path = _grouped_value(node) if node.op_type == "GroupQueryAttention" else _multi_head_value(node, heads)
    linear = None if path.source is None else _linear_source(path.source, path.reader, sites)
    if linear is None:
        return "attention's V does not come from a linear layer alone"
    site, bias = linear
    head_size = in_features // heads
    first_channel = (heads + path.kv_heads) * head_size if path.packed else 0
    if first_channel + path.kv_heads * head_size != site.out_features or heads % path.kv_heads:
        return "the width of attention's V doesn't fit its head counts"
    return ValueAbsorber(
        site=site.name,
        first_channel=first_channel,
        heads=HeadSharing(kv_heads=path.kv_heads, group_size=heads // path.kv_heads, head_size=head_size),
        bias=bias,
    )


def attention_head_sizes(groups: Iterable[ActivationGroup]) -> dict[str, int]:
    """Return the channels of a head by activation that queries, keys and values are computed from."""
    groups = tuple(groups)
    values = {group.absorber.site: group.absorber for group in groups if isinstance(group.absorber, ValueAbsorber)}
    return {
        group.activation: values[site.name].heads.head_size
        for group in groups
        for site in group.sites
        if site.name in values
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _ValuePath:
    """The way from a linear layer to attention's V."""

    reader: ir.Node
    """The only node that may read ``source``."""
    source: ir.Value | None
    """The layer's output; None where it is unknown."""
    kv_heads: int
    packed: bool
    """Whether Q and K lie before V in ``source``."""


def _grouped_value(node: ir.Node) -> _ValuePath:
    reader, source = _value_reader(node)
    separate = reader is node and len(node.inputs) > 2 and node.inputs[2] is not None
    kv_heads = node.attributes["kv_num_heads"].as_int()
    return _ValuePath(reader=reader, source=source, kv_heads=kv_heads, packed=not separate)


def _multi_head_value(node: ir.Node, heads: int) -> _ValuePath:
    """Return the way to a V without a bias of attention's own; nodes before it may repeat its heads."""
    value, bias = (list(node.inputs) + [None] * 4)[2:4]
    if value is None or bias is not None:
        return _ValuePath(reader=node, source=None, kv_heads=heads, packed=False)
    repeated = repeated_kv_heads(value, heads)
    if repeated is None:
        reader, source = _value_reader(node)
        return _ValuePath(reader=reader, source=source, kv_heads=heads, packed=reader is not node)
    source = repeated.entry.inputs[0]
    return _ValuePath(reader=repeated.entry, source=source, kv_heads=repeated.kv_heads, packed=False)


def _value_reader(attention: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """Return the node that reads the layer which makes V, and what it reads.

    That is attention itself, or the Split whose last part is V (models that normalize q and k behind a packed qkv).
    """
    query, _, value = (list(attention.inputs) + [None] * 3)[:3]
    split = None if value is None else value.producer()
    if value is None:
        return attention, query
    if split is None or split.op_type != "Split" or sole_reader(value) is not attention:
        return attention, value
    # V has rank 3: batch, length, channels.
    if value is not split.outputs[-1] or split.attributes.get_int("axis", 0) not in (-1, 2):
        return attention, value
    return split, split.inputs[0]
