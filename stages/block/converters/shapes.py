"""ReduceMean and Split as opset 18 defines them; onnx2torch knows the versions before."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn


class ReduceMean(nn.Module):
    """Mean over ``axes``, which are an input; over all where there is none."""

    def __init__(self, *, keepdims: bool, axes: tuple[int, ...]) -> None:
        super().__init__()
        self._keepdims, self._axes = keepdims, axes

    def forward(self, hidden: Tensor, axes: Int[Tensor, " count"] | None = None) -> Tensor:
        chosen = self._axes if axes is None else tuple(axes.tolist())
        return hidden.mean(dim=chosen or tuple(range(hidden.ndim)), keepdim=self._keepdims)


class Split(nn.Module):
    """Parts of the sizes in ``split``; else ``outputs`` parts, equal but for the last."""

    def __init__(self, *, axis: int, outputs: int) -> None:
        super().__init__()
        self._axis, self._outputs = axis, outputs

    def forward(self, hidden: Tensor, split: Int[Tensor, " outputs"] | None = None) -> tuple[Tensor, ...]:
        if split is None:
            return torch.split(hidden, -(-hidden.shape[self._axis] // self._outputs), dim=self._axis)
        return torch.split(hidden, split.tolist(), dim=self._axis)
