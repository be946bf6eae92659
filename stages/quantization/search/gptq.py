"""GPTQ: each column's rounding error is made up for by the columns that follow (Frantar et al., 2022).

Scales are fixed before (static groups), so that the order of columns is free and the layout stays plain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stages.errors import SolveError
from stages.quantization.search.affine import BlockParameters, split_parameters, stack_parameters
from stages.quantization.search.awq import awq_full
from stages.quantization.search.choices import keep_validated, scaled_weight
from stages.quantization.search.coordinate_descent import descend
from stages.quantization.search.objective import full_gram, in_scaled_space
from stages.quantization.search.problem import GroupProblem, SearchOptions, SiteChoice
from stages.quantization.search.ranges import awq_clip
from stages.records.formats import QuantSpec
from stages.records.results import TokenStats

_DOUBLE_UP_TO = 16384
"""Inputs up to which the factorization runs in float64: three copies of K x K then stay below 7 GB."""


_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseFactor:
    """Upper triangular U with U^T U = (G + damping I)^-1, rows and columns of G taken in ``order``."""

    order: Int64[Tensor, " K"]
    upper: Float[Tensor, "K K"]


def damped(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """G + damping * mean(diag G) I, with 1 on the diagonal of channels that were always 0; a new matrix."""
    return _damp(gram.clone(), damping)


def _damp(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    diagonal = torch.diagonal(gram)
    diagonal += torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
    return gram


def inverse_factor(gram: Float[Tensor, "K K"], damping: float, *, act_order: bool) -> InverseFactor:
    """Factor the inverse of the damped Gram matrix; damping grows tenfold until it can be factored.

    Args:
        gram: X^T X / T, float32.
        damping: part of the mean diagonal that is added to the diagonal.
        act_order: loudest channels first, so that quieter ones make up for their errors.

    Raises:
        SolveError: it can't be factored at any damping.
    """
    diagonal = torch.diagonal(gram)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(gram.device)
    for attempt in range(_ATTEMPTS):
        upper = _upper(gram, order, damping * 10**attempt)
        if upper is not None:
            return InverseFactor(order=order, upper=upper)
    raise SolveError(
        f"A Gram matrix of {len(order)} channels can't be factored with {10 ** (_ATTEMPTS - 1)} times the damping; "
        "calibrate again, on more text."
    )


def _upper(gram: Float[Tensor, "K K"], order: Int64[Tensor, " K"], damping: float) -> Float[Tensor, "K K"] | None:
    """U, or None where rounding leaves nothing to factor. Each matrix is dropped as soon as the next one is there."""
    matrix = gram[order][:, order]
    if len(order) <= _DOUBLE_UP_TO and gram.device.type != "mps":
        matrix = matrix.double()
    lower, failed = torch.linalg.cholesky_ex(_damp(matrix, damping))
    del matrix
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if bool(failed) else upper.float()


_STACKED_ON_CPU, _STACKED_ON_ACCELERATOR = 1 << 25, 1 << 27
"""Numbers of the weights that are solved as one matrix: some ten copies of it are in memory."""


_TILE = 128
"""Columns whose errors reach the columns behind them in one product."""


def gptq(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """The ranges of ``awq_clip``, with codes that make up for each other's errors."""
    return compensate(problem, options, awq_clip(problem, options))


def compensate(
    problem: GroupProblem, options: SearchOptions, choices: tuple[SiteChoice, ...]
) -> tuple[SiteChoice, ...]:
    """GPTQ and coordinate descent from ``choices``, kept at the sites where held-out tokens agree.

    All choices must share one input scale, as those of one activation do.
    """
    assert problem.stats is not None
    gram = _scaled_gram(problem.stats.calibration, choices[0])
    factor = inverse_factor(gram, options.damping, act_order=options.act_order)
    tied = damped(gram, options.damping)
    refined: dict[int, SiteChoice] = {}
    for alike in _stacks(problem):
        spec = problem.specs[alike[0]]
        stack = torch.cat([scaled_weight(problem.weights[index], choices[index].input_scale) for index in alike])
        ranges = stack_parameters([choices[index].parameters for index in alike])
        steps = [(gptq_codes(stack, ranges, spec, factor), ranges)]
        if options.descent_passes:
            steps.append(descend(stack, steps[0][0], ranges, spec, tied, options.descent_passes))
        refined |= _taken_apart(problem, alike, choices, steps)
    return keep_validated(problem, tuple(refined[index] for index in range(len(choices))))


