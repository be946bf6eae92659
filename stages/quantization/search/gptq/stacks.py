"""Put sites of one format together, and cut large ones: what is solved as one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.quantization.search.problem import GroupProblem
from stages.quantization.weights.bitpack import slices

_STACKED_ON_CPU, _STACKED_ON_ACCELERATOR = 1 << 24, 1 << 27
"""Numbers of the weights that are solved as one matrix: some ten copies of it are in memory. Of larger sites, some
output channels are solved after others."""

_ROWS = 64
"""Output channels that are solved at once are a multiple of it, so that products run in the same kernels."""


def numbers_at_once(device: torch.device) -> int:
    """Return how many weights are solved as one matrix on ``device``."""
    return _STACKED_ON_CPU if device.type == "cpu" else _STACKED_ON_ACCELERATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some output channels of one site of a group."""

    index: int
    rows: slice


def make_stacks(problem: GroupProblem, problems: int) -> list[list[Rows]]:
    """Put sites of one format together: a pass over the columns of many rows takes as long as over those of few."""
    limit = numbers_at_once(problem.weights[0].device) // problems
    stacks: list[list[Rows]] = []
    sizes: list[int] = []
    for index, weight in enumerate(problem.weights):
        for rows in slices(len(weight), _rows_at_once(weight.shape[1], limit)):
            size = weight[rows].numel()
            for place, stack in enumerate(stacks):
                if problem.specs[stack[0].index] == problem.specs[index] and sizes[place] + size <= limit:
                    stack.append(Rows(index=index, rows=rows))
                    sizes[place] += size
                    break
            else:
                stacks.append([Rows(index=index, rows=rows)])
                sizes.append(size)
    return stacks


def _rows_at_once(width: int, limit: int) -> int:
    rows = max(limit // width, 1)
    return rows // _ROWS * _ROWS or rows
