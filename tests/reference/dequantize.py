"""Slow, obvious float64 DequantizeLinear of one weight, element by element, from ONNX's definition."""

from __future__ import annotations

import numpy as np


def dequantize(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, block_size: int) -> np.ndarray:
    """[N, K] codes, [N, nB] scales and zero points -> [N, K] float64: (code - zero_point) * scale."""
    rows, columns = codes.shape
    result = np.zeros((rows, columns))
    for n in range(rows):
        for k in range(columns):
            block = k // block_size
            zero = 0 if zero_points is None else int(zero_points[n, block])
            result[n, k] = (int(codes[n, k]) - zero) * float(scales[n, block])
    return result
