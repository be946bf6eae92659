"""Find what a quantizer multiplied a weight's columns and rows with before it rounded them (AWQ and its kin).

V, the checkpoint's weight, is near diag(r) W diag(s). The scales s of what a norm feeds stand in the checkpoint's own
norm, whose gain is the base's divided by s (AWQ, Lin et al. 2023, section 3.2): those are exact. Between two layers, s
of the second is undone by r of the first, and both are in the codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

_SPREAD = 0.1
"""Standard deviation of the logarithms of scales, from which on they are no rounding errors."""
_SAME_GAIN = 2.0**-7
"""Between two norms' gains, relative: one was rounded to bfloat16."""
_TINY = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPair:
    """A weight as the base has it and as the checkpoint's codes stand for it."""

    base: Float32[Tensor, "N K"]
    stored: Float32[Tensor, "N K"]


def column_scales(pairs: Sequence[WeightPair], *, by_direction: bool) -> Float32[Tensor, " K"]:
    """Return s of weights that read one input, by least squares; 1 where all of a column is 0.

    Args:
        pairs: the weights.
        by_direction: let every row have a scale of its own, so that s is known but for one factor.
    """
    numerator, denominator = torch.zeros(pairs[0].base.shape[1]), torch.zeros(pairs[0].base.shape[1])
    for pair in pairs:
        stored = pair.stored
        if by_direction:
            stored = stored * (pair.base.norm(dim=1) / stored.norm(dim=1).clamp_min(_TINY))[:, None]
        numerator += (pair.base * stored).sum(dim=0)
        denominator += pair.base.square().sum(dim=0)
    return torch.where(denominator > 0, numerator / denominator.clamp_min(_TINY**2), 1.0)


def row_scales(pair: WeightPair, columns: Float32[Tensor, " K"]) -> Float32[Tensor, " N"]:
    """Return r by least squares, given s; 1 where all of a row is 0."""
    scaled = pair.base * columns
    square = scaled.square().sum(dim=1)
    return torch.where(square > 0, (scaled * pair.stored).sum(dim=1) / square.clamp_min(_TINY**2), 1.0)


def relative_error(pair: WeightPair, rows: Float32[Tensor, " N"], columns: Float32[Tensor, " K"]) -> float:
    """Return |V - diag(r) W diag(s)| / |V|."""
    expected = rows[:, None] * pair.base * columns
    return float((pair.stored - expected).norm() / pair.stored.norm().clamp_min(_TINY))


def differ(scales: Float32[Tensor, " channels"]) -> bool:
    """Return whether scales differ by more than rounding does."""
    return _spread(scales.clamp_min(_TINY).log()) > _SPREAD


def scale_of_norm(
    gain: Float32[Tensor, " K"], vectors: Iterable[Float32[Tensor, " K"]], columns: Float32[Tensor, " K"]
) -> Float32[Tensor, " K"] | None:
    """Return s as the checkpoint's norm has it: the base's gain over the checkpoint's; None where none fits.

    Some models add 1 to a stored gain; the base's graph has the sum.

    Args:
        gain: of the base's norm.
        vectors: of the checkpoint's layer, its norms' gains among them.
        columns: s but for a factor, as the weights tell it.
    """
    ratios = [ratio for vector in vectors for stored in (vector, vector + 1) if _is_scale(ratio := gain / stored)]
    if not differ(columns) and any(bool(((ratio - 1).abs() < _SAME_GAIN).all()) for ratio in ratios):
        return torch.ones_like(columns)
    distances = [_spread((ratio / columns.clamp_min(_TINY)).log()) for ratio in ratios]
    return ratios[distances.index(min(distances))] if distances and min(distances) <= _SPREAD else None


def _is_scale(ratio: Tensor) -> bool:
    return bool((ratio.isfinite() & (ratio > 0)).all())


def _spread(logarithms: Tensor) -> float:
    return float(logarithms.std(correction=0))
