"""AWQ: an input scale for each activation group (``awq_lite``), and ranges searched under the best few (``awq_full``).

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023,
https://arxiv.org/abs/2306.00978, section 3.2. Channels that carry large activations are quantized more finely:
W diag(s) is rounded and x / s multiplied with it. Two families are searched, s = a^r (the paper's) and
s = a^r / w^(1-r) ("duo", llm-awq and AutoAWQ), and the identity, so that the result is never worse than rounding to
nearest. Siblings are searched jointly, at the scale that is really used.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import join, split
from stages.quantization.search.choices import (
    candidate_errors,
    first_validated,
    full_ranges,
    rows_per_chunk,
    site_errors,
)
from stages.quantization.search.problem import (
    COARSE_CHANNELS,
    FINE_CHANNELS,
    IDENTITY,
    GroupProblem,
    InputScale,
    Sample,
    SearchOptions,
    SiteChoice,
)
from stages.quantization.search.ranges import clip_sites, search_sites
from stages.records.formats import QuantSpec
from stages.records.results import TokenStats
from stages.records.sites import HeadSharing

_SMALLEST, _LARGEST = 1e-4, 1e4
"""Bounds of a scale after normalization, as in AWQ's reference code: beyond them float16 folds lose digits."""
_FINE_CANDIDATES = 8
"""Input scales that are compared again on more channels."""
_CLIPPED_CANDIDATES = 5
"""Input scales that ranges are searched under before one is chosen: clipping can reorder the best few."""


