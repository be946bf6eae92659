"""The held-out tokens' veto: a choice that fits the calibration text but not other text is not taken."""

from __future__ import annotations

from stages.solve.evaluate import group_error
from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice


def first_accepted(
    problem: GroupProblem, options: SearchOptions, ranked: list[tuple[SiteChoice, ...]]
) -> tuple[SiteChoice, ...]:
    """The first of ``ranked`` (best calibration error first) that is no worse than plain rounding on held-out tokens.

    Plain rounding accepts itself, so there always is one if it is in the list; else it is the answer.
    """
    assert problem.stats is not None
    plain = (SiteChoice(input_scale=IDENTITY),) * len(problem.weights)
    limit = group_error(problem, plain, options.range_rule, problem.stats.held_out)
    for choices in ranked:
        if group_error(problem, choices, options.range_rule, problem.stats.held_out) <= limit:
            return choices
    return plain
