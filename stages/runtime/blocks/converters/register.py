"""Register the converters of this folder with onnx2torch, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from onnx import defs
from torch import nn

from stages.records.experts import ExpertActivation, Routing
from stages.runtime.blocks.converters.attention import (
    GROUP_QUERY_ABSENT,
    MULTI_HEAD_ABSENT,
    GroupQueryAttention,
    GroupQueryRule,
    MultiAxisRotaryEmbedding,
    MultiHeadAttention,
    RotaryEmbedding,
)
from stages.runtime.blocks.converters.experts import Experts
from stages.runtime.blocks.converters.layers import (
    GatedAdd,
    Gelu,
    LayerNorm,
    Linear,
    QuickGelu,
    ReduceMean,
    RootMeanSquareNorm,
    ScatterElements,
    Split,
    UnitVectors,
)
from stages.runtime.blocks.converters.onnx2torch import import_onnx2torch
from stages.runtime.blocks.converters.recurrent import (
    CAUSAL_CONV_ABSENT,
    LINEAR_ATTENTION_ABSENT,
    CausalConv,
    GatedNorm,
    LinearAttention,
    LinearAttentionGate,
    LinearAttentionRule,
)
from stages.runtime.blocks.cut import EXPERTS, LINEAR, OWN_DOMAIN

Attributes = Mapping[str, Any]
"""A node's attributes as onnx2torch parses them: numbers, lists, strings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeForm:
    """What decides which module a node becomes."""

    operator: str
    attributes: Attributes
    inputs: tuple[str, ...]
    """Names; empty where an input is left out."""
    outputs: int

    def require(self, **values: object) -> None:
        """Raise NotImplementedError, as onnx2torch does, where an attribute has another value."""
        for name, value in values.items():
            if self.attributes.get(name, value) != value:
                raise NotImplementedError(f"{self.operator} with {name} = {self.attributes[name]}")

    def require_absent(self, indices: tuple[int, ...]) -> None:
        """Raise NotImplementedError where the node has an input that its module would ignore."""
        for index in indices:
            if index < len(self.inputs) and self.inputs[index]:
                raise NotImplementedError(f"{self.operator} with input {index}, '{self.inputs[index]}'")


Builder = Callable[[NodeForm], nn.Module]

_ONLY_TYPES_CHANGED = (
    ("Cast", 13),
    ("Constant", 13),
    ("ConstantOfShape", 9),
    ("Cos", 7),
    ("Equal", 13),
    ("Flatten", 13),
    ("Identity", 16),
    ("Reshape", 14),
    ("Shape", 15),
    ("Sin", 7),
    ("Softplus", 1),
    ("Squeeze", 21),
    ("Transpose", 13),
    ("Unsqueeze", 13),
)
"""Operators and the newest version that onnx2torch knows; later ones only admit more types."""


def _group_query_attention(node: NodeForm) -> nn.Module:
    node.require(qk_output=0, k_quant_type="NONE", v_quant_type="NONE")
    node.require_absent(GROUP_QUERY_ABSENT)
    names = {field.name for field in fields(GroupQueryRule)}
    return GroupQueryAttention(GroupQueryRule(**{name: node.attributes[name] for name in names & set(node.attributes)}))


def _multi_head_attention(node: NodeForm) -> nn.Module:
    node.require_absent(MULTI_HEAD_ABSENT)
    if not all(node.inputs[:3]) or len(node.inputs) < 3:
        raise NotImplementedError("MultiHeadAttention with packed query, key and value")
    return MultiHeadAttention(
        num_heads=node.attributes["num_heads"],
        scale=node.attributes.get("scale", 0.0),
        unidirectional=node.attributes.get("unidirectional", 0) == 1,
    )


def _rotary_embedding(node: NodeForm) -> nn.Module:
    node.require(is_packed_batching=0, scale=1.0)
    partial = node.attributes.get("rotary_embedding_dim", 0) > 0
    return RotaryEmbedding(
        num_heads=node.attributes["num_heads"] if partial else 0,
        interleaved=node.attributes.get("interleaved", 0) == 1,
    )


def _multi_axis_rotary_embedding(node: NodeForm) -> nn.Module:
    node.require(is_packed_batching=0, scale=1.0)
    layout = node.attributes.get("mrope_layout", 0)
    if layout not in (0, 1):
        raise NotImplementedError(f"{node.operator} with mrope_layout = {layout}")
    return MultiAxisRotaryEmbedding(
        num_heads=node.attributes.get("num_heads", 0),
        interleaved=node.attributes.get("interleaved", 0) == 1,
        sections=tuple(node.attributes["mrope_section"]),
        alternating=layout == 1,
    )


