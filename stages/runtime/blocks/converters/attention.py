"""Attention as torch modules: GroupQueryAttention, MultiHeadAttention and rotary embeddings of com.microsoft.

Windows are full and begin at position 0: there is no past, and no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from stages.runtime.blocks.converters.layers import rms_norm

GROUP_QUERY_ABSENT = (3, 4, 5, 6, 9, 12, 13)
"""Inputs of GroupQueryAttention that must be absent: the past and its scales, lengths, positions."""
MULTI_HEAD_ABSENT = (4, 6, 7, 8)
"""Inputs of MultiHeadAttention that must be absent: padding mask, past key and value, past length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQueryRule:
    """The node's attributes and their defaults; flags are 0 or 1.

    ``scale`` is 0 for 1 / sqrt(head size), ``local_window_size`` -1 for all keys.
    """

    num_heads: int
    kv_num_heads: int
    scale: float = 0.0
    softcap: float = 0.0
    local_window_size: int = -1
    do_rotary: int = 0
    rotary_interleaved: int = 0
    smooth_softmax: int = 0
    causal: int = 1
    qk_norm_epsilon: float = 1e-6


class GroupQueryAttention(nn.Module):
    """GroupQueryAttention, with its inputs in the node's order."""

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
        """Return softmax(...) v, heads joined: [batch, length, num_heads * head size].

        Args:
            query: of all heads; with the keys and values behind it where ``key`` and ``value`` are None.
            key: of all key/value heads.
            value: of all key/value heads.
            cos_cache: cosines of the rotation, by position.
            sin_cache: sines of the rotation, by position.
            attention_bias: what is added to the scores.
            head_sink: see ``AttentionRule.attend``.
            q_norm_weight: the gain of the norm of each query head; None where there is no norm.
            k_norm_weight: the same for key heads.
        """
        rule = self._rule
        heads = self._heads(query, key, value)
        q, k = self._norm(heads[0], q_norm_weight), self._norm(heads[1], k_norm_weight)
        if rule.do_rotary:
            assert cos_cache is not None
            assert sin_cache is not None
            tables = cos_cache[: q.shape[2]].unsqueeze(0), sin_cache[: q.shape[2]].unsqueeze(0)
            q, k = (rotate(part, *tables, interleaved=bool(rule.rotary_interleaved)) for part in (q, k))
        if rule.smooth_softmax and head_sink is None:
            head_sink = q.new_zeros(rule.num_heads)
        return join_heads(self._attention(q.shape[3]).attend(q, k, heads[2], attention_bias, head_sink))

    def _heads(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
        """Return q [batch, heads, length, size], k and v [batch, kv_heads, length, size]; the inputs may be packed."""
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
            causal=bool(rule.causal),
            window=None if rule.local_window_size < 0 else rule.local_window_size,
            softcap=rule.softcap,
        )


class MultiHeadAttention(nn.Module):
    """MultiHeadAttention, with its inputs in the node's order; ``scale`` is 0 for 1 / sqrt(head size)."""

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
        """Return softmax(...) v, heads joined.

        Args:
            query: of all heads.
            key: of all heads.
            value: of all heads.
            bias: of the projections of query, key and value, one behind the other.
            attention_bias: what is added to the scores.
        """
        parts: tuple[Tensor, ...] = (query, key, value)
        if bias is not None:
            biases = torch.split(bias, [part.shape[-1] for part in parts])
            parts = tuple(part + one for part, one in zip(parts, biases, strict=True))
        q, k, v = (split_heads(part, self._num_heads) for part in parts)
        rule = AttentionRule(scale=self._scale or q.shape[-1] ** -0.5, causal=self._unidirectional)
        return join_heads(rule.attend(q, k, v, attention_bias))


class RotaryEmbedding(nn.Module):
    """com.microsoft RotaryEmbedding of [batch, length, width] or [batch, heads, length, size].

    ``num_heads`` is 0 where the tables cover whole heads, whose size they then tell.
    """

    def __init__(self, *, num_heads: int, interleaved: bool) -> None:
        super().__init__()
        self._num_heads, self._interleaved = num_heads, interleaved

    def forward(
        self,
        input: Float[Tensor, "batch *middle length_or_size width"],
        position_ids: Int[Tensor, "*batch length"],
        cos_cache: Float[Tensor, "positions half"],
        sin_cache: Float[Tensor, "positions half"],
    ) -> Float[Tensor, "batch *middle length_or_size width"]:
        length = input.shape[-2]
        if position_ids.ndim == 1:
            position_ids = (position_ids + torch.arange(length, device=input.device)).unsqueeze(0)
        return self.turned(input, cos_cache[position_ids], sin_cache[position_ids])

    def turned(
        self,
        input: Float[Tensor, "batch *middle length_or_size width"],
        cos: Float[Tensor, "#batch length half"],
        sin: Float[Tensor, "#batch length half"],
    ) -> Float[Tensor, "batch *middle length_or_size width"]:
        """Return ``input`` rotated by each token's angles.

        Args:
            input: queries or keys.
            cos: of the angles.
            sin: of the angles.
        """
        if input.ndim == 4:
            return rotate(input, cos, sin, self._interleaved)
        heads = self._num_heads or input.shape[-1] // (2 * cos.shape[-1])
        return join_heads(rotate(split_heads(input, heads), cos, sin, self._interleaved))


