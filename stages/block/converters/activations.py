"""Activation functions that onnx2torch lacks."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu


class Gelu(nn.Module):
    """Gelu, and with the bias that is added first BiasGelu and FastGelu (the tanh form)."""

    def __init__(self, approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        self._approximate = approximate

    def forward(
        self, hidden: Float[Tensor, "*batch width"], bias: Float[Tensor, " width"] | None = None
    ) -> Float[Tensor, "*batch width"]:
        return gelu(hidden if bias is None else hidden + bias, approximate=self._approximate)


class QuickGelu(nn.Module):
    """x * sigmoid(alpha * x); alpha 1 is SiLU."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self._alpha = alpha

    def forward(self, hidden: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return hidden * torch.sigmoid(self._alpha * hidden)
