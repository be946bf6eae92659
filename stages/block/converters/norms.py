"""Normalizations over the last axis."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm


def rms_norm(
    hidden: Float[Tensor, "*batch width"], gain: Float[Tensor, " width"], epsilon: float
) -> Float[Tensor, "*batch width"]:
    """hidden / sqrt(mean(hidden^2) + epsilon) * gain."""
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + epsilon) * gain


class RootMeanSquareNorm(nn.Module):
    """SimplifiedLayerNormalization and RMSNormalization."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self._epsilon = epsilon

    def forward(
        self, hidden: Float[Tensor, "*batch width"], gain: Float[Tensor, " width"]
    ) -> Float[Tensor, "*batch width"]:
        return rms_norm(hidden, gain, self._epsilon)


class LayerNorm(nn.Module):
    """LayerNormalization: mean 0, variance 1, gain and bias."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self._epsilon = epsilon

    def forward(
        self,
        hidden: Float[Tensor, "*batch width"],
        gain: Float[Tensor, " width"],
        bias: Float[Tensor, " width"] | None = None,
    ) -> Float[Tensor, "*batch width"]:
        return layer_norm(hidden, gain.shape, gain, bias, self._epsilon)