def _stacks(problem: GroupProblem) -> list[list[int]]:
    """Sites of one format that are solved as one matrix: walks over columns take as long for many rows as for few."""
    limit = _STACKED_ON_CPU if problem.weights[0].device.type == "cpu" else _STACKED_ON_ACCELERATOR
    stacks: list[list[int]] = []
    for index, weight in enumerate(problem.weights):
        for stack in stacks:
            size = sum(problem.weights[other].numel() for other in stack) + weight.numel()
            if problem.specs[stack[0]] == problem.specs[index] and size <= limit:
                stack.append(index)
                break
        else:
            stacks.append([index])
    return stacks


def _taken_apart(
    problem: GroupProblem,
    alike: list[int],
    choices: tuple[SiteChoice, ...],
    steps: list[tuple[Tensor, BlockParameters]],
) -> dict[int, SiteChoice]:
    """Each site's part of what was found for a stack, one step refining the other."""
    refined = {index: choices[index] for index in alike}
    rows = [len(problem.weights[index]) for index in alike]
    for codes, parameters in steps:
        parts = zip(alike, torch.split(codes, rows), split_parameters(parameters, rows), strict=True)
        for index, of_codes, of_parameters in parts:
            refined[index] = refined[index].refined(of_parameters, of_codes)
    return refined


def _scaled_gram(stats: TokenStats, choice: SiteChoice) -> Float[Tensor, "K K"]:
    scale = choice.input_scale.scale
    return full_gram(stats if scale is None else in_scaled_space(stats, scale))


def gptq_codes(
    weight: Float[Tensor, "N K"], parameters: BlockParameters, spec: QuantSpec, factor: InverseFactor
) -> Float[Tensor, "N K"]:
    """Codes, integers in float32, chosen column by column in the factor's order.

    q_k = Q(w_k), e = (w_k - q_k) / U_kk, and w_j -= U_kj e for the columns j that follow.
    """
    in_features = weight.shape[1]
    columns = factor.order // spec.block_size(in_features)
    pending = weight[:, factor.order].T.contiguous()  # [K, N]: a column of the weight is a row here
    scales = parameters.scales.T[columns]
    zero_points = None if parameters.zero_points is None else parameters.zero_points.T[columns]
    codes = torch.empty_like(pending)
    for start in range(0, in_features, _TILE):
        tile = slice(start, min(start + _TILE, in_features))
        zeros = None if zero_points is None else zero_points[tile]
        errors = _tile_codes(pending[tile], scales[tile], zeros, factor.upper[tile, tile], spec, codes[tile])
        pending[tile.stop :] -= factor.upper[tile, tile.stop :].T @ errors
    result = torch.empty_like(codes)
    result[factor.order] = codes
    return result.T.contiguous()


def _tile_codes(
    pending: Float[Tensor, "k N"],
    scales: Float[Tensor, "k N"],
    zero_points: Float[Tensor, "k N"] | None,
    upper: Float[Tensor, "k k"],
    spec: QuantSpec,
    codes: Float[Tensor, "k N"],
) -> Float[Tensor, "k N"]:
    """Fill ``codes`` and return the errors e; ``pending`` is used up."""
    errors = torch.empty_like(pending)
    for index in range(pending.shape[0]):
        zero = 0 if zero_points is None else zero_points[index]
        code = torch.round(pending[index] / scales[index]).add_(zero).clamp_(spec.code_min, spec.code_max)
        error = (pending[index] - (code - zero) * scales[index]) / upper[index, index]
        codes[index], errors[index] = code, error
        pending[index:].addr_(upper[index, index:], error, alpha=-1)
    return errors


def awq_gptq(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """``awq_full``'s input scale and ranges, with codes that make up for each other's errors."""
    return compensate(problem, options, awq_full(problem, options))
