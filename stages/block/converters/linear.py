"""A site of the cut graph: its weight is an input, so that a differentiable tensor can take its place."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear


class Linear(nn.Module):
    """y = x W^T + beta * bias."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self._beta = beta

    def forward(
        self,
        hidden: Float[Tensor, "*batch K"],
        weight: Float[Tensor, "N K"],
        bias: Float[Tensor, "*bias"] | None = None,
    ) -> Float[Tensor, "*batch N"]:
        product = linear(hidden, weight)
        return product if bias is None else product + self._beta * bias
