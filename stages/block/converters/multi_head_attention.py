"""com.microsoft MultiHeadAttention with an empty past."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.block.converters.attention import AttentionRule, join_heads, split_heads

LEFT_OUT = (4, 6, 7, 8)
"""Padding mask, past key and value, past length."""


class MultiHeadAttention(nn.Module):
    """Inputs in the node's order; those in ``LEFT_OUT`` must be absent: windows hold no padding.

    ``scale`` is 0 for 1 / sqrt(head size).
    """

    def __init__(self, *, num_heads: int, scale: float, unidirectional: bool) -> None:
        super().__init__()
        self._num_heads, self._scale, self._unidirectional = num_heads, scale, unidirectional

    def forward(
        self,
        query: Float[Tensor, "batch length width"],
        key: Float[Tensor, "batch length width"],
        value: Float[Tensor, "batch length value_width"],
        bias: Float[Tensor, " all_widths"] | None = None,
        _key_padding_mask: None = None,
        attention_bias: Float[Tensor, "_ _ length length"] | None = None,
    ) -> Float[Tensor, "batch length value_width"]:
        """softmax(...) v, heads joined."""
        parts: tuple[Tensor, ...] = (query, key, value)
        if bias is not None:
            biases = torch.split(bias, [part.shape[-1] for part in parts])
            parts = tuple(part + one for part, one in zip(parts, biases, strict=True))
        q, k, v = (split_heads(part, self._num_heads) for part in parts)
        rule = AttentionRule(scale=self._scale or q.shape[-1] ** -0.5, causal=self._unidirectional)
        return join_heads(rule.attend(q, k, v, attention_bias))
