"""Tell onnx2torch of the operators in this room, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from onnx import defs
from torch import nn

from stages.quantization.blocks.converters import attention as group_query_attention
from stages.quantization.blocks.converters import attention as multi_head_attention
from stages.quantization.blocks.converters.attention import (
    GroupQueryAttention,
    GroupQueryRule,
    MultiHeadAttention,
    RotaryEmbedding,
)
from stages.quantization.blocks.converters.layers import (
    Gelu,
    LayerNorm,
    Linear,
    QuickGelu,
    ReduceMean,
    RootMeanSquareNorm,
    Split,
)
from stages.quantization.blocks.converters.onnx2torch import import_onnx2torch
from stages.quantization.blocks.cut import LINEAR, OWN_DOMAIN

Attributes = Mapping[str, Any]
"""A node's attributes as onnx2torch parses them: numbers, lists, strings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeForm:
    """What of a node decides which module it becomes."""

    operator: str
    attributes: Attributes
    inputs: tuple[str, ...]
    """Names; empty where an input is left out."""
    outputs: int

    def require(self, **values: object) -> None:
        """Refuse attributes of other values, with onnx2torch's own kind of error."""
        for name, value in values.items():
            if self.attributes.get(name, value) != value:
                raise NotImplementedError(f"{self.operator} with {name} = {self.attributes[name]}")

    def require_absent(self, left_out: tuple[int, ...]) -> None:
        """Refuse inputs that the module would not look at."""
        for index in left_out:
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
"""Operators whose versions after this one, the newest that onnx2torch knows, admit more types and mean the same."""


def _group_query_attention(node: NodeForm) -> nn.Module:
    node.require(qk_output=0, k_quant_type="NONE", v_quant_type="NONE")
    node.require_absent(group_query_attention.LEFT_OUT)
    attributes = node.attributes
    return GroupQueryAttention(
        GroupQueryRule(
            num_heads=attributes["num_heads"],
            kv_num_heads=attributes["kv_num_heads"],
            scale=attributes.get("scale", 0.0),
            softcap=attributes.get("softcap", 0.0),
            local_window_size=attributes.get("local_window_size", -1),
            do_rotary=attributes.get("do_rotary", 0) == 1,
            rotary_interleaved=attributes.get("rotary_interleaved", 0) == 1,
            smooth_softmax=attributes.get("smooth_softmax", 0) == 1,
            causal=attributes.get("causal", 1) == 1,
            qk_norm_epsilon=attributes.get("qk_norm_epsilon", 1e-6),
        )
    )


def _multi_head_attention(node: NodeForm) -> nn.Module:
    node.require_absent(multi_head_attention.LEFT_OUT)
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


def _rms_norm(node: NodeForm) -> nn.Module:
    node.require(axis=-1)
    return RootMeanSquareNorm(node.attributes.get("epsilon", 1e-5))


def _layer_norm(node: NodeForm) -> nn.Module:
    node.require(axis=-1)
    return LayerNorm(node.attributes.get("epsilon", 1e-5))


def _reduce_mean(node: NodeForm) -> nn.Module:
    node.require(noop_with_empty_axes=0)
    return ReduceMean(keepdims=node.attributes.get("keepdims", 1) == 1, axes=tuple(node.attributes.get("axes", ())))


_BUILDERS: Mapping[str, Builder] = {
    "BiasGelu": lambda _: Gelu("none"),
    "FastGelu": lambda _: Gelu("tanh"),
    "Gelu": lambda node: Gelu(node.attributes.get("approximate", "none")),
    "GroupQueryAttention": _group_query_attention,
    "LayerNormalization": _layer_norm,
    LINEAR: lambda node: Linear(node.attributes.get("beta", 1.0)),
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": lambda node: QuickGelu(node.attributes.get("alpha", 1.702)),
    "ReduceMean": _reduce_mean,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary_embedding,
    "SimplifiedLayerNormalization": _rms_norm,
    "Split": lambda node: Split(axis=node.attributes.get("axis", 0), outputs=node.outputs),
}


@cache
def register_converters() -> None:
    """Register every operator of this room with onnx2torch.

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
