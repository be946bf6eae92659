"""Run GPTQ and coordinate descent on the sites of groups, some output channels and several groups at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from stages.quantization.search.affine import BlockParameters, copy_rows, empty_like, rows_of, stack_parameters
from stages.quantization.search.awq import awq_full
from stages.quantization.search.choices import keep_validated, scaled_weight
from stages.quantization.search.gptq.codes import gptq_codes, together
from stages.quantization.search.gptq.columns import ColumnParameters, columns_of
from stages.quantization.search.gptq.coordinate_descent import coordinate_descent, two_sided_descent
from stages.quantization.search.gptq.inverse import InverseCholesky, damped, inverse_cholesky
from stages.quantization.search.gptq.stacks import Rows, make_stacks, numbers_at_once
from stages.quantization.search.objective import full_gram, in_scaled_space
from stages.quantization.search.problem import Algorithm, GroupProblem, SearchOptions, SiteChoice
from stages.quantization.search.ranges import awq_clip
from stages.quantization.weights.bitpack import slices
from stages.records.formats import QuantSpec


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
    for stack in make_stacks(problems[0], len(problems)):
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
            damped=together([damped(gram, options.damping) for gram in grams]) if options.descent_passes else None,
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


def _codes_of(choice: SiteChoice) -> Integer[Tensor, "N K"]:
    assert choice.codes is not None
    return choice.codes


def _scaled_gram(problem: GroupProblem, choice: SiteChoice) -> Float[Tensor, "K K"]:
    assert problem.stats is not None
    stats, scale = problem.stats.calibration, choice.input_scale.scale
    return full_gram(stats if scale is None else in_scaled_space(stats, scale))


def _stacked(problem: GroupProblem, stack: Sequence[Rows], choices: Sequence[SiteChoice]) -> Float[Tensor, "N K"]:
    rows = [scaled_weight(problem.weights[each.index][each.rows], choices[0].input_scale) for each in stack]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _empty_steps(weight: Tensor, spec: QuantSpec, choice: SiteChoice, options: SearchOptions) -> list[_Step]:
    """Return a place for what each step finds for all rows of a site."""
    return [
        _Step(codes=torch.empty_like(weight, dtype=spec.code_dtype), parameters=empty_like(choice.parameters))
        for _ in range(2 if options.descent_passes else 1)
    ]


def _fill(steps: Sequence[Sequence[_Step]], stack: Sequence[Rows], found: Sequence[_Step]) -> None:
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
