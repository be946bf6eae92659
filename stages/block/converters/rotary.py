"""Rotary position embedding, as com.microsoft RotaryEmbedding and inside GroupQueryAttention."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stages.block.converters.attention import join_heads, split_heads


def rotate(
    heads: Float[Tensor, "batch heads length size"],
    cos: Float[Tensor, "#batch length half"],
    sin: Float[Tensor, "#batch length half"],
    interleaved: bool,
) -> Float[Tensor, "batch heads length size"]:
    """Turn pairs of the first 2 * half channels by their position's angle; further channels stay.

    A pair is (i, i + half), or neighbours where ``interleaved``.
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
        cos, sin = cos_cache[position_ids], sin_cache[position_ids]
        if input.ndim == 4:
            return rotate(input, cos, sin, self._interleaved)
        heads = self._num_heads or input.shape[-1] // (2 * cos_cache.shape[-1])
        return join_heads(rotate(split_heads(input, heads), cos, sin, self._interleaved))
