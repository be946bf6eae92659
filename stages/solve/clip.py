"""Ranges by output error: AWQ's weight clipping, with each block's scale refitted.

In the scaled space of an input scale s the Gram matrix is that of x / s.
"""

from __future__ import annotations

from torch import Tensor

from stages.records import QuantSpec
from stages.solve.accept import first_accepted
from stages.solve.affine import BlockParameters
from stages.solve.evaluate import errors_of, full_ranges, measured, scaled_weight
from stages.solve.objective import gram_blocks, in_scaled_space
from stages.solve.problem import IDENTITY, GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.solve.ranges import site_ranges


def awq_clip(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The best ranges for every site, without an input scale."""
    unclipped = full_ranges(problem, options.range_rule, IDENTITY)
    return first_accepted(problem, options, [clip_sites(problem, options, unclipped)])


def clip_sites(
    problem: GroupProblem, options: SearchOptions, unclipped: tuple[SiteChoice, ...]
) -> tuple[SiteChoice, ...]:
    """``unclipped`` with every site's best ranges, or as it is at a site whose error gets no smaller.

    Blocks are searched one by one; the error of whole rows decides whether their ranges are taken.
    """
    unclipped = measured(problem, unclipped)
    clipped = measured(problem, search_sites(problem, options, unclipped))
    return tuple(
        choice if errors_of(choice).calibration <= errors_of(plain).calibration else plain
        for choice, plain in zip(clipped, unclipped, strict=True)
    )


def search_sites(
    problem: GroupProblem, options: SearchOptions, unclipped: tuple[SiteChoice, ...]
) -> tuple[SiteChoice, ...]:
    """``unclipped`` with the best ranges of every block by itself."""
    return tuple(
        choice.refined(_site_ranges(problem, options, weight, spec, choice.input_scale))
        for weight, spec, choice in zip(problem.weights, problem.specs, unclipped, strict=True)
    )


def _site_ranges(
    problem: GroupProblem, options: SearchOptions, weight: Tensor, spec: QuantSpec, scale: InputScale
) -> BlockParameters:
    assert problem.stats is not None
    stats = problem.stats.calibration
    weight = scaled_weight(weight, scale)
    if scale.scale is not None:
        stats = in_scaled_space(stats, scale.scale)
    blocks = gram_blocks(stats, spec.block_size(weight.shape[1]))
    return site_ranges(weight, spec, blocks, options)
