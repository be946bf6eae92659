"""Slow, obvious float64 searches: losses from the tokens themselves, one candidate, block and ratio at a time."""

from __future__ import annotations

import numpy as np

from tests.reference.rounding import round_trip, round_trip_row


def output_loss(tokens: np.ndarray, error: np.ndarray) -> float:
    """||X D^T||^2 / T."""
    return float(np.square(tokens @ error.T).sum() / len(tokens))


def awq_loss(
    tokens: np.ndarray, weight: np.ndarray, scale: np.ndarray, block_size: int, bits: int, *, symmetric: bool
) -> float:
    """||X W^T - (X / s) Q(W diag(s))^T||^2 / T, with the scaled activation spelled out."""
    stored = round_trip(weight * scale, block_size, bits, symmetric=symmetric)
    return float(np.square((tokens / scale) @ stored.T - tokens @ weight.T).sum() / len(tokens))


def weight_magnitude(weight: np.ndarray, block_size: int) -> np.ndarray:
    """Mean over rows of |w| over the largest |w| of the block that channel k is quantized with."""
    total = np.zeros(weight.shape[1])
    for row in np.abs(weight):
        for start in range(0, len(row), block_size):
            block = row[start : start + block_size]
            total[start : start + block_size] += block / block.max()
    return total / len(weight)


def best_clip_ratio(
    tokens: np.ndarray, row: np.ndarray, start: int, block_size: int, bits: int, ratios: list[float], *, symmetric: bool
) -> float:
    """The ratio whose own-block output error over all tokens is smallest."""
    stop = min(start + block_size, len(row))
    losses = []
    for ratio in ratios:
        stored = round_trip_row(row[start:stop], block_size, bits, symmetric=symmetric, ratios=np.array([ratio]))
        losses.append(np.square(tokens[:, start:stop] @ (stored - row[start:stop])).sum())
    return ratios[int(np.argmin(losses))]
