"""GPTQ: the rounding error of each column is compensated in the columns that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
https://arxiv.org/abs/2210.17323. Scales are fixed before (static groups), so that the order of columns is free and the
layout stays plain. ``gptq`` starts from ``awq_clip``'s ranges, ``awq_gptq`` from ``awq_full``'s input scale and ranges;
coordinate descent goes on from the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from stages.errors import SolveError
from stages.quantization.search.affine import (
    BlockParameters,
    copy_rows,
    empty_like,
    rows_of,
    stack_parameters,
)
from stages.quantization.search.awq import awq_full
from stages.quantization.search.choices import keep_validated, scaled_weight, slices
from stages.quantization.search.columns import ColumnParameters, ColumnSteps, columns_of
from stages.quantization.search.coordinate_descent import coordinate_descent, two_sided_descent
from stages.quantization.search.objective import full_gram, in_scaled_space
from stages.quantization.search.problem import Algorithm, GroupProblem, SearchOptions, SiteChoice
from stages.quantization.search.ranges import awq_clip
from stages.records.formats import QuantSpec

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
    return compensate([problem], options, [awq_clip(problem, options)])[0]


def awq_gptq(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Keep ``awq_full``'s input scale and ranges and choose codes that compensate for each other's errors."""
    return compensate([problem], options, [awq_full(problem, options)])[0]


COMPENSATED: Mapping[str, Algorithm] = MappingProxyType({"gptq": awq_clip, "awq_gptq": awq_full})
"""What ``compensate`` starts from in each algorithm that ends with it."""


def compensate(
    problems: Sequence[GroupProblem], options: SearchOptions, choices: Sequence[tuple[SiteChoice, ...]]
) -> list[tuple[SiteChoice, ...]]:
    """Run GPTQ and coordinate descent from ``choices``; keep the result at the sites where held-out tokens agree.

    Args:
        problems: groups with statistics, of the same shapes and formats: columns are visited in all of them at once. In
            a small matrix a step over one column takes longer to begin than to do.
        options: damping, order of columns and passes of coordinate descent.
        choices: for each problem one a site, which must share one input scale, as those of one activation do.
    """
    grams = [_scaled_gram(problem, of_sites[0]) for problem, of_sites in _pairs(problems, choices)]
    compensation = _Compensation.over(grams, options)
    steps = [
        [_empty_steps(*each, options) for each in zip(problem.weights, problem.specs, of_sites, strict=True)]
        for problem, of_sites in _pairs(problems, choices)
    ]
    for stack in _stacks(problems[0], len(problems)):
        spec = problems[0].specs[stack[0].index]
        weights = columns_of([_stacked(problem, stack, of_sites) for problem, of_sites in _pairs(problems, choices)])
        ranges = [[rows_of(of_sites[each.index].parameters, each.rows) for each in stack] for of_sites in choices]
        found = compensation.steps(weights, ColumnParameters.of([stack_parameters(each) for each in ranges]), spec)
        for index, of_problem in enumerate(steps):
            _fill(of_problem, stack, [step.matrix(index, spec) for step in found])
    refined = [
        [_refined(choice, of_site) for choice, of_site in zip(of_sites, of_problem, strict=True)]
        for of_sites, of_problem in zip(choices, steps, strict=True)
    ]
    if compensation.damped is not None:
        for index, output_gram in enumerate(problems[0].output_grams):
            if output_gram is not None:
                _improve_for_outputs(problems, index, refined, compensation.damped)
    return [keep_validated(problem, tuple(of_sites)) for problem, of_sites in _pairs(problems, refined)]


