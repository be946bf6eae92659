"""Rounding to nearest: every block keeps its full range. Needs no statistics."""

from __future__ import annotations

from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice


def rtn(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:  # noqa: ARG001 - Algorithm's shape
    """Plain rounding for every site."""
    return (SiteChoice(input_scale=IDENTITY),) * len(problem.weights)
