"""AWQ input scales (Lin et al., AWQ: Activation-aware Weight Quantization, 2023, section 3.2).

Channels that carry large activations are quantized more finely: W diag(s) is rounded and x / s multiplied with it. Two
families are searched, s = a^r (the paper's) and s = a^r / w^(1-r) ("duo", llm-awq and AutoAWQ), and the identity, so
that the result is never worse than plain rounding. Siblings are searched jointly, at the scale that is really used.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.records import HeadSharing, QuantSpec, TokenStats
from stages.solve.accept import first_accepted
from stages.solve.blocks import join, split
from stages.solve.evaluate import candidate_errors, full_ranges
from stages.solve.problem import IDENTITY, GroupProblem, InputScale, SearchOptions, SiteChoice
from stages.solve.sample import GLANCE, LOOK, Sample

_SMALLEST, _LARGEST = 1e-4, 1e4
"""Bounds of a scale after normalization, as in AWQ's reference code: beyond them float16 folds lose digits."""

_SECOND_LOOKS = 8
"""Candidates that are looked at on more channels."""


def awq_lite(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The input scale with the smallest joint error that neither the held-out tokens nor all channels veto."""
    ranked = rank_input_scales(problem, options)
    return first_accepted(problem, options, (full_ranges(problem, options.range_rule, scale) for scale in ranked))


def rank_input_scales(problem: GroupProblem, options: SearchOptions) -> list[InputScale]:
    """The best candidates from the smallest to the largest joint error at full range.

    The list ends with the identity: what comes after it is never taken.
    """
    *candidates, _ = glance_at_input_scales(problem, options)
    return _ranked(Sample(problem, LOOK), options, [IDENTITY, *candidates[:_SECOND_LOOKS]])


def glance_at_input_scales(problem: GroupProblem, options: SearchOptions) -> list[InputScale]:
    """All candidates in the order of their joint error at full range, on a small sample of the channels.

    The list ends with the identity, like that of ``rank_input_scales``.
    """
    assert problem.stats is not None
    candidates = input_scale_candidates(problem, problem.stats.calibration, options.alpha_step)
    return _ranked(Sample(problem, GLANCE), options, [IDENTITY, *candidates])


def _ranked(sample: Sample, options: SearchOptions, candidates: list[InputScale]) -> list[InputScale]:
    """``candidates``, the identity first among them, best first and up to the identity."""
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
    """a^r for r in (0, 1] and a^r / w^(1-r) for r in [0, 1), without the identity."""
    activation = stats.abs_mean
    weight = weight_magnitude(problem.weights, problem.specs)
    if problem.head_sharing is not None:
        activation = share_over_heads(activation, problem.head_sharing)
        weight = share_over_heads(weight, problem.head_sharing)
    activation, weight = _positive(activation), _positive(weight)
    steps = round(1 / alpha_step)
    alphas = [round(min(1.0, index * alpha_step), 9) for index in range(steps + 1)]
    power = [InputScale(family="activation", alpha=alpha, scale=_normalized(activation**alpha)) for alpha in alphas[1:]]
    duo = [
        InputScale(family="duo", alpha=alpha, scale=_normalized(activation**alpha / weight ** (1 - alpha)))
        for alpha in alphas[:-1]
    ]
    return power + duo


def weight_magnitude(weights: tuple[Tensor, ...], specs: tuple[QuantSpec, ...]) -> Float[Tensor, " K"]:
    """w_k: mean over all output channels of |W_nk| relative to the largest weight of its own block."""
    parts = [_relative_magnitude(weight, spec) for weight, spec in zip(weights, specs, strict=True)]
    return torch.cat(parts).mean(dim=0)


def _relative_magnitude(weight: Tensor, spec: QuantSpec) -> Tensor:
    blocks = split(weight.abs(), spec.block_size(weight.shape[1]))
    largest = blocks.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(blocks.dtype).tiny)
    return join(blocks / largest, weight.shape[1])


def share_over_heads(values: Float[Tensor, " K"], heads: HeadSharing) -> Float[Tensor, " K"]:
    """Mean over the query heads of each key/value head, repeated: the form that v_proj can absorb."""
    grouped = values.reshape(heads.kv_heads, heads.group_size, heads.head_size)
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def _positive(values: Tensor) -> Tensor:
    """Channels that are never used (0) count as very quiet ones, so that powers stay finite."""
    return values.clamp_min(max(float(values.max()) * 1e-8, torch.finfo(values.dtype).tiny))


def _normalized(scale: Tensor) -> Tensor:
    scale = scale / (scale.max().sqrt() * scale.min().sqrt())
    return scale.clamp(_SMALLEST, _LARGEST)
