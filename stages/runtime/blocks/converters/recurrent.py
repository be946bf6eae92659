"""Convolutions and linear attention as torch modules: CausalConvWithState, LinearAttention and what surrounds it.

Windows are full and begin at position 0: there is no state before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu, softplus

from stages.runtime.blocks.converters.attention import join_heads, split_heads
from stages.runtime.blocks.converters.layers import rms_norm

CAUSAL_CONV_ABSENT = (3,)
"""Inputs of CausalConvWithState that must be absent: the state."""
LINEAR_ATTENTION_ABSENT = (3,)
"""Inputs of LinearAttention that must be absent: the state."""
Gate = Literal["silu", "swish", "sigmoid", "none"]
UpdateRule = Literal["linear", "gated", "delta", "gated_delta"]
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "sigmoid": torch.sigmoid,
    "none": lambda hidden: hidden,
}
_CHUNK = 64
"""Tokens that are computed at once; memory for them grows with its square."""


class CausalConv(nn.Module):
    """CausalConvWithState of one dimension: each channel by itself, over the tokens up to each one."""

    def __init__(self, *, activation: Gate, channels_last: bool, dilation: int) -> None:
        super().__init__()
        self._activation, self._channels_last, self._dilation = _GATES[activation], channels_last, dilation

    def forward(
        self,
        hidden: Float[Tensor, "batch channels_or_length length_or_channels"],
        weight: Float[Tensor, "channels 1 taps"],
        bias: Float[Tensor, " channels"] | None = None,
        _past_state: None = None,
    ) -> Float[Tensor, "batch channels_or_length length_or_channels"]:
        if self._channels_last:
            hidden = hidden.transpose(1, 2)
        before = (weight.shape[-1] - 1) * self._dilation
        found = conv1d(pad(hidden, (before, 0)), weight, bias, dilation=self._dilation, groups=len(weight))
        found = self._activation(found)
        return found.transpose(1, 2) if self._channels_last else found


class LinearAttentionGate(nn.Module):
    """Decay in log space, and update rate."""

    def forward(
        self,
        decay: Float[Tensor, "batch length heads"],
        bias: Float[Tensor, " heads"],
        scale: Float[Tensor, " heads"],
        rate: Float[Tensor, "batch length heads"] | None = None,
    ) -> tuple[Tensor, ...] | Tensor:
        """Return scale * softplus(decay + bias), and sigmoid(rate) where there is one."""
        found = scale * softplus(decay + bias)
        return found if rate is None else (found, torch.sigmoid(rate))


class GatedNorm(nn.Module):
    """GatedRMSNorm: each head's vector is normalized, then multiplied with its gate."""

    def __init__(self, *, epsilon: float, activation: Gate) -> None:
        super().__init__()
        self._epsilon, self._activation = epsilon, _GATES[activation]

    def forward(
        self,
        hidden: Float[Tensor, "*batch width"],
        gain: Float[Tensor, " size"],
        gate: Float[Tensor, "*batch width"],
    ) -> Float[Tensor, "*batch width"]:
        heads = hidden.reshape(*hidden.shape[:-1], -1, len(gain))
        return rms_norm(heads, gain, self._epsilon).flatten(-2) * self._activation(gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionRule:
    """The node's attributes and their defaults; ``scale`` is 0 for 1 / sqrt(key size)."""

    q_num_heads: int
    kv_num_heads: int
    update_rule: UpdateRule = "gated_delta"
    scale: float = 0.0


class LinearAttention(nn.Module):
    """LinearAttention, with its inputs in the node's order."""

    def __init__(self, rule: LinearAttentionRule) -> None:
        super().__init__()
        self._rule = rule

    def forward(
        self,
        query: Float[Tensor, "batch length q_width"],
        key: Float[Tensor, "batch length k_width"],
        value: Float[Tensor, "batch length v_width"],
        _past_state: None = None,
        decay: Float[Tensor, "batch length heads_or_width"] | None = None,
        beta: Float[Tensor, "batch length heads_or_1"] | None = None,
    ) -> Float[Tensor, "batch length width_out"]:
        """Return what the queries read from the states, heads joined.

        Args:
            query: of all heads.
            key: of all heads.
            value: of all heads.
            decay: what the state is multiplied with before each token, as a logarithm; None: it stays.
            beta: how much of what the state lacks of a token's value is added; None: all of the value is.
        """
        rule = self._rule
        q, k = split_heads(query, rule.q_num_heads), split_heads(key, self._key_heads(query, key))
        v = split_heads(value, rule.kv_num_heads)
        heads = max(rule.q_num_heads, rule.kv_num_heads)
        scale = rule.scale or q.shape[-1] ** -0.5
        q, k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (q * scale, k, v))
        rate = None if beta is None else _of_heads(beta, heads)
        if decay is not None and decay.shape[-1] > rule.kv_num_heads:
            of_channels = split_heads(decay, rule.kv_num_heads).repeat_interleave(heads // rule.kv_num_heads, dim=1)
            return join_heads(token_by_token(q, k, v, of_channels, rate))
        return join_heads(delta_rule(q, k, v, None if decay is None else _of_heads(decay, heads), rate))

    def _key_heads(self, query: Tensor, key: Tensor) -> int:
        size = query.shape[-1] // self._rule.q_num_heads
        return int(key.shape[-1] // size)


def _of_heads(gate: Float[Tensor, "batch length some"], heads: int) -> Float[Tensor, "batch heads length"]:
    """Return a gate of one or of each key/value head for every head."""
    return gate.transpose(1, 2).repeat_interleave(heads // gate.shape[-1], dim=1)


def token_by_token(
    query: Float[Tensor, "batch heads length size"],
    key: Float[Tensor, "batch heads length size"],
    value: Float[Tensor, "batch heads length value_size"],
    decay: Float[Tensor, "batch heads length size"],
    beta: Float[Tensor, "batch heads length"] | None,
) -> Float[Tensor, "batch heads length value_size"]:
    """Return the same as ``delta_rule`` for a decay of each channel of the keys.

    Args:
        query: scaled.
        key: of every head.
        value: of every head.
        decay: in log space.
        beta: update rate; None: values are added as they are.
    """
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    found = []
    for token in range(query.shape[2]):
        k, u = key[:, :, token, :, None], value[:, :, token, None, :]
        state = decay[:, :, token, :, None].exp() * state
        if beta is not None:
            u = beta[:, :, token, None, None] * (u - (k * state).sum(dim=2, keepdim=True))
        state = state + k * u
        found.append((query[:, :, token, :, None] * state).sum(dim=2))
    return torch.stack(found, dim=2)


def delta_rule(
    query: Float[Tensor, "batch heads length size"],
    key: Float[Tensor, "batch heads length size"],
    value: Float[Tensor, "batch heads length value_size"],
    decay: Float[Tensor, "batch heads length"] | None,
    beta: Float[Tensor, "batch heads length"] | None,
) -> Float[Tensor, "batch heads length value_size"]:
    """Return o_t = S_t^T q_t for the states S_t = a_t S_(t-1) + k_t u_t^T with a_t = exp(decay_t).

    u_t is v_t without ``beta``, else beta_t (v_t - a_t S_(t-1)^T k_t). In a chunk of tokens that begins at state S,
    with A_t = a_1 ... a_t, the u solve a triangular system: u_t + beta_t sum over j < t of A_t / A_j (k_t k_j) u_j =
    beta_t (v_t - A_t S^T k_t).

    Args:
        query: scaled.
        key: of every head.
        value: of every head.
        decay: in log space; None: states don't decay.
        beta: update rate; None: values are added as they are.
    """
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    logs = query.new_zeros(query.shape[:3]) if decay is None else decay
    found = []
    for start in range(0, query.shape[2], _CHUNK):
        q, k, v, log = (part[:, :, start : start + _CHUNK] for part in (query, key, value, logs))
        total = log.cumsum(dim=-1)
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        since = total.exp().unsqueeze(-1)
        if beta is None:
            u = v
        else:
            rate = beta[:, :, start : start + _CHUNK].unsqueeze(-1)
            system = (rate * between * (k @ k.transpose(-1, -2))).tril(-1)
            u = torch.linalg.solve_triangular(system, rate * (v - since * (k @ state)), upper=False, unitriangular=True)
        found.append(since * (q @ state) + (between * (q @ k.transpose(-1, -2))) @ u)
        left = (total[..., -1:] - total).exp().unsqueeze(-1)
        state = total[..., -1, None, None].exp() * state + (left * k).transpose(-1, -2) @ u
    return torch.cat(found, dim=2)
