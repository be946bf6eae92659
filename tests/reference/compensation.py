"""Slow, obvious float64 GPTQ and coordinate descent, one output channel and one column at a time."""

from __future__ import annotations

import numpy as np


def round_to_grid(value: float, scale: float, zero: int, low: int, high: int) -> int:
    return int(np.clip(np.rint(value / scale) + zero, low, high))


def obq_codes(
    row: np.ndarray,
    gram: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    low: int,
    high: int,
    order: list[int],
) -> np.ndarray:
    """Optimal Brain Quantization in a given order: quantize one weight, move all open ones to their optimum.

    ``scales`` and ``zeros`` are [K], one for every weight. The optimum of the open weights beside the fixed errors is
    solved for anew at each step, with no inverse kept.
    """
    codes = np.zeros(len(row), dtype=int)
    stored = row.astype(np.float64).copy()
    for step, column in enumerate(order):
        codes[column] = round_to_grid(stored[column], scales[column], zeros[column], low, high)
        stored[column] = (codes[column] - zeros[column]) * scales[column]
        fixed, left = order[: step + 1], order[step + 1 :]
        if left:
            pull = gram[np.ix_(left, fixed)] @ (stored[fixed] - row[fixed])
            stored[left] = row[left] - np.linalg.solve(gram[np.ix_(left, left)], pull)
    return codes


def best_code(
    row: np.ndarray,
    codes: np.ndarray,
    gram: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    column: int,
    levels: range,
) -> int:
    """The code of ``column`` with the smallest error beside all other codes, by trying every level."""
    losses = []
    for level in levels:
        tried = codes.copy()
        tried[column] = level
        losses.append(error(row, tried, gram, scales, zeros))
    return levels[int(np.argmin(losses))]


def error(row: np.ndarray, codes: np.ndarray, gram: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> float:
    """d G d^T of one output channel."""
    difference = (codes - zeros) * scales - row
    return float(difference @ gram @ difference)
