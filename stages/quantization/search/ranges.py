"""Range search: for every block a grid of clip ratios, then a least-squares refit of scale and zero point.

The error of block b of output channel n is d^T G_bb d, with G_bb the block's part of the Gram matrix: exactly the mean
squared output error that the block causes by itself, over all tokens (AWQ's weight clipping, Lin et al., 2023,
https://arxiv.org/abs/2306.00978; the refit after llama.cpp's make_qx_quants, which has only diag(G) in G's place).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from stages.quantization.search.affine import (
    BlockParameters,
    BlockRange,
    RangeRule,
    range_parameters,
    round_to_storage,
    stack_parameters,
)
from stages.quantization.search.choices import errors_of, first_validated, full_ranges, measured, scaled_weight
from stages.quantization.search.gptq.columns import columns_of
from stages.quantization.search.objective import gram_blocks
from stages.quantization.search.problem import IDENTITY, GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.records.formats import QuantSpec

_ROWS = 64
"""Parts begin at a multiple of it and have at least so many output channels, so that sums run in the same kernels."""
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
    gram = gram_blocks(problem.stats.calibration, spec.block_size(weight.shape[1]), scale.scale)
    ratios = clip_ratio_grid(options.clip_min, options.clip_step)
    step = -(-options.column_chunk // _ROWS) * _ROWS
    starts = [*range(0, max(len(weight) - _ROWS, 1), step), len(weight)]
    parts = [
        search_ranges(scaled_weight(weight[start:stop], scale), spec, options.range_rule, gram, ratios)
        for start, stop in pairwise(starts)
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
    found = _search(_blocks(weight, gram), spec, rule, ratios)
    zero_points = found.zero_points
    return BlockParameters(scales=found.scales.T, zero_points=None if zero_points is None else zero_points.T)


def search_clip_ratios(
    weight: Float[Tensor, "N K"], spec: QuantSpec, rule: RangeRule, gram: Float[Tensor, "nB B B"], ratios: list[float]
) -> Float[Tensor, "N nB"]:
    """Find for every block of every output channel the ratio with the smallest error; the first of equals wins.

    Args:
        weight, spec, rule, gram, ratios: see ``search_ranges``.
    """
    return _best_ratios(_blocks(weight, gram), spec, rule, ratios)[0].T


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The blocks of some rows; a block's numbers of one row are a column, so that operations run along the rows."""

    weights: Float[Tensor, "nB B N"]
    gram: Float[Tensor, "nB B B"]
    work: Float[Tensor, "2 nB B N"]
    """A place for what is computed with them."""


def _blocks(weight: Float[Tensor, "N K"], gram: Float[Tensor, "nB B B"]) -> Blocks:
    columns = columns_of([weight])[0]
    missing = gram.shape[0] * gram.shape[1] - len(columns)
    padded = pad(columns, (0, 0, 0, missing)) if missing else columns
    blocks = padded.view(*gram.shape[:2], len(weight))
    return Blocks(weights=blocks, gram=gram, work=blocks.new_empty(2, *blocks.shape))


def _search(blocks: Blocks, spec: QuantSpec, rule: RangeRule, ratios: list[float]) -> BlockParameters:
    ratio, error = _best_ratios(blocks, spec, rule, ratios)
    best = range_parameters(_range_of(blocks), spec, rule, ratio)
    for _ in range(_REFITS):
        refitted = refit(blocks, best, spec)
        refitted_error = _errors(blocks, refitted, spec)
        better = refitted_error < error
        error = torch.where(better, refitted_error, error)
        best = _where(better, refitted, best)
    return best


def _best_ratios(
    blocks: Blocks, spec: QuantSpec, rule: RangeRule, ratios: list[float]
) -> tuple[Float[Tensor, "nB N"], Float[Tensor, "nB N"]]:
    """Return the best ratios and their errors."""
    full = _range_of(blocks)
    best_error = torch.full_like(full.low, torch.inf)
    best_ratio = torch.full_like(best_error, ratios[0])
    for ratio in ratios:
        error = _errors(blocks, range_parameters(full, spec, rule, ratio), spec)
        best_ratio.masked_fill_(error < best_error, ratio)
        best_error = torch.minimum(error, best_error)
    return best_ratio, best_error


def _range_of(blocks: Blocks) -> BlockRange:
    return BlockRange(low=blocks.weights.amin(dim=1), high=blocks.weights.amax(dim=1))


def refit(blocks: Blocks, parameters: BlockParameters, spec: QuantSpec) -> BlockParameters:
    """Fit the scale to the codes, scale = c^T G w / c^T G c with c = code - zero point, then the zero point.

    Blocks whose best scale would be 0 or of the other sign keep theirs.

    Args:
        blocks: the weights, and the diagonal blocks of the Gram matrix.
        parameters: what the codes are chosen with, [nB, N], as are those that are returned.
        spec: the format that the weights are stored in.
    """
    weights, gram = blocks.weights, blocks.gram
    steps = _levels(blocks, parameters, spec)
    pulled = torch.bmm(gram, steps, out=blocks.work[1])
    offset = pulled.sum(dim=1)
    fitted = (pulled * weights).sum(dim=1) / pulled.mul_(steps).sum(dim=1)
    usable = torch.isfinite(fitted) & (fitted * parameters.scales > 0)
    scales = round_to_storage(torch.where(usable, fitted, parameters.scales), spec.scale_dtype)
    if parameters.zero_points is None:
        return BlockParameters(scales=scales, zero_points=None)
    pull = gram.sum(dim=1)
    offset = (offset - torch.bmm(pull.unsqueeze(1), weights).squeeze(1) / scales) / pull.sum(dim=1, keepdim=True)
    zero_points = torch.where(torch.isfinite(offset), parameters.zero_points + offset.round_(), parameters.zero_points)
    return BlockParameters(scales=scales, zero_points=zero_points.clamp(spec.code_min, spec.code_max))


def _levels(blocks: Blocks, parameters: BlockParameters, spec: QuantSpec) -> Float[Tensor, "nB B N"]:
    """Round to codes; return them less their zero points."""
    levels = torch.div(blocks.weights, parameters.scales.unsqueeze(1), out=blocks.work[0]).round_()
    if parameters.zero_points is None:
        return levels.clamp_(spec.code_min, spec.code_max)
    zero_points = parameters.zero_points.unsqueeze(1)
    return torch.clamp(levels, spec.code_min - zero_points, spec.code_max - zero_points, out=levels)


def _errors(blocks: Blocks, parameters: BlockParameters, spec: QuantSpec) -> Float[Tensor, "nB N"]:
    """Return d^T G_bb d for the error d of every block: what each costs by itself."""
    error = _levels(blocks, parameters, spec).mul_(parameters.scales.unsqueeze(1)).sub_(blocks.weights)
    return torch.bmm(blocks.gram, error, out=blocks.work[1]).mul_(error).sum(dim=1)


def _where(better: Tensor, first: BlockParameters, second: BlockParameters) -> BlockParameters:
    scales = torch.where(better, first.scales, second.scales)
    if first.zero_points is None or second.zero_points is None:
        return BlockParameters(scales=scales, zero_points=None)
    return BlockParameters(scales=scales, zero_points=torch.where(better, first.zero_points, second.zero_points))
