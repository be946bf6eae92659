"""GPTQ: the rounding error of each column is compensated in the columns that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
https://arxiv.org/abs/2210.17323, in the form that Chee et al., "QuIP: 2-Bit Quantization of Large Language Models With
Guarantees", 2023, https://arxiv.org/abs/2307.13304, theorem 6, show to be the same: it needs a factor of the Gram
matrix in place of one of its inverse. Scales are fixed before (static groups), so that the order of columns is free and
the layout stays plain. ``gptq`` starts from ``awq_clip``'s ranges, ``awq_gptq`` from ``awq_full``'s input scale and
ranges; coordinate descent goes on from the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.quantization.search.gptq.columns import ColumnParameters, ColumnSteps
from stages.quantization.search.gptq.factor import GramFactor
from stages.quantization.search.objective import columns_at_once
from stages.records.formats import QuantSpec

_STEP = 16
"""Columns whose errors reach those behind them in the same tile in one product."""


def gptq_codes(
    weights: Float[Tensor, "E K N"], ranges: ColumnParameters, spec: QuantSpec, factors: Sequence[GramFactor]
) -> Float[Tensor, "E K N"]:
    """Choose codes, integers in float32, column by column in the order of each factor, of E matrices at once.

    q_k = Q(t_k), where t_k = w_k + sum of U_jk (w_j - q_j) over the columns j before it.

    Args:
        weights: the weights, times their input scales; a column is a row here.
        ranges: their scales and zero points.
        spec: the format that they are stored in.
        factors: U of each, and the order of its columns.
    """
    problems, in_features, rows = weights.shape
    steps = ColumnSteps(min(_STEP, in_features), weights, spec, one_scale=False)
    upper = together([each.upper for each in factors])
    orders = [each.order for each in factors]
    errors, codes = torch.empty_like(weights), torch.empty_like(weights)
    width = min(columns_at_once(in_features), in_features)
    columns, wanted, scales = weights.new_empty(3, problems, width, rows)
    for start in range(0, in_features, width):
        stop = min(start + width, in_features)
        for index, order in enumerate(orders):
            part = columns[index, : stop - start]
            _gather(part, scales[index, : stop - start], weights[index], ranges, index, order[start:stop], spec)
            reach = upper[index, :start, start:stop].T
            torch.addmm(part, reach, errors[index, :start], out=wanted[index, : stop - start])
        for first in range(start, stop, _STEP):
            last = min(first + _STEP, stop)
            here, count = slice(first - start, last - start), last - first
            if first > start:
                for index, each in enumerate(upper):
                    wanted[index, here].addmm_(each[start:first, first:last].T, errors[index, start:first])
            steps.pulls[:count, :count] = upper[:, first:last, first:last].permute(1, 2, 0).unsqueeze(-1)
            steps.wanted[:count] = wanted[:, here].transpose(0, 1)
            steps.base[:count] = columns[:, here].transpose(0, 1)
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
