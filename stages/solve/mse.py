"""Ranges by the weights' own squared error. Needs no statistics."""

from __future__ import annotations

from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice
from stages.solve.ranges import site_ranges


def mse(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The range of every block with the smallest squared weight error."""
    return tuple(
        SiteChoice(input_scale=IDENTITY, parameters=site_ranges(weight, spec, None, options))
        for weight, spec in zip(problem.weights, problem.specs, strict=True)
    )
