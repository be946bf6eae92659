"""The held-out tokens' veto: a choice that fits the calibration text but not other text is not taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from stages.solve.evaluate import errors_of, measured, total_errors
from stages.solve.problem import GroupProblem, SearchOptions, SiteChoice
from stages.solve.rtn import rtn


def first_accepted(
    problem: GroupProblem, options: SearchOptions, ranked: Iterable[tuple[SiteChoice, ...]]
) -> tuple[SiteChoice, ...]:
    """The first of ``ranked`` (best first) that is no worse than plain rounding, on calibration and held-out tokens.

    Refinements that held-out tokens speak against are undone first. Plain rounding is the answer where none passes.
    """
    plain = measured(problem, rtn(problem, options))
    limits = total_errors(plain)
    for candidate in ranked:
        choices = settle(problem, candidate)
        errors = total_errors(choices)
        if errors.held_out <= limits.held_out and errors.calibration <= limits.calibration:
            return choices
    return plain


def settle(problem: GroupProblem, choices: tuple[SiteChoice, ...]) -> tuple[SiteChoice, ...]:
    """Every site's choice, or the fallback that does better on held-out tokens; all are measured.

    What is returned has no fallback any more: the question is decided, and its tensors can be freed.
    """
    return tuple(_settled(choice) for choice in measured(problem, choices))


def _settled(choice: SiteChoice) -> SiteChoice:
    if choice.fallback is None:
        return choice
    other = _settled(choice.fallback)
    return replace(choice, fallback=None) if errors_of(choice).held_out <= errors_of(other).held_out else other
