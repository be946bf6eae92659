"""Slow, obvious float64 rounding of one block at a time, straight from ONNX DequantizeLinear's definition."""

from __future__ import annotations

import numpy as np


def stored(scale: float, scale_type: type[np.floating]) -> float:
    info = np.finfo(scale_type)
    return float(scale_type(min(max(scale, float(info.tiny)), float(info.max))))


def symmetric_scale(block: np.ndarray, bits: int, rule: str, ratio: float, scale_type: type[np.floating]) -> float:
    top = 2 ** (bits - 1)
    if rule == "signed":  # of both signs the one that gives the finer steps
        down, up = (symmetric_scale(side, bits, "full", ratio, scale_type) for side in (block, -block))
        return -up if bits == 4 and up < down else down
    extent = max(-block.min() / top, block.max() / (top - 1)) if rule == "full" else np.abs(block).max() / (top - 1)
    return stored(extent * ratio, scale_type) if extent * ratio > 0 else 1.0


def asymmetric_parameters(
    block: np.ndarray, bits: int, ratio: float, scale_type: type[np.floating]
) -> tuple[float, int]:
    low, high = min(block.min(), 0.0) * ratio, max(block.max(), 0.0) * ratio
    extent = (high - low) / (2**bits - 1)
    scale = stored(extent, scale_type) if extent > 0 else 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, 2**bits - 1))


def round_trip_row(
    row: np.ndarray,
    block_size: int,
    bits: int,
    *,
    symmetric: bool,
    rule: str = "full",
    ratios: np.ndarray | None = None,
    scale_type: type[np.floating] = np.float32,
) -> np.ndarray:
    """The dequantized row, block after block."""
    result = np.zeros_like(row, dtype=np.float64)
    for index, start in enumerate(range(0, len(row), block_size)):
        block = row[start : start + block_size].astype(np.float64)
        ratio = 1.0 if ratios is None else float(ratios[index])
        if symmetric:
            scale = symmetric_scale(block, bits, rule, ratio, scale_type)
            codes = np.clip(np.rint(block / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            result[start : start + block_size] = codes * scale
        else:
            scale, zero = asymmetric_parameters(block, bits, ratio, scale_type)
            codes = np.clip(np.rint(block / scale) + zero, 0, 2**bits - 1)
            result[start : start + block_size] = (codes - zero) * scale
    return result


def round_trip(weight: np.ndarray, block_size: int, bits: int, **options: object) -> np.ndarray:
    """Row by row; ``ratios`` may be [N, nB]."""
    ratios = options.pop("ratios", None)
    return np.stack(
        [
            round_trip_row(row, block_size, bits, ratios=None if ratios is None else ratios[n], **options)
            for n, row in enumerate(weight)
        ]
    )


def compat7_codes(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return INT4 codes [K, N] and scales [K / B, N] as ModelOpt has them, computed in the weight's own type.

    Args:
        weight: [K, N], in blocks along K.
        block_size: Numbers that share a scale.
    """
    largest = np.abs(weight.reshape(-1, block_size, weight.shape[1])).max(axis=1)
    scales = np.maximum(largest / weight.dtype.type(7), weight.dtype.type(1e-5))
    return np.clip(np.rint(weight / np.repeat(scales, block_size, axis=0)), -8, 7), scales
