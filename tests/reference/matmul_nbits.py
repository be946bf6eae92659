"""Slow, obvious float64 weight of com.microsoft MatMulNBits, byte by byte, from the operator's documentation."""

from __future__ import annotations

import numpy as np


def dequantize_nbits(
    packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int, block_size: int
) -> np.ndarray:
    """[N, nB, bytes], [N, nB] and [N, bytes] -> [N, nB * block_size] float64, what fills the last block up included."""
    rows, blocks, _ = packed.shape
    result = np.zeros((rows, blocks * block_size))
    for n in range(rows):
        for block in range(blocks):
            zero = 2 ** (bits - 1) if zero_points is None else _number(zero_points[n], block, bits)
            for i in range(block_size):
                code = _number(packed[n, block], i, bits)
                result[n, block * block_size + i] = (code - zero) * float(scales[n, block])
    return result


def _number(row: np.ndarray, index: int, bits: int) -> int:
    """The index-th number of ``bits`` bits in a row of bytes, the lowest bits first."""
    byte = int(row[index * bits // 8])
    return (byte >> (index * bits % 8)) & (2**bits - 1)
