"""GPTQ: the rounding error of each column is compensated in the columns that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
https://arxiv.org/abs/2210.17323. Scales are fixed before (static groups), so that the order of columns is free and the
layout stays plain. ``gptq`` starts from ``awq_clip``'s ranges, ``awq_gptq`` from ``awq_full``'s input scale and ranges;
coordinate descent goes on from the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from stages.errors import SolveError
from stages.quantization.search.affine import (
    BlockParameters,
    copy_rows,
    empty_like,
    one_of,
    rows_of,
    side_by_side,
    stack_parameters,
)
from stages.quantization.search.awq import awq_full
from stages.quantization.search.choices import keep_validated, scaled_weight, slices
from stages.quantization.search.coordinate_descent import coordinate_descent, two_sided_descent
from stages.quantization.search.objective import full_gram, in_scaled_space
from stages.quantization.search.problem import GroupProblem, SearchOptions, SiteChoice
from stages.quantization.search.ranges import awq_clip
from stages.records.formats import QuantSpec
from stages.records.results import TokenStats

_STACKED_ON_CPU, _STACKED_ON_ACCELERATOR = 1 << 25, 1 << 27
"""Numbers of the weights that are solved as one matrix: some ten copies of it are in memory. Of larger sites, some
output channels are solved after others."""
_ROWS = 64
"""Output channels that are solved at once are a multiple of it, so that products run in the same kernels."""
_TILE, _STEP = 128, 16
"""Columns whose errors reach all columns behind them in one product, and those behind them in the tile."""
_DOUBLE_UP_TO = 16384
"""Inputs up to which a Gram matrix is factored in float64: three copies of K x K then stay below 7 GB."""
_SINGLE_ERROR = 0.01
"""Bound of the relative error that float32 may cause; the usual damping keeps far below it."""
_TRIANGLE = 256
"""Size of a triangular matrix that is inverted as it is, not by its halves."""
_ATTEMPTS = 5
"""Dampings that are tried, each ten times the one before."""


def gptq(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Keep the ranges of ``awq_clip`` and choose codes that compensate for each other's errors."""
    return compensate(problem, options, awq_clip(problem, options))


