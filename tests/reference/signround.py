"""Quantize and dequantize blocks of weights, written out in float64 with autograd's own operations.

A straight-through rounding is x + stop_gradient(round(x) - x); everything else differentiates as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(value: Tensor) -> Tensor:
    return value + (torch.round(value) - value).detach()


def weight(
    blocks: Tensor,
    offsets: Tensor,
    start_scales: Tensor,
    high: Tensor,
    low: Tensor | None,
    start_zero_points: Tensor | None,
    code_min: int,
    code_max: int,
) -> Tensor:
    """[N, nB, B] from [N, nB, B] blocks and offsets, and [N, nB] of all others; scales are not rounded to storage."""
    if start_zero_points is None or low is None:
        scales, zero_points = start_scales * high, torch.zeros_like(high)
    else:
        # The range ends at these two weights; its ends are scaled, and the grid is laid over it again.
        smallest = -start_zero_points * start_scales * low
        largest = (code_max - start_zero_points) * start_scales * high
        scales = (largest - smallest) / code_max
        zero_points = straight_through((-smallest / scales).clamp(code_min, code_max))
    levels = straight_through(blocks / scales.unsqueeze(-1) + offsets)
    codes = (levels + zero_points.unsqueeze(-1)).clamp(code_min, code_max)
    return (codes - zero_points.unsqueeze(-1)) * scales.unsqueeze(-1)
