"""Range search: for every block a grid of clip ratios, then a least-squares refit of scale and zero point.

The error of block b of output channel n is d^T G_bb d, with G_bb the block's part of the Gram matrix: exactly the mean
squared output error that the block causes by itself, over all tokens (AWQ's weight clipping, Lin et al., 2023,
https://arxiv.org/abs/2306.00978; the refit after llama.cpp's make_qx_quants, which has only diag(G) in G's place).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import (
    BlockParameters,
    RangeRule,
    block_range,
    choose_parameters,
    levels,
    quantize,
    range_parameters,
    round_to_storage,
    round_trip,
    split,
    stack_parameters,
)
from stages.quantization.search.choices import errors_of, first_validated, full_ranges, measured, scaled_weight
from stages.quantization.search.objective import block_error, gram_blocks, in_scaled_space
from stages.quantization.search.problem import IDENTITY, GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.records.formats import QuantSpec

_REFITS = 3
"""Refits of scale and codes in turn; each is kept only where it helps, and the fourth hardly ever does."""


def awq_clip(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Choose the best ranges for every site, without an input scale."""
    unclipped = full_ranges(problem, options.range_rule, IDENTITY)
    return first_validated(problem, options, [clip_sites(problem, options, unclipped)])


def clip_sites(
    problem: GroupProblem, options: SearchOptions, unclipped: tuple[SiteChoice, ...]
) -> tuple[SiteChoice, ...]:
    """Return ``unclipped`` with every site's best ranges, or unchanged at a site whose error gets no smaller.

    Blocks are searched one by one; the error of the whole site decides whether their ranges are taken.

    Args:
        problem: the group, with statistics.
        options: clip ratios, and the rule for full ranges.
        unclipped: a choice a site, with full ranges.
    """
    unclipped = measured(problem, unclipped)
    clipped = measured(problem, search_sites(problem, options, unclipped))
    return tuple(
        choice if errors_of(choice).calibration <= errors_of(full).calibration else full
        for choice, full in zip(clipped, unclipped, strict=True)
    )


def search_sites(
    problem: GroupProblem, options: SearchOptions, unclipped: tuple[SiteChoice, ...]
) -> tuple[SiteChoice, ...]:
    """Return ``unclipped`` with the best ranges of every block by itself.

    Args:
        problem, options, unclipped: see ``clip_sites``.
    """
    return tuple(
        choice.refined(_site_ranges(problem, options, weight, spec, choice.input_scale))
        for weight, spec, choice in zip(problem.weights, problem.specs, unclipped, strict=True)
    )


def _site_ranges(
    problem: GroupProblem, options: SearchOptions, weight: Tensor, spec: QuantSpec, scale: InputScale
) -> BlockParameters:
    """Search the ranges of a whole site under ``scale``, some output channels at a time."""
    assert problem.stats is not None
    stats = problem.stats.calibration
    if scale.scale is not None:
        stats = in_scaled_space(stats, scale.scale)
    gram = gram_blocks(stats, spec.block_size(weight.shape[1]))
    ratios = clip_ratio_grid(options.clip_min, options.clip_step)
    parts = [
        search_ranges(scaled_weight(rows, scale), spec, options.range_rule, gram, ratios)
        for rows in torch.split(weight, options.column_chunk)
    ]
    return stack_parameters(parts)


def clip_ratio_grid(smallest: float, step: float) -> list[float]:
    """Return 1, 1 - step, ... down to ``smallest``."""
    count = int((1 - smallest) / step + 1e-9)
    return [1 - index * step for index in range(count + 1)]


