"""Ranges by the weights' own squared error. Needs no statistics."""

from __future__ import annotations

import torch

from stages.solve.clip import stacked
from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice
from stages.solve.ranges import clip_ratio_grid, search_ranges


def mse(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The range of every block with the smallest squared weight error."""
    ratios = clip_ratio_grid(options.clip_min, options.clip_step)
    return tuple(
        SiteChoice(
            input_scale=IDENTITY,
            parameters=stacked(
                [
                    search_ranges(rows, spec, options.range_rule, None, ratios)
                    for rows in torch.split(weight, options.column_chunk)
                ]
            ),
        )
        for weight, spec in zip(problem.weights, problem.specs, strict=True)
    )
