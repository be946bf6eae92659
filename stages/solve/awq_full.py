"""Input scale and ranges together: ranges are searched in the space of the scale that they go with."""

from __future__ import annotations

from stages.solve.accept import first_accepted
from stages.solve.awq import glance_at_input_scales
from stages.solve.clip import clip_sites, search_sites
from stages.solve.evaluate import full_ranges, site_errors
from stages.solve.problem import GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.solve.sample import LOOK, Sample

_SHORTLIST = 5
"""Input scales that are clipped before one is chosen: clipping can reorder the best few."""


def awq_full(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The best of the few best input scales and the identity, each with its own ranges."""
    *scales, identity = glance_at_input_scales(problem, options)
    sample = Sample(problem, LOOK)
    ranked = sorted((*scales[:_SHORTLIST], identity), key=lambda scale: _clipped_error(sample, options, scale))
    return first_accepted(problem, options, (_clipped(problem, options, scale) for scale in ranked))


def _clipped(problem: GroupProblem, options: SearchOptions, scale: InputScale) -> tuple[SiteChoice, ...]:
    """The best ranges of all sites under a given input scale."""
    return clip_sites(problem, options, full_ranges(problem, options.range_rule, scale))


def _clipped_error(sample: Sample, options: SearchOptions, scale: InputScale) -> float:
    """The joint error with ranges searched, measured on a sample of the channels."""
    few = sample.problem
    assert few.stats is not None
    searched = search_sites(few, options, full_ranges(few, options.range_rule, scale))
    return sample.joint_error(site_errors(few, searched, few.stats.calibration))
