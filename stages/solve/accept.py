"""The held-out tokens' veto: a choice that fits the calibration text but not other text is not taken."""

from __future__ import annotations

from collections.abc import Iterable

from stages.solve.evaluate import site_errors
from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice, Trial


def first_accepted(problem: GroupProblem, options: SearchOptions, ranked: Iterable[Trial]) -> tuple[SiteChoice, ...]:
    """The first of ``ranked`` (best calibration error first) that is no worse than plain rounding on held-out tokens.

    Clip ratios that held-out tokens speak against are dropped first. Plain rounding is the answer where none passes.
    """
    plain = (SiteChoice(input_scale=IDENTITY),) * len(problem.weights)
    limit = sum(_held_out(problem, options, plain))
    for trial in ranked:
        choices, errors = _without_vetoed_clips(problem, options, trial.choices)
        if sum(errors) <= limit:
            return choices
    return plain


def _held_out(problem: GroupProblem, options: SearchOptions, choices: tuple[SiteChoice, ...]) -> tuple[float, ...]:
    assert problem.stats is not None
    return site_errors(problem, choices, options.range_rule, problem.stats.held_out)


def _without_vetoed_clips(
    problem: GroupProblem, options: SearchOptions, choices: tuple[SiteChoice, ...]
) -> tuple[tuple[SiteChoice, ...], tuple[float, ...]]:
    """The choices, unclipped at each site where that is better on held-out tokens, and their held-out errors."""
    errors = _held_out(problem, options, choices)
    if all(choice.clip_ratios is None for choice in choices):
        return choices, errors
    unclipped = tuple(SiteChoice(input_scale=choice.input_scale) for choice in choices)
    pairs = zip(choices, errors, unclipped, _held_out(problem, options, unclipped), strict=True)
    best = [(choice, error) if error <= other else (plain, other) for choice, error, plain, other in pairs]
    return tuple(choice for choice, _ in best), tuple(error for _, error in best)
