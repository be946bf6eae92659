"""Compute in torch what a MoE node does: which experts a token goes to, and what one expert makes of it.

Shapes: T = tokens, E = experts, H = hidden size, I = inner size, F = 2 where fc1 holds gate and up, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from stages.records.experts import ExpertActivation, Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The experts that each token goes to, and how much it counts in each: [T, k], of 0 to E - 1."""

    experts: Int64[Tensor, "T k"]
    weights: Float[Tensor, "T k"]


def route(scores: Float[Tensor, "T E"], routing: Routing) -> Routed:
    """Return where tokens go, by the largest of ``scores``."""
    chosen, experts = torch.topk(scores, min(routing.top_k, scores.shape[-1]), dim=-1)
    weights = torch.softmax(chosen, -1) if routing.over_chosen else torch.softmax(scores, -1).gather(-1, experts)
    return Routed(experts=experts, weights=weights)


def activated(hidden: Float[Tensor, "T FI"], activation: ExpertActivation) -> Float[Tensor, "T I"]:
    """Return what fc2 reads where fc1 gives ``hidden``, biases included."""
    match activation.kind:
        case "relu":
            return torch.relu(hidden)
        case "gelu":
            return functional.gelu(hidden, approximate="tanh")
        case "silu":
            return functional.silu(hidden)
        case "identity":
            return hidden
        case "swiglu":
            gate, linear = _halves(hidden, activation)
            if activation.limit is not None:
                gate, linear = gate.clamp(max=activation.limit), linear.clamp(-activation.limit, activation.limit)
            return gate * torch.sigmoid(activation.alpha * gate) * (linear + activation.beta)


def _halves(hidden: Tensor, activation: ExpertActivation) -> tuple[Tensor, Tensor]:
    if activation.gate == "interleaved":
        return hidden[..., 0::2], hidden[..., 1::2]
    gate, linear = hidden.chunk(2, dim=-1)
    return gate, linear
