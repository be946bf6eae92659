"""Causal attention over full windows: what GroupQueryAttention and MultiHeadAttention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


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
        """softmax(scale q k^T + bias) v; each of ``kv_heads`` serves heads / kv_heads query heads in turn.

        ``sink`` adds exp(sink) of its head to every softmax's denominator.
        """
        mask = self._mask(query.shape[2], query.device)
        if self.softcap or sink is not None:
            return self._written_out(query, key, value, mask, bias, sink)
        if self.causal and self.window is None and bias is None:
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        both = mask if bias is None else mask + bias
        return scaled_dot_product_attention(
            query, key, value, attn_mask=both, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
        )

    def _mask(self, length: int, device: torch.device) -> Float[Tensor, "length length"]:
        """0 where a query sees a key, else minus infinity."""
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


def split_heads(hidden: Float[Tensor, "batch length width"], heads: int) -> Float[Tensor, "batch heads length size"]:
    """[batch, length, heads * size] -> [batch, heads, length, size]."""
    batch, length, width = hidden.shape
    return hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(
    hidden: Float[Tensor, "batch heads length size"],
) -> Float[Tensor, "batch length width"]:
    """The inverse of ``split_heads``."""
    return hidden.transpose(1, 2).flatten(2)
