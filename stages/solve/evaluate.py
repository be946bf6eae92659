"""Carry out a choice: codes and scales of a site, and the output error that they cause."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.records import QuantSpec, TokenStats
from stages.solve.affine import BlockParameters, RangeRule, choose_parameters, quantize, round_trip
from stages.solve.blocks import join, split
from stages.solve.objective import output_error
from stages.solve.problem import GroupProblem, SiteChoice

_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 1 << 22, 1 << 27
"""Elements of one temporary: about what a CPU's caches hold; a few hundred megabytes on an accelerator."""


def rows_per_chunk(weight: Tensor, candidates: int = 1) -> int:
    """Output channels to work on at once so that temporaries stay small, whatever the layer's size."""
    budget = _CPU_ELEMENTS if weight.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(1, budget // (weight.shape[1] * candidates))


def _prepare(
    weight: Tensor, spec: QuantSpec, choice: SiteChoice, rule: RangeRule
) -> tuple[Float[Tensor, "N nB B"], BlockParameters]:
    """Blocks of the scaled weight, and the parameters that ``choice`` gives them."""
    scale = choice.input_scale.scale
    blocks = split(weight if scale is None else weight * scale, spec.block_size(weight.shape[1]))
    ratios = 1.0 if choice.clip_ratios is None else choice.clip_ratios
    return blocks, choose_parameters(blocks, spec, rule, ratios)


def quantize_site(
    weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice, rule: RangeRule
) -> tuple[Float[Tensor, "N K"], BlockParameters]:
    """Codes (integers in float32) and parameters of one site under ``choice``."""
    blocks, parameters = _prepare(weight, spec, choice, rule)
    return join(quantize(blocks, parameters, spec), weight.shape[1]), parameters


def site_error(
    weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice, rule: RangeRule, stats: TokenStats
) -> float:
    """tr(D G D^T): mean over tokens of the squared output error of the site, summed over its channels."""
    total = 0.0
    size = rows_per_chunk(weight)
    for start in range(0, weight.shape[0], size):
        chunk = slice(start, start + size)
        part = choice if choice.clip_ratios is None else _restrict(choice, chunk)
        error = weight_error(weight[chunk], spec, part, rule)
        total += float(output_error(error, stats).double().sum())
    return total


def _restrict(choice: SiteChoice, chunk: slice) -> SiteChoice:
    assert choice.clip_ratios is not None
    return SiteChoice(input_scale=choice.input_scale, clip_ratios=choice.clip_ratios[chunk])


def weight_error(
    weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice, rule: RangeRule
) -> Float[Tensor, "N K"]:
    """D = Q(W diag(s)) diag(1/s) - W: the error as the unscaled activation sees it."""
    blocks, parameters = _prepare(weight, spec, choice, rule)
    stored = join(round_trip(blocks, parameters, spec), weight.shape[1])
    scale = choice.input_scale.scale
    return (stored if scale is None else stored / scale) - weight


def site_errors(
    problem: GroupProblem, choices: tuple[SiteChoice, ...], rule: RangeRule, stats: TokenStats
) -> tuple[float, ...]:
    """``site_error`` of every site of a group."""
    return tuple(
        site_error(weight, spec, choice, rule, stats)
        for weight, spec, choice in zip(problem.weights, problem.specs, choices, strict=True)
    )


def candidate_errors(
    weight: Float[Tensor, "N K"],
    spec: QuantSpec,
    input_scales: Float[Tensor, "A K"],
    rule: RangeRule,
    stats: TokenStats,
) -> Float[Tensor, " A"]:
    """tr(D G D^T) for each of A input scales at once, without clipping, in float64."""
    totals = torch.zeros(input_scales.shape[0], dtype=torch.float64)
    size = rows_per_chunk(weight, input_scales.shape[0])
    block_size = spec.block_size(weight.shape[1])
    for rows in torch.split(weight, size):
        blocks = split(rows * input_scales[:, None, :], block_size)  # [A, n, nB, B]
        stored = join(round_trip(blocks, choose_parameters(blocks, spec, rule), spec), weight.shape[1])
        error = stored.div_(input_scales[:, None, :]).sub_(rows)
        totals += output_error(error, stats).double().sum(dim=-1).cpu()
    return totals
