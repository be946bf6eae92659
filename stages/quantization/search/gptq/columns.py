"""Choose the codes of a few columns, one after another: the inner step of GPTQ and of coordinate descent.

A column's codes are those nearest to what it should be by then, t; what rounding changes moves the columns behind it.
In small matrices an operation takes longer to begin than to do, and so does making a view. So several matrices of one
shape go through it at once, and all views are made once, over a place that the columns are copied to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import BlockParameters
from stages.records.formats import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnParameters:
    """Scales and zero points of E matrices, a block's of all rows side by side; None means zero point 0."""

    scales: Float[Tensor, "E nB N"]
    zero_points: Float[Tensor, "E nB N"] | None

    @classmethod
    def of(cls, matrices: Sequence[BlockParameters]) -> ColumnParameters:
        """Return a copy of the parameters of some matrices of one shape."""
        zero_points = [each.zero_points for each in matrices if each.zero_points is not None]
        return cls(
            scales=columns_of([each.scales for each in matrices]),
            zero_points=columns_of(zero_points) if zero_points else None,
        )

    def matrix(self, index: int) -> BlockParameters:
        """Return the parameters of one matrix: views."""
        zero_points = self.zero_points
        return BlockParameters(
            scales=self.scales[index].T, zero_points=None if zero_points is None else zero_points[index].T
        )


def columns_of(matrices: Sequence[Float[Tensor, "N K"]]) -> Float[Tensor, "E K N"]:
    """Return a copy of some matrices in which a column is a row."""
    first = matrices[0]
    columns = first.new_empty(len(matrices), first.shape[1], first.shape[0])
    for place, matrix in zip(columns, matrices, strict=True):
        place.copy_(matrix.T)
    return columns


class ColumnSteps:
    """A place for at most S columns of E matrices with N rows each; ``run`` fills ``codes`` and ``changes``.

    For each column k in turn: code = clamp(round(t_k / scale_k)), change_k = base_k - code * scale_k, and
    t_j += pull_kj change_k for the columns j behind it. Whoever uses it fills the other tensors before.
    """

    wanted: Float[Tensor, "S E N"]
    """t: what the weights should be, counted from code 0."""
    base: Float[Tensor, "S E N"]
    """What changes are counted from: the weights that stand there now, from code 0 too."""
    scales: Float[Tensor, "S E N"]
    codes: Float[Tensor, "S E N"]
    changes: Float[Tensor, "S E N"]
    pulls: Float[Tensor, "S S E 1"]

    def __init__(self, columns: int, like: Float[Tensor, "E K N"], spec: QuantSpec, *, one_scale: bool) -> None:
        """Make the place.

        Args:
            columns: S.
            like: the matrices, for their number, rows and device.
            spec: the format that they are stored in.
            one_scale: whether the columns of a place share their scales, those of the first.
        """
        problems, _, rows = like.shape
        # Zeros: where fewer columns are filled, those behind them are moved too, and must stay finite.
        made = like.new_zeros(5, columns, problems, rows)
        self.wanted, self.codes, self.changes, self.base = made[0], made[1], made[2], made[3]
        self.scales = made[4, :1].expand(columns, -1, -1) if one_scale else made[4]
        self.pulls = like.new_zeros(columns, columns, problems, 1)
        self.spec = spec
        behind = [(self.wanted[column + 1 :], self.pulls[column, column + 1 :]) for column in range(columns)]
        each = (self.wanted, self.base, self.scales, self.codes, self.changes)
        self._views = list(zip(*(values.unbind() for values in each), behind, strict=True))

    def run(self, count: int) -> None:
        """Choose the codes of the first ``count`` columns."""
        least, most = self.spec.code_min, self.spec.code_max
        for wanted, base, scale, code, change, (behind, pulls) in self._views[:count]:
            torch.div(wanted, scale, out=code).round_().clamp_(least, most)
            torch.addcmul(base, code, scale, value=-1, out=change)
            behind.addcmul_(pulls, change)
