"""Small Givens rotations of randomly paired channels: each mixes two channels, and outliers stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_LARGEST_ANGLE = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRotation:
    """Rotations of disjoint channel pairs: R[i, i] = R[j, j] = cos, R[i, j] = sin, R[j, i] = -sin, all in float64."""

    first: Tensor
    second: Tensor
    cos: Float[Tensor, " pairs"]
    sin: Float[Tensor, " pairs"]

    def of_columns(self, matrix: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """``matrix @ R`` in float64."""
        rotated = matrix.double().clone()
        left, right = rotated[:, self.first], rotated[:, self.second]
        rotated[:, self.first] = self.cos * left - self.sin * right
        rotated[:, self.second] = self.sin * left + self.cos * right
        return rotated

    def of_rows(self, matrix: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """``R^T @ matrix`` in float64."""
        return self.of_columns(matrix.T).T.contiguous()

    def mean_gain(self, gain: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """|gain| averaged over each pair with the squared entries of R, in float64."""
        averaged = gain.double().abs()
        left, right = averaged[self.first], averaged[self.second]
        averaged[self.first] = self.cos**2 * left + self.sin**2 * right
        averaged[self.second] = self.sin**2 * left + self.cos**2 * right
        return averaged


def random_rotation(channels: int, generator: torch.Generator) -> PairRotation:
    """Pair ``channels`` at random (an odd one stays alone) and draw each angle from [-0.6, 0.6] radians."""
    order = torch.randperm(channels, generator=generator)
    pairs = channels // 2
    angles = (torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 - 1) * _LARGEST_ANGLE
    return PairRotation(
        first=order[:pairs], second=order[pairs : 2 * pairs], cos=torch.cos(angles), sin=torch.sin(angles)
    )
