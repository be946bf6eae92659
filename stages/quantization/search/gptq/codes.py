"""GPTQ: the rounding error of each column is compensated in the columns that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
https://arxiv.org/abs/2210.17323. Scales are fixed before (static groups), so that the order of columns is free and the
layout stays plain. ``gptq`` starts from ``awq_clip``'s ranges, ``awq_gptq`` from ``awq_full``'s input scale and ranges;
coordinate descent goes on from the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.quantization.search.gptq.columns import ColumnParameters, ColumnSteps
from stages.quantization.search.gptq.inverse import InverseCholesky
from stages.records.formats import QuantSpec

_TILE, _STEP = 128, 16
"""Columns whose errors reach all columns behind them in one product, and those behind them in the tile."""


def gptq_codes(
    weights: Float[Tensor, "E K N"], ranges: ColumnParameters, spec: QuantSpec, inverses: Sequence[InverseCholesky]
) -> Float[Tensor, "E K N"]:
    """Choose codes, integers in float32, column by column in the order of each inverse, of E matrices at once.

    q_k = Q(w_k), e = w_k - q_k, and w_j -= U_kj / U_kk e for the columns j that follow.

    Args:
        weights: the weights, times their input scales; a column is a row here.
        ranges: their scales and zero points.
        spec: the format that they are stored in.
        inverses: U of each, and the order of its columns.
    """
    problems, in_features, rows = weights.shape
    steps = ColumnSteps(min(_STEP, in_features), weights, spec, descends=False)
    reach = together([-each.upper / torch.diagonal(each.upper).unsqueeze(1) for each in inverses])
    orders = [each.order for each in inverses]
    errors, codes = torch.empty_like(weights), torch.empty_like(weights)
    tile, scales = weights.new_empty(2, problems, min(_TILE, in_features), rows)
    for start in range(0, in_features, _TILE):
        stop = min(start + _TILE, in_features)
        for index, order in enumerate(orders):
            part = tile[index, : stop - start]
            _gather(part, scales[index, : stop - start], weights[index], ranges, index, order[start:stop], spec)
            part.addmm_(reach[index][:start, start:stop].T, errors[index, :start])
        for first in range(start, stop, _STEP):
            last = min(first + _STEP, stop)
            here, count = slice(first - start, last - start), last - first
            if first > start:
                for index, each in enumerate(reach):
                    tile[index, here].addmm_(each[start:first, first:last].T, errors[index, start:first])
            steps.pulls[:count, :count] = reach[:, first:last, first:last].permute(1, 2, 0).unsqueeze(-1)
            steps.wanted[:count] = tile[:, here].transpose(0, 1)
            steps.scales[:count] = scales[:, here].transpose(0, 1)
            steps.run(count)
            errors[:, first:last] = steps.changes[:count].transpose(0, 1)
            codes[:, first:last] = steps.codes[:count].transpose(0, 1)
    for index, order in enumerate(orders):
        torch.index_select(codes[index], 0, torch.argsort(order), out=errors[index])
    return errors


def _gather(
    columns: Float[Tensor, "k N"],
    scales: Float[Tensor, "k N"],
    weight: Float[Tensor, "K N"],
    ranges: ColumnParameters,
    index: int,
    order: Int64[Tensor, " k"],
    spec: QuantSpec,
) -> None:
    """Fill ``columns``, counted from code 0 as codes are, and their ``scales``, in ``order``."""
    blocks = order // spec.block_size(len(weight))
    torch.index_select(weight, 0, order, out=columns)
    torch.index_select(ranges.scales[index], 0, blocks, out=scales)
    if ranges.zero_points is not None:
        columns.addcmul_(ranges.zero_points[index].index_select(0, blocks), scales)


def together(matrices: Sequence[Float[Tensor, "K K"]]) -> Float[Tensor, "E K K"]:
    """Return the matrices as one tensor, without a copy where there is one."""
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(list(matrices))