def _pairs(
    problems: Sequence[GroupProblem], choices: Sequence[Sequence[SiteChoice]]
) -> Iterator[tuple[GroupProblem, Sequence[SiteChoice]]]:
    return zip(problems, choices, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Codes of one matrix, and the parameters that go with them."""

    codes: Integer[Tensor, "N K"]
    parameters: BlockParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _ColumnStep:
    """Codes of several matrices, and the parameters that go with them."""

    codes: Float[Tensor, "E K N"]
    parameters: ColumnParameters

    def matrix(self, index: int, spec: QuantSpec) -> _Step:
        return _Step(codes=self.codes[index].to(spec.code_dtype).T, parameters=self.parameters.matrix(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compensation:
    """What GPTQ and the descent need of the Gram matrices, one for each matrix, whose rows may come in parts."""

    inverses: Sequence[InverseCholesky]
    damped: Float[Tensor, "E K K"] | None
    """None without a descent."""
    passes: int

    @classmethod
    def over(cls, grams: Sequence[Float[Tensor, "K K"]], options: SearchOptions) -> _Compensation:
        return cls(
            inverses=[inverse_cholesky(gram, options.damping, act_order=options.act_order) for gram in grams],
            damped=_together([damped(gram, options.damping) for gram in grams]) if options.descent_passes else None,
            passes=options.descent_passes,
        )

    def steps(
        self, weights: Float[Tensor, "E K N"], ranges: ColumnParameters, spec: QuantSpec
    ) -> tuple[_ColumnStep, ...]:
        """Return what GPTQ gives, and what the descent after it."""
        codes = gptq_codes(weights, ranges, spec, self.inverses)
        first = _ColumnStep(codes=codes, parameters=ranges)
        if self.damped is None:
            return (first,)
        codes, ranges = coordinate_descent(weights, codes, ranges, spec, self.damped, self.passes)
        return first, _ColumnStep(codes=codes, parameters=ranges)


def _improve_for_outputs(
    problems: Sequence[GroupProblem],
    index: int,
    choices: Sequence[list[SiteChoice]],
    grams: Float[Tensor, "E K K"],
) -> None:
    """Replace the choices of one site by those of a pass of descent where errors count together in each head."""
    spec, weight = problems[0].specs[index], problems[0].weights[index]
    output_grams = [gram for problem in problems if (gram := problem.output_grams[index]) is not None]
    found = [torch.empty_like(weight, dtype=spec.code_dtype) for _ in problems]
    (heads, size), at_once = output_grams[0].shape[:2], numbers_at_once(weight.device)
    for some in slices(heads, max(at_once // (size * weight.shape[1] * len(problems)), 1)):
        rows = slice(some.start * size, some.stop * size)
        starts = [(problem, of_sites[index]) for problem, of_sites in _pairs(problems, choices)]
        codes = two_sided_descent(
            columns_of([scaled_weight(problem.weights[index][rows], start.input_scale) for problem, start in starts]),
            columns_of([_codes_of(start)[rows].float() for _, start in starts]),
            ColumnParameters.of([rows_of(start.parameters, rows) for _, start in starts]),
            spec,
            grams,
            torch.stack([gram[some] for gram in output_grams]),
        )
        for into, of_matrix in zip(found, codes, strict=True):
            into[rows] = of_matrix.T.to(into.dtype)
    for of_sites, of_matrix in zip(choices, found, strict=True):
        of_sites[index] = of_sites[index].refined(of_sites[index].parameters, of_matrix)


def _together(matrices: Sequence[Float[Tensor, "K K"]]) -> Float[Tensor, "E K K"]:
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(list(matrices))


def _codes_of(choice: SiteChoice) -> Integer[Tensor, "N K"]:
    assert choice.codes is not None
    return choice.codes


def _scaled_gram(problem: GroupProblem, choice: SiteChoice) -> Float[Tensor, "K K"]:
    assert problem.stats is not None
    stats, scale = problem.stats.calibration, choice.input_scale.scale
    return full_gram(stats if scale is None else in_scaled_space(stats, scale))


def numbers_at_once(device: torch.device) -> int:
    """Return how many weights are solved as one matrix on ``device``."""
    return _STACKED_ON_CPU if device.type == "cpu" else _STACKED_ON_ACCELERATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some output channels of one site of a group."""

    index: int
    rows: slice


def _stacks(problem: GroupProblem, problems: int) -> list[list[_Rows]]:
    """Put sites of one format together: a pass over the columns of many rows takes as long as over those of few."""
    limit = numbers_at_once(problem.weights[0].device) // problems
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


def _stacked(problem: GroupProblem, stack: Sequence[_Rows], choices: Sequence[SiteChoice]) -> Float[Tensor, "N K"]:
    rows = [scaled_weight(problem.weights[each.index][each.rows], choices[0].input_scale) for each in stack]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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
            step.codes[each.rows] = of_stack.codes[part]
            copy_rows(step.parameters, each.rows, rows_of(of_stack.parameters, part))
        start = part.stop


def _refined(choice: SiteChoice, steps: Sequence[_Step]) -> SiteChoice:
    """Return the choice of the last step, every step refining the one before."""
    for step in steps:
        choice = choice.refined(step.parameters, step.codes)
    return choice


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseCholesky:
    """Upper triangular U with U^T U = (G + damping I)^-1, rows and columns of G in ``order``."""

    order: Int64[Tensor, " K"]
    upper: Float[Tensor, "K K"]


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
    weights: Float[Tensor, "E K N"], ranges: ColumnParameters, spec: QuantSpec, inverses: Sequence[InverseCholesky]
) -> Float[Tensor, "E K N"]:
    """Choose codes, integers in float32, column by column in the order of each inverse, of E matrices at once.

    q_k = Q(w_k), e = w_k - q_k, and w_j -= U_kj / U_kk e for the columns j that follow.

    Args:
        weights: the weights, times their input scales; a column is a row here.
        ranges: their scales and zero points.
        spec: the format that they are stored in.
        inverses: U of each, and the order of its columns.
    """
    problems, in_features, rows = weights.shape
    steps = ColumnSteps(min(_STEP, in_features), weights, spec, descends=False)
    reach = _together([-each.upper / torch.diagonal(each.upper).unsqueeze(1) for each in inverses])
    orders = [each.order for each in inverses]
    errors, codes = torch.empty_like(weights), torch.empty_like(weights)
    tile, scales = weights.new_empty(2, problems, min(_TILE, in_features), rows)
    for start in range(0, in_features, _TILE):
        stop = min(start + _TILE, in_features)
        for index, order in enumerate(orders):
            part = tile[index, : stop - start]
            _gather(part, scales[index, : stop - start], weights[index], ranges, index, order[start:stop], spec)
            part.addmm_(reach[index][:start, start:stop].T, errors[index, :start])
        for first in range(start, stop, _STEP):
            last = min(first + _STEP, stop)
            here, count = slice(first - start, last - start), last - first
            if first > start:
                for index, each in enumerate(reach):
                    tile[index, here].addmm_(each[start:first, first:last].T, errors[index, start:first])
            steps.pulls[:count, :count] = reach[:, first:last, first:last].permute(1, 2, 0).unsqueeze(-1)
            steps.wanted[:count] = tile[:, here].transpose(0, 1)
            steps.scales[:count] = scales[:, here].transpose(0, 1)
            steps.run(count)
            errors[:, first:last] = steps.changes[:count].transpose(0, 1)
            codes[:, first:last] = steps.codes[:count].transpose(0, 1)
    for index, order in enumerate(orders):
        torch.index_select(codes[index], 0, torch.argsort(order), out=errors[index])
    return errors


def _gather(
    columns: Float[Tensor, "k N"],
    scales: Float[Tensor, "k N"],
    weight: Float[Tensor, "K N"],
    ranges: ColumnParameters,
    index: int,
    order: Int64[Tensor, " k"],
    spec: QuantSpec,
) -> None:
    """Fill ``columns``, counted from code 0 as codes are, and their ``scales``, in ``order``."""
    blocks = order // spec.block_size(len(weight))
    torch.index_select(weight, 0, order, out=columns)
    torch.index_select(ranges.scales[index], 0, blocks, out=scales)
    if ranges.zero_points is not None:
        columns.addcmul_(ranges.zero_points[index].index_select(0, blocks), scales)