def awq_lite(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Choose the input scale with the smallest joint error that neither held-out tokens nor all channels veto."""
    ranked = rank_input_scales(problem, options)
    return first_validated(problem, options, (full_ranges(problem, options.range_rule, scale) for scale in ranked))


def awq_full(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Choose the best of the few best input scales and the identity, each with its own ranges."""
    *scales, identity = _rank_coarsely(problem, options)
    sample = Sample(problem, FINE_CHANNELS)
    ranked = sorted((*scales[:_CLIPPED_CANDIDATES], identity), key=lambda scale: _clipped_error(sample, options, scale))
    clipped = (clip_sites(problem, options, full_ranges(problem, options.range_rule, scale)) for scale in ranked)
    return first_validated(problem, options, clipped)


def _clipped_error(sample: Sample, options: SearchOptions, scale: InputScale) -> float:
    """Return the joint error with ranges searched, measured on a sample of the channels."""
    few = sample.problem
    assert few.stats is not None
    searched = search_sites(few, options, full_ranges(few, options.range_rule, scale))
    return sample.joint_error(site_errors(few, searched, few.stats.calibration))


def rank_input_scales(problem: GroupProblem, options: SearchOptions) -> list[InputScale]:
    """Return the best candidates from the smallest to the largest joint error at full range.

    The list ends with the identity: what comes after it is never taken.
    """
    *candidates, _ = _rank_coarsely(problem, options)
    return _ranked(Sample(problem, FINE_CHANNELS), options, [IDENTITY, *candidates[:_FINE_CANDIDATES]])


def _rank_coarsely(problem: GroupProblem, options: SearchOptions) -> list[InputScale]:
    """Rank all candidates as ``rank_input_scales`` does, on a smaller sample of the channels."""
    assert problem.stats is not None
    candidates = input_scale_candidates(problem, problem.stats.calibration, options.alpha_step)
    return _ranked(Sample(problem, COARSE_CHANNELS), options, [IDENTITY, *candidates])


def _ranked(sample: Sample, options: SearchOptions, candidates: list[InputScale]) -> list[InputScale]:
    """Return ``candidates``, the identity first among them, best first and up to the identity."""
    few = sample.problem
    assert few.stats is not None
    stats = few.stats.calibration
    scales = torch.stack([_as_tensor(candidate, stats) for candidate in candidates])
    errors = [
        candidate_errors(weight, spec, scales, options.range_rule, stats).tolist()
        for weight, spec in zip(few.weights, few.specs, strict=True)
    ]
    joint = [sample.joint_error(of_sites) for of_sites in zip(*errors, strict=True)]
    order = sorted(range(len(candidates)), key=joint.__getitem__)
    return [candidates[index] for index in order[: order.index(0) + 1]]


def _as_tensor(candidate: InputScale, stats: TokenStats) -> Tensor:
    return torch.ones_like(stats.abs_mean) if candidate.scale is None else candidate.scale


def input_scale_candidates(problem: GroupProblem, stats: TokenStats, alpha_step: float) -> list[InputScale]:
    """Return a^r for r in (0, 1] and a^r / w^(1-r) for r in [0, 1), without the identity.

    Args:
        problem: the group; where query heads share a value head, so do their scales.
        stats: what a, the mean activation of a channel, is read from.
        alpha_step: the distance of one r from the next.
    """
    activation, weight = stats.abs_mean, weight_magnitude(problem.weights, problem.specs)
    heads = problem.head_sharing
    if heads is not None:
        activation, weight = mean_over_heads(activation, heads), mean_over_heads(weight, heads)
    activation, weight = _positive(activation), _positive(weight)

    def candidate(family: str, alpha: float, scale: Tensor) -> InputScale:
        scale = _normalized(scale)
        return InputScale(family=family, alpha=alpha, scale=scale if heads is None else repeat_over_heads(scale, heads))

    steps = round(1 / alpha_step)
    alphas = [round(min(1.0, index * alpha_step), 9) for index in range(steps + 1)]
    power = [candidate("activation", alpha, activation**alpha) for alpha in alphas[1:]]
    duo = [candidate("duo", alpha, activation**alpha / weight ** (1 - alpha)) for alpha in alphas[:-1]]
    return power + duo


def weight_magnitude(weights: tuple[Tensor, ...], specs: tuple[QuantSpec, ...]) -> Float[Tensor, " K"]:
    """Return w: the mean over all output channels of |W_nk| relative to the largest weight of its own block."""
    sums = [
        _relative_magnitude(rows.abs(), spec).sum(dim=0)
        for weight, spec in zip(weights, specs, strict=True)
        for rows in torch.split(weight, rows_per_chunk(weight))
    ]
    return torch.stack(sums).sum(dim=0) / sum(len(weight) for weight in weights)


def _relative_magnitude(magnitudes: Tensor, spec: QuantSpec) -> Tensor:
    blocks = split(magnitudes, spec.block_size(magnitudes.shape[1]))
    largest = blocks.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
    return join(blocks / largest, magnitudes.shape[1])


def mean_over_heads(values: Float[Tensor, " K"], heads: HeadSharing) -> Float[Tensor, " V"]:
    """Average over the query heads of each key/value head: one value for each output channel of v_proj."""
    return values.reshape(heads.kv_heads, heads.group_size, heads.head_size).mean(dim=1).reshape(-1)


def repeat_over_heads(values: Float[Tensor, " V"], heads: HeadSharing) -> Float[Tensor, " K"]:
    """Repeat every key/value head's values for each of its query heads, equal to the last bit: v_proj can absorb them.

    Repeated after all arithmetic, because a vectorized power may differ in the last bit from one lane to another.
    """
    grouped = values.reshape(heads.kv_heads, 1, heads.head_size)
    return grouped.expand(-1, heads.group_size, -1).reshape(-1)


def _positive(values: Tensor) -> Tensor:
    """Raise channels that are never used (0) to a tiny value, so that powers stay finite."""
    return values.clamp_min(max(float(values.max()) * 1e-8, torch.finfo(values.dtype).tiny))


def _normalized(scale: Tensor) -> Tensor:
    scale = scale / (scale.max().sqrt() * scale.min().sqrt())
    return scale.clamp(_SMALLEST, _LARGEST)
