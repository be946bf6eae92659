"""The held-out tokens' veto: a choice that fits the calibration text but not other text is not taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from stages.records import QuantSpec, TokenStats
from stages.solve.evaluate import full_ranges, site_error, site_errors
from stages.solve.problem import IDENTITY, GroupProblem, SearchOptions, SiteChoice


def first_accepted(
    problem: GroupProblem, options: SearchOptions, ranked: Iterable[tuple[SiteChoice, ...]]
) -> tuple[SiteChoice, ...]:
    """The first of ``ranked`` (best first) that is no worse than plain rounding, on calibration and held-out tokens.

    Refinements that held-out tokens speak against are undone first. Plain rounding is the answer where none passes.
    """
    assert problem.stats is not None
    calibration, held_out = problem.stats.calibration, problem.stats.held_out
    plain = full_ranges(problem, options.range_rule, IDENTITY)
    limits = [sum(site_errors(problem, plain, stats)) for stats in (calibration, held_out)]
    for candidate in ranked:
        choices, error = settle(problem, candidate)
        if error <= limits[1] and sum(site_errors(problem, choices, calibration)) <= limits[0]:
            return choices
    return plain


def settle(problem: GroupProblem, choices: tuple[SiteChoice, ...]) -> tuple[tuple[SiteChoice, ...], float]:
    """Every site's choice, or the fallback that does better on held-out tokens, and their joint held-out error.

    What is returned has no fallback any more: the question is decided, and its tensors can be freed.
    """
    assert problem.stats is not None
    settled = [
        _settle_site(weight, spec, choice, problem.stats.held_out)
        for weight, spec, choice in zip(problem.weights, problem.specs, choices, strict=True)
    ]
    return tuple(choice for choice, _ in settled), sum(error for _, error in settled)


def _settle_site(weight: Tensor, spec: QuantSpec, choice: SiteChoice, held_out: TokenStats) -> tuple[SiteChoice, float]:
    error = site_error(weight, spec, choice, held_out)
    if choice.fallback is None:
        return choice, error
    other, other_error = _settle_site(weight, spec, choice.fallback, held_out)
    return (replace(choice, fallback=None), error) if error <= other_error else (other, other_error)
