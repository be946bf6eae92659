"""com.microsoft GroupQueryAttention over full windows with an empty past."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.block.converters.attention import AttentionRule, join_heads, split_heads
from stages.block.converters.norms import rms_norm
from stages.block.converters.rotary import rotate

LEFT_OUT = (3, 4, 5, 6, 9, 12, 13)
"""Past key and value, lengths, positions, scales of a quantized past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQueryRule:
    """The node's attributes. ``scale`` is 0 for 1 / sqrt(head size), ``local_window_size`` -1 for all keys."""

    num_heads: int
    kv_num_heads: int
    scale: float = 0.0
    softcap: float = 0.0
    local_window_size: int = -1
    do_rotary: bool = False
    rotary_interleaved: bool = False
    smooth_softmax: bool = False
    causal: bool = True
    qk_norm_epsilon: float = 1e-6


class GroupQueryAttention(nn.Module):
    """Inputs in the node's order; those in ``LEFT_OUT`` must be absent: windows are full and begin at position 0."""

    def __init__(self, rule: GroupQueryRule) -> None:
        super().__init__()
        self._rule = rule

    def forward(
        self,
        query: Float[Tensor, "batch length width"],
        key: Float[Tensor, "batch length kv_width"] | None = None,
        value: Float[Tensor, "batch length kv_width"] | None = None,
        _past_key: None = None,
        _past_value: None = None,
        _seqlens_k: None = None,
        _total_sequence_length: None = None,
        cos_cache: Float[Tensor, "positions half"] | None = None,
        sin_cache: Float[Tensor, "positions half"] | None = None,
        _position_ids: None = None,
        attention_bias: Float[Tensor, "_ _ length length"] | None = None,
        head_sink: Float[Tensor, " heads"] | None = None,
        _k_scale: None = None,
        _v_scale: None = None,
        q_norm_weight: Float[Tensor, " size"] | None = None,
        k_norm_weight: Float[Tensor, " size"] | None = None,
    ) -> Float[Tensor, "batch length width_out"]:
        """softmax(...) v, heads joined; [batch, length, num_heads * head size]."""
        rule = self._rule
        heads = self._heads(query, key, value)
        q, k = self._norm(heads[0], q_norm_weight), self._norm(heads[1], k_norm_weight)
        if rule.do_rotary:
            assert cos_cache is not None
            assert sin_cache is not None
            tables = cos_cache[: q.shape[2]].unsqueeze(0), sin_cache[: q.shape[2]].unsqueeze(0)
            q, k = (rotate(part, *tables, rule.rotary_interleaved) for part in (q, k))
        if rule.smooth_softmax and head_sink is None:
            head_sink = q.new_zeros(rule.num_heads)
        return join_heads(self._attention(q.shape[3]).attend(q, k, heads[2], attention_bias, head_sink))

    def _heads(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
        """q [batch, heads, length, size], k and v [batch, kv_heads, length, size], packed or apart."""
        rule = self._rule
        if key is None or value is None:
            packed = split_heads(query, rule.num_heads + 2 * rule.kv_num_heads)
            return torch.split(packed, [rule.num_heads, rule.kv_num_heads, rule.kv_num_heads], dim=1)
        return (
            split_heads(query, rule.num_heads),
            split_heads(key, rule.kv_num_heads),
            split_heads(value, rule.kv_num_heads),
        )

    def _norm(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        return heads if weight is None else rms_norm(heads, weight, self._rule.qk_norm_epsilon)

    def _attention(self, head_size: int) -> AttentionRule:
        rule = self._rule
        return AttentionRule(
            scale=rule.scale or head_size**-0.5,
            causal=rule.causal,
            window=None if rule.local_window_size < 0 else rule.local_window_size,
            softcap=rule.softcap,
        )