def _causal_conv(node: NodeForm) -> nn.Module:
    node.require(ndim=1, state_window=0)
    node.require_absent(CAUSAL_CONV_ABSENT)
    return CausalConv(
        activation=node.attributes.get("activation", "none"),
        channels_last=node.attributes.get("channels_last", 0) == 1,
        dilation=node.attributes.get("dilation", 1),
    )


def _linear_attention(node: NodeForm) -> nn.Module:
    node.require(state_window=0)
    node.require_absent(LINEAR_ATTENTION_ABSENT)
    names = {field.name for field in fields(LinearAttentionRule)}
    rule = LinearAttentionRule(**{name: node.attributes[name] for name in names & set(node.attributes)})
    return LinearAttention(rule)


def _experts(node: NodeForm) -> nn.Module:
    attributes = dict(node.attributes)
    routing = Routing(top_k=attributes.pop("top_k"), over_chosen=attributes.pop("over_chosen") == 1)
    biased = attributes.pop("fc1_biased") == 1, attributes.pop("fc2_biased") == 1
    return Experts(ExpertActivation(**attributes), routing, biased)


def _norm(module: Callable[[float], nn.Module]) -> Builder:
    def build(node: NodeForm) -> nn.Module:
        node.require(axis=-1)
        return module(node.attributes.get("epsilon", 1e-5))

    return build


def _reduce_mean(node: NodeForm) -> nn.Module:
    node.require(noop_with_empty_axes=0)
    return ReduceMean(keepdims=node.attributes.get("keepdims", 1) == 1, axes=tuple(node.attributes.get("axes", ())))


def _scatter_elements(node: NodeForm) -> nn.Module:
    node.require(reduction="none")
    return ScatterElements(node.attributes.get("axis", 0))


_BUILDERS: Mapping[str, Builder] = {
    "BiasGelu": lambda _: Gelu("none"),
    "CausalConvWithState": _causal_conv,
    EXPERTS: _experts,
    "FastGelu": lambda _: Gelu("tanh"),
    "GatedAdd": lambda _: GatedAdd(),
    "GatedRMSNorm": lambda node: GatedNorm(
        epsilon=node.attributes.get("epsilon", 1e-5), activation=node.attributes.get("activation", "silu")
    ),
    "Gelu": lambda node: Gelu(node.attributes.get("approximate", "none")),
    "GroupQueryAttention": _group_query_attention,
    "LayerNormalization": _norm(LayerNorm),
    LINEAR: lambda node: Linear(node.attributes.get("beta", 1.0)),
    "LinearAttention": _linear_attention,
    "LinearAttentionGate": lambda _: LinearAttentionGate(),
    "LpNormalization": lambda node: UnitVectors(axis=node.attributes.get("axis", -1), p=node.attributes.get("p", 2)),
    "MRotaryEmbedding": _multi_axis_rotary_embedding,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": lambda node: QuickGelu(node.attributes.get("alpha", 1.702)),
    "ReduceMean": _reduce_mean,
    "RMSNormalization": _norm(RootMeanSquareNorm),
    "RotaryEmbedding": _rotary_embedding,
    "ScatterElements": _scatter_elements,
    "SimplifiedLayerNormalization": _norm(RootMeanSquareNorm),
    "Split": lambda node: Split(axis=node.attributes.get("axis", 0), outputs=node.outputs),
}


@cache
def register_converters() -> None:
    """Register every operator of this folder with onnx2torch.

    Raises:
        UserError: onnx2torch isn't installed.
    """
    import_onnx2torch()
    from onnx2torch.node_converters.registry import add_converter, get_converter

    for operator, builder in _BUILDERS.items():
        add_converter(operator, 1, OWN_DOMAIN)(_as_converter(builder))
    for operator, known in _ONLY_TYPES_CHANGED:
        for version in _versions_after(operator, known):
            add_converter(operator, version)(get_converter(operator, known))


def _as_converter(builder: Builder) -> Callable[[Any, Any], Any]:
    from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node

    def convert(node: Any, _graph: Any) -> Any:  # noqa: ANN401 - onnx2torch's own classes
        form = NodeForm(
            operator=node.operation_type,
            attributes=node.attributes,
            inputs=node.input_values,
            outputs=len(node.output_values),
        )
        return OperationConverterResult(torch_module=builder(form), onnx_mapping=onnx_mapping_from_node(node))

    return convert


def _versions_after(operator: str, known: int) -> list[int]:
    schemas = defs.get_all_schemas_with_history()
    return sorted(
        schema.since_version
        for schema in schemas
        if (schema.domain, schema.name) == ("", operator) and schema.since_version > known
    )
