"""Rounding to nearest: every block keeps its full range. Needs no statistics."""

from __future__ import annotations

from stages.solve.evaluate import full_ranges
from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice


def rtn(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Plain rounding for every site."""
    return problem.plain or full_ranges(problem, options.range_rule, IDENTITY)
