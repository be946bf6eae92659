"""AWQ's scale and ranges first, then GPTQ in the scaled space."""

from __future__ import annotations

from stages.solve.awq_full import awq_full
from stages.solve.gptq import compensate
from stages.solve.problem import GroupProblem, SearchOptions, SiteChoice


def awq_gptq(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """``awq_full``'s input scale and ranges, with codes that make up for each other's errors."""
    return compensate(problem, options, awq_full(problem, options))
