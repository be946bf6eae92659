"""The blocks that a scale per channel is repeated over where the operator, MatMulNBits, knows blocks alone."""

from __future__ import annotations

_SIZES = (128, 64, 32, 16)
"""All of those that CUDA's 4-bit kernels take."""


def channel_block_size(in_features: int) -> int:
    """The size that fills up a row of ``in_features`` least, the largest such."""
    return min(_SIZES, key=lambda size: -in_features % size)
