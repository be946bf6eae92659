"""Input scale and clip ratios together: clipping is searched in the space of the scale that it goes with."""

from __future__ import annotations

from stages.solve.accept import first_accepted
from stages.solve.awq import rank_input_scales, unclipped
from stages.solve.clip import clip_sites
from stages.solve.problem import GroupProblem, SearchOptions, SiteChoice

_SHORTLIST = 4
"""Input scales that are clipped before one is chosen: clipping can reorder the best few."""


def awq_full(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The best of the few best input scales and the identity, each with its own clip ratios."""
    *scales, identity = rank_input_scales(problem, options)
    shortlist = (unclipped(problem, options, ranked) for ranked in (*scales[:_SHORTLIST], identity))
    trials = [clip_sites(problem, options, trial) for trial in shortlist]
    return first_accepted(problem, options, sorted(trials, key=lambda trial: trial.error))