def search_ranges(
    weight: Float[Tensor, "N K"], spec: QuantSpec, rule: RangeRule, gram: Float[Tensor, "nB B B"], ratios: list[float]
) -> BlockParameters:
    """Find for every block of every output channel the scale (and zero point) with the smallest error.

    Args:
        weight: the weight, times its input scale.
        spec: the format that it is stored in.
        rule: how a block's full range becomes its scale.
        gram: the diagonal blocks of the Gram matrix, in the scaled space.
        ratios: the clip ratios to try.
    """
    blocks = split(weight, spec.block_size(weight.shape[1]))
    ratio, error = _best_ratios(blocks, spec, rule, gram, ratios)
    best = choose_parameters(blocks, spec, rule, ratio)
    for _ in range(_REFITS):
        refitted = refit(blocks, best, spec, gram)
        refitted_error = _errors(blocks, refitted, spec, gram)
        better = refitted_error < error
        error = torch.where(better, refitted_error, error)
        best = _where(better, refitted, best)
    return best


def search_clip_ratios(
    weight: Float[Tensor, "N K"], spec: QuantSpec, rule: RangeRule, gram: Float[Tensor, "nB B B"], ratios: list[float]
) -> Float[Tensor, "N nB"]:
    """Find for every block of every output channel the ratio with the smallest error; the first of equals wins.

    Args:
        weight, spec, rule, gram, ratios: see ``search_ranges``.
    """
    return _best_ratios(split(weight, spec.block_size(weight.shape[1])), spec, rule, gram, ratios)[0]


def _best_ratios(
    blocks: Float[Tensor, "N nB B"],
    spec: QuantSpec,
    rule: RangeRule,
    gram: Float[Tensor, "nB B B"],
    ratios: list[float],
) -> tuple[Float[Tensor, "N nB"], Float[Tensor, "N nB"]]:
    """Return the best ratios and their errors."""
    best_error = torch.full(blocks.shape[:-1], torch.inf, device=blocks.device)
    best_ratio = torch.full_like(best_error, ratios[0])
    full = block_range(blocks)
    for ratio in ratios:
        error = _errors(blocks, range_parameters(full, spec, rule, ratio), spec, gram)
        best_ratio.masked_fill_(error < best_error, ratio)
        best_error = torch.minimum(error, best_error)
    return best_ratio, best_error


def refit(
    blocks: Float[Tensor, "N nB B"], parameters: BlockParameters, spec: QuantSpec, gram: Float[Tensor, "nB B B"]
) -> BlockParameters:
    """Fit the scale to the codes, scale = c^T G w / c^T G c with c = code - zero point, then the zero point.

    Blocks whose best scale would be 0 or of the other sign keep theirs.

    Args:
        blocks: the weights.
        parameters: what the codes are chosen with.
        spec: the format that the weights are stored in.
        gram: the diagonal blocks of the Gram matrix.
    """
    codes = quantize(blocks, parameters, spec)
    steps = levels(codes, parameters)
    pulled = (steps.transpose(0, 1) @ gram).transpose(0, 1)
    fitted = (pulled * blocks).sum(dim=-1) / (pulled * steps).sum(dim=-1)
    usable = torch.isfinite(fitted) & (fitted * parameters.scales > 0)
    scales = round_to_storage(torch.where(usable, fitted, parameters.scales), spec.scale_dtype)
    if parameters.zero_points is None:
        return BlockParameters(scales=scales, zero_points=None)
    pull = gram.sum(dim=1).expand_as(blocks)
    offset = (pull * (codes - blocks / scales.unsqueeze(-1))).sum(dim=-1) / pull.sum(dim=-1)
    zero_points = torch.where(torch.isfinite(offset), torch.round(offset), parameters.zero_points)
    return BlockParameters(scales=scales, zero_points=zero_points.clamp(spec.code_min, spec.code_max))


def _errors(
    blocks: Float[Tensor, "N nB B"], parameters: BlockParameters, spec: QuantSpec, gram: Float[Tensor, "nB B B"]
) -> Float[Tensor, "N nB"]:
    error = round_trip(blocks, parameters, spec).sub_(blocks)
    return block_error(error.transpose(0, 1), gram).T


def _where(better: Tensor, first: BlockParameters, second: BlockParameters) -> BlockParameters:
    scales = torch.where(better, first.scales, second.scales)
    if first.zero_points is None or second.zero_points is None:
        return BlockParameters(scales=scales, zero_points=None)
    return BlockParameters(scales=scales, zero_points=torch.where(better, first.zero_points, second.zero_points))