class MultiAxisRotaryEmbedding(nn.Module):
    """MRotaryEmbedding: each angle follows the position on one of three axes (time, height, width)."""

    def __init__(self, *, num_heads: int, interleaved: bool, sections: tuple[int, ...], alternating: bool) -> None:
        """Remember the node's attributes.

        Args:
            num_heads: heads of an input that has them joined.
            interleaved: a pair is two neighbours, not (i, i + half).
            sections: how many angles follow each axis.
            alternating: angles follow the axes by turns, as far as there are so many, and else the first one; not one
                axis behind the other.
        """
        super().__init__()
        self._one_axis = RotaryEmbedding(num_heads=num_heads, interleaved=interleaved)
        self._sections, self._alternating = sections, alternating

    def forward(
        self,
        input: Float[Tensor, "batch *middle length_or_size width"],
        position_ids: Int[Tensor, "axes batch length"],
        cos_cache: Float[Tensor, "positions half"],
        sin_cache: Float[Tensor, "positions half"],
    ) -> Float[Tensor, "batch *middle length_or_size width"]:
        axes = self._axes(cos_cache.shape[-1]).to(input.device)
        angles = torch.arange(len(axes), device=input.device)
        rows = position_ids[axes].permute(1, 2, 0)
        return self._one_axis.turned(input, cos_cache[rows, angles], sin_cache[rows, angles])

    def _axes(self, half: int) -> Int[Tensor, " half"]:
        """Return the axis that each angle follows."""
        if not self._alternating:
            return torch.repeat_interleave(torch.arange(len(self._sections)), torch.tensor(self._sections))
        axes = torch.zeros(half, dtype=torch.int64)
        for axis, size in enumerate(self._sections[1:], start=1):
            axes[axis : size * len(self._sections) : len(self._sections)] = axis
        return axes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """What changes the scores: all but ``scale`` are off by default."""

    scale: float
    causal: bool = True
    window: int | None = None
    """Keys that a query sees, itself included."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap)."""

    def attend(
        self,
        query: Float[Tensor, "batch heads length size"],
        key: Float[Tensor, "batch kv_heads length size"],
        value: Float[Tensor, "batch kv_heads length value_size"],
        bias: Float[Tensor, "_ _ length length"] | None = None,
        sink: Float[Tensor, " heads"] | None = None,
    ) -> Float[Tensor, "batch heads length value_size"]:
        """Return softmax(scale q k^T + bias) v; each key/value head serves heads / kv_heads query heads in a row.

        Args:
            query: of every query head.
            key: of every key/value head.
            value: of every key/value head.
            bias: what is added to the scores.
            sink: exp(sink) of a head is added to the denominator of its softmax.
        """
        mask = self._mask(query.shape[2], query.device)
        if self.softcap or sink is not None:
            return self._written_out(query, key, value, mask, bias, sink)
        only_causal = self.causal and self.window is None and bias is None
        both = mask if bias is None else mask + bias
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if only_causal else both,
            is_causal=only_causal,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _mask(self, length: int, device: torch.device) -> Float[Tensor, "length length"]:
        """Return 0 where a query sees a key, else minus infinity."""
        places = torch.arange(length, device=device)
        distance = places[:, None] - places[None, :]
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (distance >= self.window)
        return torch.zeros(length, length, device=device).masked_fill(hidden, -torch.inf)

    def _written_out(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = query @ key.transpose(-1, -2) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores + mask if bias is None else scores + mask + bias
        if sink is None:
            return torch.softmax(scores, dim=-1) @ value
        scores = pad(scores, (0, 1))
        scores = torch.cat([scores[..., :-1], sink[:, None, None].expand_as(scores[..., -1:])], dim=-1)
        return torch.softmax(scores, dim=-1)[..., :-1] @ value


def rotate(
    heads: Float[Tensor, "batch heads length size"],
    cos: Float[Tensor, "#batch length half"],
    sin: Float[Tensor, "#batch length half"],
    interleaved: bool,
) -> Float[Tensor, "batch heads length size"]:
    """Rotate pairs of the first 2 * half channels by their position's angle; further channels stay.

    Args:
        heads: queries or keys.
        cos: of the angles.
        sin: of the angles.
        interleaved: a pair is two neighbours, not (i, i + half).
    """
    width = 2 * cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def split_heads(hidden: Float[Tensor, "batch length width"], heads: int) -> Float[Tensor, "batch heads length size"]:
    """Split [batch, length, heads * size] into [batch, heads, length, size]."""
    batch, length, width = hidden.shape
    return hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(hidden: Float[Tensor, "batch heads length size"]) -> Float[Tensor, "batch length width"]:
    """Undo ``split_heads``."""
    return hidden.transpose(1, 2).flatten(2)
