"""Norms, activations and small operators as torch modules: what onnx2torch lacks beside attention."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, normalize


class RootMeanSquareNorm(nn.Module):
    """SimplifiedLayerNormalization and RMSNormalization, over the last axis."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self._epsilon = epsilon

    def forward(
        self, hidden: Float[Tensor, "*batch width"], gain: Float[Tensor, " width"]
    ) -> Float[Tensor, "*batch width"]:
        return rms_norm(hidden, gain, self._epsilon)


def rms_norm(
    hidden: Float[Tensor, "*batch width"], gain: Float[Tensor, " width"], epsilon: float
) -> Float[Tensor, "*batch width"]:
    """Return hidden / sqrt(mean(hidden^2) + epsilon) * gain.

    Args:
        hidden: the vectors along the last axis.
        gain: a factor for each channel.
        epsilon: keeps the root of a zero vector from 0.
    """
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + epsilon) * gain


class LayerNorm(nn.Module):
    """LayerNormalization over the last axis: mean 0, variance 1, gain and bias."""

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


class Gelu(nn.Module):
    """Gelu; with a bias, which is added first, BiasGelu and FastGelu (the tanh form)."""

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


class UnitVectors(nn.Module):
    """LpNormalization: vectors of length 1 along ``axis``, by the sum of absolute values or of squares (``p``)."""

    def __init__(self, *, axis: int, p: int) -> None:
        super().__init__()
        self._axis, self._p = axis, p

    def forward(self, hidden: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return normalize(hidden, p=self._p, dim=self._axis)


class GatedAdd(nn.Module):
    """x + y * gate."""

    def forward(
        self,
        hidden: Float[Tensor, "*batch width"],
        gated: Float[Tensor, "*batch width"],
        gate: Float[Tensor, "*batch 1"],
    ) -> Float[Tensor, "*batch width"]:
        return hidden + gated * gate


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


class ReduceMean(nn.Module):
    """The mean over ``axes``, an attribute or an input; over all axes where there is neither."""

    def __init__(self, *, keepdims: bool, axes: tuple[int, ...]) -> None:
        super().__init__()
        self._keepdims, self._axes = keepdims, axes

    def forward(self, hidden: Tensor, axes: Int[Tensor, " count"] | None = None) -> Tensor:
        chosen = self._axes if axes is None else tuple(axes.tolist())
        return hidden.mean(dim=chosen or tuple(range(hidden.ndim)), keepdim=self._keepdims)


class ScatterElements(nn.Module):
    """Numbers of ``updates`` in the place of those that ``indices`` name along an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self._axis = axis

    def forward(
        self, hidden: Float[Tensor, "*batch"], indices: Int[Tensor, "*places"], updates: Float[Tensor, "*places"]
    ) -> Float[Tensor, "*batch"]:
        return hidden.scatter(self._axis, indices, updates)


class Split(nn.Module):
    """Parts of the sizes in ``split``; without that, ``outputs`` parts, equal but for the last."""

    def __init__(self, *, axis: int, outputs: int) -> None:
        super().__init__()
        self._axis, self._outputs = axis, outputs

    def forward(self, hidden: Tensor, split: Int[Tensor, " outputs"] | None = None) -> tuple[Tensor, ...]:
        if split is None:
            return torch.split(hidden, -(-hidden.shape[self._axis] // self._outputs), dim=self._axis)
        return torch.split(hidden, split.tolist(), dim=self._axis)
