"""How far weights are from an equidistant grid in each block: slow, obvious, float64."""

from __future__ import annotations

import numpy as np


def grid_error(weight: np.ndarray, block_size: int, levels: int) -> float:
    """Root mean square distance to the best grid of at most ``levels`` points a block, relative to the weights.

    Each block tries every grid from its smallest to its largest value; zero means that the block holds no more levels.
    """
    blocks = weight.astype(np.float64).reshape(-1, block_size)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    best = np.full(len(blocks), np.inf)
    for steps in range(1, levels):
        width = (high - low) / steps
        nearest = low + np.round((blocks - low) / width) * width
        best = np.minimum(best, ((blocks - nearest) ** 2).sum(1))
    return float(np.sqrt(best.sum() / (blocks**2).sum()))
