"""Clip ratios: shrink the range of a block where its output error gets smaller (AWQ's weight clipping).

The error of block b of output channel n is d^T G_bb d, with G_bb the block's piece of the Gram matrix: exactly the
mean squared output error that the block causes by itself, over all tokens. In the scaled space of an input scale s the
Gram matrix is that of x / s.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.records import QuantSpec
from stages.solve.accept import first_accepted
from stages.solve.affine import RangeRule, choose_parameters, round_trip
from stages.solve.blocks import split
from stages.solve.evaluate import site_errors
from stages.solve.objective import block_error, gram_blocks, in_scaled_space
from stages.solve.problem import IDENTITY, GroupProblem, InputScale, SearchOptions, SiteChoice, Trial


def awq_clip(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Clip ratios for every site, without an input scale."""
    assert problem.stats is not None
    choices = (SiteChoice(input_scale=IDENTITY),) * len(problem.weights)
    errors = site_errors(problem, choices, options.range_rule, problem.stats.calibration)
    return first_accepted(problem, options, [clip_sites(problem, options, Trial(choices=choices, errors=errors))])


def clip_sites(problem: GroupProblem, options: SearchOptions, unclipped: Trial) -> Trial:
    """The trial with every site's best clip ratios, or none at a site whose error gets no smaller.

    Blocks are searched one by one; the error of whole rows decides whether their ratios are taken.
    """
    assert problem.stats is not None
    stats = problem.stats.calibration
    clipped = tuple(
        SiteChoice(
            input_scale=choice.input_scale,
            clip_ratios=_site_ratios(problem, options, weight, spec, choice.input_scale),
        )
        for weight, spec, choice in zip(problem.weights, problem.specs, unclipped.choices, strict=True)
    )
    errors = site_errors(problem, clipped, options.range_rule, stats)
    pairs = zip(clipped, errors, unclipped.choices, unclipped.errors, strict=True)
    best = [(choice, error) if error <= other else (plain, other) for choice, error, plain, other in pairs]
    return Trial(choices=tuple(choice for choice, _ in best), errors=tuple(error for _, error in best))


def _site_ratios(
    problem: GroupProblem, options: SearchOptions, weight: Tensor, spec: QuantSpec, scale: InputScale
) -> Tensor:
    assert problem.stats is not None
    stats = problem.stats.calibration
    if scale.scale is not None:
        weight, stats = weight * scale.scale, in_scaled_space(stats, scale.scale)
    blocks = gram_blocks(stats, spec.block_size(weight.shape[1]))
    ratios = clip_ratio_grid(options.clip_min, options.clip_step)
    return torch.cat(
        [
            search_clip_ratios(rows, spec, options.range_rule, blocks, ratios)
            for rows in torch.split(weight, options.column_chunk)
        ]
    )


def clip_ratio_grid(smallest: float, step: float) -> list[float]:
    """1, 1 - step, ... down to ``smallest``."""
    count = int((1 - smallest) / step + 1e-9)
    return [1 - index * step for index in range(count + 1)]


def search_clip_ratios(
    weight: Float[Tensor, "N K"],
    spec: QuantSpec,
    rule: RangeRule,
    gram: Float[Tensor, "nB B B"],
    ratios: list[float],
) -> Float[Tensor, "N nB"]:
    """For every block of every output channel the ratio with the smallest error; the first of equals wins."""
    blocks = split(weight, gram.shape[-1])
    best_error: Tensor | None = None
    best_ratio = torch.full(blocks.shape[:-1], ratios[0], device=weight.device)
    for ratio in ratios:
        stored = round_trip(blocks, choose_parameters(blocks, spec, rule, ratio), spec)
        error = block_error((stored - blocks).transpose(0, 1), gram).T
        if best_error is None:
            best_error = error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_ratio = torch.where(better, torch.full_like(best_ratio, ratio), best_ratio)
    return best_ratio