def awq_gptq(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Keep ``awq_full``'s input scale and ranges and choose codes that compensate for each other's errors."""
    return compensate(problem, options, awq_full(problem, options))


def compensate(
    problem: GroupProblem, options: SearchOptions, choices: tuple[SiteChoice, ...]
) -> tuple[SiteChoice, ...]:
    """Run GPTQ and coordinate descent from ``choices``; keep the result at the sites where held-out tokens agree.

    Args:
        problem: the group, with statistics.
        options: damping, order of columns and passes of coordinate descent.
        choices: one a site; all must share one input scale, as those of one activation do.
    """
    assert problem.stats is not None
    compensation = _Compensation.over([_scaled_gram(problem.stats.calibration, choices[0])], options)
    steps = [_empty_steps(*each, options) for each in zip(problem.weights, problem.specs, choices, strict=True)]
    for stack in _stacks(problem):
        weights = [scaled_weight(problem.weights[each.index][each.rows], choices[0].input_scale) for each in stack]
        ranges = [rows_of(choices[each.index].parameters, each.rows) for each in stack]
        found = compensation.steps(_stacked(weights), stack_parameters(ranges), problem.specs[stack[0].index])
        _fill(steps, stack, found)
    refined = [_refined(choice, of_site) for choice, of_site in zip(choices, steps, strict=True)]
    if options.descent_passes:
        for index, output_gram in enumerate(problem.output_grams):
            if output_gram is not None:
                refined[index] = _for_outputs(problem, index, refined[index], compensation.damped[0], output_gram)
    return keep_validated(problem, tuple(refined))


def gptq_alike(problems: Sequence[GroupProblem], options: SearchOptions) -> list[tuple[SiteChoice, ...]]:
    """Return ``gptq`` of each problem; columns are visited in all of them at once.

    A step over one column of a small matrix takes longer to begin than to do.

    Args:
        problems: of one site each, all of one shape and format, without Gram matrices of outputs: experts.
        options: see ``compensate``.
    """
    found = [awq_clip(problem, options)[0] for problem in problems]
    weights = torch.stack(
        [scaled_weight(each.weights[0], choice.input_scale) for each, choice in _pairs(problems, found)]
    )
    grams = [_scaled_gram(_calibration(each), choice) for each, choice in _pairs(problems, found)]
    ranges, spec = side_by_side([choice.parameters for choice in found]), problems[0].specs[0]
    for step in _Compensation.over(grams, options).steps(weights, ranges, spec):
        codes = step.codes.to(spec.code_dtype)
        found = [choice.refined(one_of(step.parameters, index), codes[index]) for index, choice in enumerate(found)]
    return [keep_validated(each, (choice,)) for each, choice in _pairs(problems, found)]


def _pairs(
    problems: Sequence[GroupProblem], choices: Sequence[SiteChoice]
) -> Iterator[tuple[GroupProblem, SiteChoice]]:
    return zip(problems, choices, strict=True)


def _calibration(problem: GroupProblem) -> TokenStats:
    assert problem.stats is not None
    return problem.stats.calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Codes and the parameters that go with them, of one matrix or of several of one shape."""

    codes: Float[Tensor, "*problems N K"] | Integer[Tensor, "N K"]
    parameters: BlockParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compensation:
    """What GPTQ and the descent need of the Gram matrices, one for each matrix, whose rows may come in parts."""

    inverses: Sequence[InverseCholesky]
    damped: Sequence[Float[Tensor, "K K"]]
    """Empty without a descent."""
    passes: int

    @classmethod
    def over(cls, grams: Sequence[Float[Tensor, "K K"]], options: SearchOptions) -> _Compensation:
        return cls(
            inverses=[inverse_cholesky(gram, options.damping, act_order=options.act_order) for gram in grams],
            damped=[damped(gram, options.damping) for gram in grams] if options.descent_passes else [],
            passes=options.descent_passes,
        )

    def steps(self, weights: Float[Tensor, "*problems N K"], ranges: BlockParameters, spec: QuantSpec) -> list[_Step]:
        """Return what GPTQ gives, and what the descent after it."""
        several = weights.ndim > 2
        inverse = self.inverses[0]
        if several:
            inverse = InverseCholesky(
                order=torch.stack([each.order for each in self.inverses]),
                upper=torch.stack([each.upper for each in self.inverses]),
            )
        codes = gptq_codes(weights, ranges, spec, inverse)
        steps = [_Step(codes=codes, parameters=ranges)]
        if self.passes:
            grams = torch.stack(list(self.damped)) if several else self.damped[0]
            codes, ranges = coordinate_descent(weights, codes, ranges, spec, grams, self.passes)
            steps.append(_Step(codes=codes, parameters=ranges))
        return steps


def _for_outputs(
    problem: GroupProblem, index: int, choice: SiteChoice, gram: Tensor, output_gram: Tensor
) -> SiteChoice:
    """Return the choice of one site after a pass of descent over codes whose errors count together in each head."""
    assert choice.codes is not None
    weight, spec, codes = problem.weights[index], problem.specs[index], torch.empty_like(choice.codes)
    (heads, size), at_once = output_gram.shape[:2], numbers_at_once(weight.device)
    for some in slices(heads, max(at_once // (size * weight.shape[1]), 1)):
        rows = slice(some.start * size, some.stop * size)
        codes[rows] = two_sided_descent(
            scaled_weight(weight[rows], choice.input_scale),
            choice.codes[rows].float(),
            rows_of(choice.parameters, rows),
            spec,
            gram,
            output_gram[some],
        ).to(codes.dtype)
    return choice.refined(choice.parameters, codes)


def _scaled_gram(stats: TokenStats, choice: SiteChoice) -> Float[Tensor, "K K"]:
    scale = choice.input_scale.scale
    return full_gram(stats if scale is None else in_scaled_space(stats, scale))


def numbers_at_once(device: torch.device) -> int:
    """Return how many weights are solved as one matrix on ``device``."""
    return _STACKED_ON_CPU if device.type == "cpu" else _STACKED_ON_ACCELERATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some output channels of one site of a group."""

    index: int
    rows: slice


def _stacks(problem: GroupProblem) -> list[list[_Rows]]:
    """Put sites of one format together: a pass over the columns of many rows takes as long as over those of few."""
    limit = numbers_at_once(problem.weights[0].device)
    stacks: list[list[_Rows]] = []
    sizes: list[int] = []
    for index, weight in enumerate(problem.weights):
        for rows in slices(len(weight), _rows_at_once(weight.shape[1], limit)):
            size = weight[rows].numel()
            for place, stack in enumerate(stacks):
                if problem.specs[stack[0].index] == problem.specs[index] and sizes[place] + size <= limit:
                    stack.append(_Rows(index=index, rows=rows))
                    sizes[place] += size
                    break
            else:
                stacks.append([_Rows(index=index, rows=rows)])
                sizes.append(size)
    return stacks


def _rows_at_once(width: int, limit: int) -> int:
    rows = max(limit // width, 1)
    return rows // _ROWS * _ROWS or rows


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _empty_steps(weight: Tensor, spec: QuantSpec, choice: SiteChoice, options: SearchOptions) -> list[_Step]:
    """Return a place for what each step finds for all rows of a site."""
    return [
        _Step(codes=torch.empty_like(weight, dtype=spec.code_dtype), parameters=empty_like(choice.parameters))
        for _ in range(2 if options.descent_passes else 1)
    ]


def _fill(steps: Sequence[Sequence[_Step]], stack: Sequence[_Rows], found: Sequence[_Step]) -> None:
    """Put each site's rows of what was found for a stack in their places."""
    start = 0
    for each in stack:
        part = slice(start, start + each.rows.stop - each.rows.start)
        for step, of_stack in zip(steps[each.index], found, strict=True):
            step.codes[each.rows] = of_stack.codes[part].to(step.codes.dtype)
            copy_rows(step.parameters, each.rows, rows_of(of_stack.parameters, part))
        start = part.stop


def _refined(choice: SiteChoice, steps: Sequence[_Step]) -> SiteChoice:
    """Return the choice of the last step, every step refining the one before."""
    for step in steps:
        choice = choice.refined(step.parameters, step.codes)
    return choice


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseCholesky:
    """Upper triangular U with U^T U = (G + damping I)^-1, rows and columns of G in ``order``; of one G or of E."""

    order: Int64[Tensor, "*problems K"]
    upper: Float[Tensor, "*problems K K"]


def inverse_cholesky(gram: Float[Tensor, "K K"], damping: float, *, act_order: bool) -> InverseCholesky:
    """Factor the inverse of the damped Gram matrix; damping grows tenfold until it can be factored.

    Args:
        gram: X^T X / T, float32.
        damping: the part of the mean diagonal that is added to the diagonal.
        act_order: largest activations first, so that the errors of their columns are compensated in the others.

    Raises:
        SolveError: it can't be factored at any damping.
    """
    diagonal = torch.diagonal(gram)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(gram.device)
    for attempt in range(_ATTEMPTS):
        upper = _upper(gram, order, damping * 10**attempt)
        if upper is not None:
            return InverseCholesky(order=order, upper=upper)
    raise SolveError(
        f"A Gram matrix of {len(order)} channels can't be factored with {10 ** (_ATTEMPTS - 1)} times the damping; "
        "calibrate again, on more text."
    )


def _upper(gram: Float[Tensor, "K K"], order: Int64[Tensor, " K"], damping: float) -> Float[Tensor, "K K"] | None:
    """Return U, or None where rounding leaves nothing to factor; each matrix is dropped once the next one is there.

    Where L L^T is the matrix with rows and columns in reverse, L^-1 with both in reverse is U.
    """
    order = order.flip(0)
    matrix = gram[order][:, order]
    if _needs_double(len(order), damping, gram.device):
        matrix = matrix.double()
    lower, failed = torch.linalg.cholesky_ex(_damp(matrix, damping))
    del matrix
    return None if bool(failed) else _inverse_lower(lower).flip(0, 1).float()


def _needs_double(channels: int, damping: float, device: torch.device) -> bool:
    """Tell whether float32 could lose much: the damped matrix's condition number is at most channels / damping + 1."""
    rough = channels * torch.finfo(torch.float32).eps > damping * _SINGLE_ERROR
    return rough and channels <= _DOUBLE_UP_TO and device.type != "mps"


def _inverse_lower(lower: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """Invert a lower triangular matrix by products of its parts, which run faster than a solver does."""
    if len(lower) <= _TRIANGLE:
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return solved
    half = len(lower) // 2
    inverse = torch.zeros_like(lower)
    first, last = inverse[:half, :half], inverse[half:, half:]
    first.copy_(_inverse_lower(lower[:half, :half]))
    last.copy_(_inverse_lower(lower[half:, half:]))
    torch.matmul(last @ lower[half:, :half], first, out=inverse[half:, :half]).neg_()
    return inverse


def damped(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    """Return G + damping * mean(diag G) I, a new matrix, with 1 on the diagonal of channels that were always 0."""
    return _damp(gram.clone(), damping)


def _damp(gram: Float[Tensor, "K K"], damping: float) -> Float[Tensor, "K K"]:
    diagonal = torch.diagonal(gram)
    diagonal += torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
    return gram


def gptq_codes(
    weights: Float[Tensor, "*problems N K"], parameters: BlockParameters, spec: QuantSpec, inverse: InverseCholesky
) -> Float[Tensor, "*problems N K"]:
    """Choose codes, integers in float32, column by column in the order of ``inverse``; of E matrices at once or of one.

    q_k = Q(w_k), e = (w_k - q_k) / U_kk, and w_j -= U_kj e for the columns j that follow.

    Args:
        weights: the weights, times their input scales.
        parameters: their scales and zero points.
        spec: the format that they are stored in.
        inverse: U of each, and the order of its columns.
    """
    if weights.ndim == 2:
        alone = InverseCholesky(order=inverse.order[None], upper=inverse.upper[None])
        return gptq_codes(weights[None], side_by_side([parameters]), spec, alone)[0]
    in_features = weights.shape[2]
    columns = inverse.order // spec.block_size(in_features)
    pending = _in_order(weights, inverse.order)
    scales = _in_order(parameters.scales, columns)
    if parameters.zero_points is not None:  # from here on weights count from code 0, as codes do
        pending = torch.addcmul(pending, _in_order(parameters.zero_points, columns), scales)
    codes = torch.empty_like(pending)
    for start in range(0, in_features, _TILE):
        tile = slice(start, min(start + _TILE, in_features))
        errors = _tile_codes(pending[tile], scales[tile], inverse.upper[:, tile, tile], spec, codes[tile])
        _compensate_behind(pending[tile.stop :], inverse.upper[:, tile, tile.stop :], errors)
    result = torch.empty_like(codes)
    for index, order in enumerate(inverse.order):
        result[order, index] = codes[:, index]
    return result.permute(1, 2, 0).contiguous()


def _compensate_behind(
    pending: Float[Tensor, "behind E N"], upper: Float[Tensor, "E done behind"], errors: Float[Tensor, "done E N"]
) -> None:
    for index, each in enumerate(upper):
        pending[:, index] -= each.T @ errors[:, index]


def _in_order(values: Float[Tensor, "E N columns"], order: Int64[Tensor, "E K"]) -> Float[Tensor, "K E N"]:
    """Return the columns of each matrix in its order: a column is a row here."""
    ordered = [each.T[columns] for each, columns in zip(values, order, strict=True)]
    return ordered[0].unsqueeze(1) if len(ordered) == 1 else torch.stack(ordered, dim=1)


def _tile_codes(
    pending: Float[Tensor, "k E N"],
    scales: Float[Tensor, "k E N"],
    upper: Float[Tensor, "E k k"],
    spec: QuantSpec,
    codes: Float[Tensor, "k E N"],
) -> Float[Tensor, "k E N"]:
    """Fill ``codes`` and return the errors e; ``pending`` is used up."""
    errors = torch.empty_like(pending)
    pulls = upper.permute(1, 2, 0).unsqueeze(-1)  # [k, k, E, 1]
    # Views of all columns at once: making one takes as long as a step of arithmetic.
    columns = zip(pending.unbind(), scales.unbind(), codes.unbind(), errors.unbind(), pulls.unbind(), strict=True)
    for index, (weight, scale, code, error, pull) in enumerate(columns):
        stop = min(index - index % _STEP + _STEP, len(pending))
        if index and index % _STEP == 0:
            _compensate_behind(pending[index:stop], upper[:, :index, index:stop], errors[:index])
        torch.div(weight, scale, out=code).round_().clamp_(spec.code_min, spec.code_max)
        torch.addcmul(weight, code, scale, value=-1, out=error).div_(pull[index])
        pending[index + 1 : stop].addcmul_(pull[index + 1 : stop], error, value=-1)
    return errors
