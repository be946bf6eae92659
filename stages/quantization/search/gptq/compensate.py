"""Run GPTQ and coordinate descent on the sites of groups, some output channels and several groups at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from stages.quantization.search.affine import (
    BlockParameters,
    as_stored,
    copy_rows,
    empty_like,
    rows_of,
    stack_parameters,
)
from stages.quantization.search.awq import awq_full
from stages.quantization.search.choices import keep_validated, scaled_weight
from stages.quantization.search.gptq.codes import gptq_codes, together
from stages.quantization.search.gptq.columns import ColumnParameters, columns_of
from stages.quantization.search.gptq.coordinate_descent import coordinate_descent, two_sided_descent
from stages.quantization.search.gptq.factor import damp, factor_gram
from stages.quantization.search.gptq.stacks import Rows, make_stacks, numbers_at_once
from stages.quantization.search.objective import full_gram, scaled_gram
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
    grams = [_gram_of(problem, of_sites) for problem, of_sites in _pairs(problems, choices)]
    refined = _by_gptq(problems, options, grams, choices)
    if options.descent_passes:
        refined = _by_descent(problems, options, grams, refined)
    return [keep_validated(problem, of_sites) for problem, of_sites in _pairs(problems, refined)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gram:
    """A problem's Gram matrix, and what its activation is divided by; None: ones."""

    gram: Float[Tensor, "K K"]
    input_scale: Float[Tensor, " K"] | None


def _gram_of(problem: GroupProblem, choices: Sequence[SiteChoice]) -> _Gram:
    assert problem.stats is not None
    return _Gram(gram=full_gram(problem.stats.calibration), input_scale=choices[0].input_scale.scale)


def _by_gptq(
    problems: Sequence[GroupProblem],
    options: SearchOptions,
    grams: Sequence[_Gram],
    choices: Sequence[tuple[SiteChoice, ...]],
) -> list[tuple[SiteChoice, ...]]:
    """Return ``choices`` with the codes that GPTQ finds."""
    factors = [
        factor_gram(each.gram, options.damping, act_order=options.act_order, input_scale=each.input_scale)
        for each in grams
    ]
    found = _empty_steps(problems, choices)
    for stack in _stacks(problems, choices):
        stack.fill(found, gptq_codes(stack.weights, stack.ranges, stack.spec, factors), stack.ranges)
    return _refined(choices, found)


def _by_descent(
    problems: Sequence[GroupProblem],
    options: SearchOptions,
    grams: Sequence[_Gram],
    choices: Sequence[tuple[SiteChoice, ...]],
) -> list[tuple[SiteChoice, ...]]:
    """Return ``choices`` with codes and scales after coordinate descent."""
    scaled = together([damp(scaled_gram(each.gram, each.input_scale), options.damping) for each in grams])
    found = _empty_steps(problems, choices)
    for stack in _stacks(problems, choices):
        codes = columns_of([stack.codes(of_sites) for of_sites in choices])
        better = coordinate_descent(stack.weights, codes, stack.ranges, stack.spec, scaled, options.descent_passes)
        stack.fill(found, *better)
    refined = [list(of_sites) for of_sites in _refined(choices, found)]
    for index, output_gram in enumerate(problems[0].output_grams):
        if output_gram is not None:
            _improve_for_outputs(problems, index, refined, scaled)
    return [tuple(of_sites) for of_sites in refined]


def _pairs(
    problems: Sequence[GroupProblem], choices: Sequence[tuple[SiteChoice, ...]]
) -> Iterator[tuple[GroupProblem, tuple[SiteChoice, ...]]]:
    return zip(problems, choices, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Codes of one matrix, and the parameters that go with them."""

    codes: Integer[Tensor, "N K"]
    parameters: BlockParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """Some output channels of sites of one format, of all problems: weights under their scales, and their ranges."""

    rows: Sequence[Rows]
    spec: QuantSpec
    weights: Float[Tensor, "E K N"]
    ranges: ColumnParameters

    def codes(self, choices: Sequence[SiteChoice]) -> Float[Tensor, "N K"]:
        """Return the codes of one problem's choices."""
        return torch.cat([_codes_of(choices[each.index])[each.rows].float() for each in self.rows])

    def fill(
        self, found: Sequence[Sequence[_Step]], codes: Float[Tensor, "E K N"], parameters: ColumnParameters
    ) -> None:
        """Put what was found for these channels in its place of each problem and site."""
        for index, of_problem in enumerate(found):
            stored, of_matrix = as_stored(codes[index], self.spec).T, parameters.matrix(index)
            start = 0
            for each in self.rows:
                part = slice(start, start + each.rows.stop - each.rows.start)
                of_problem[each.index].codes[each.rows] = stored[part]
                copy_rows(of_problem[each.index].parameters, each.rows, rows_of(of_matrix, part))
                start = part.stop


def _stacks(problems: Sequence[GroupProblem], choices: Sequence[tuple[SiteChoice, ...]]) -> Iterator[_Stack]:
    """Yield what is solved as one matrix, one after another."""
    for rows in make_stacks(problems[0], len(problems)):
        ranges = [
            stack_parameters([rows_of(of_sites[each.index].parameters, each.rows) for each in rows])
            for of_sites in choices
        ]
        yield _Stack(
            rows=rows,
            spec=problems[0].specs[rows[0].index],
            weights=columns_of(
                [_weights_of(problem, rows, of_sites) for problem, of_sites in _pairs(problems, choices)]
            ),
            ranges=ColumnParameters.of(ranges),
        )


def _weights_of(problem: GroupProblem, rows: Sequence[Rows], choices: Sequence[SiteChoice]) -> Float[Tensor, "N K"]:
    parts = [scaled_weight(problem.weights[each.index][each.rows], choices[0].input_scale) for each in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _empty_steps(
    problems: Sequence[GroupProblem], choices: Sequence[tuple[SiteChoice, ...]]
) -> list[tuple[_Step, ...]]:
    """Return a place for what is found for each site of each problem."""
    return [
        tuple(
            _Step(codes=torch.empty_like(weight, dtype=spec.code_dtype), parameters=empty_like(choice.parameters))
            for weight, spec, choice in zip(problem.weights, problem.specs, of_sites, strict=True)
        )
        for problem, of_sites in _pairs(problems, choices)
    ]


def _refined(
    choices: Sequence[tuple[SiteChoice, ...]], found: Sequence[tuple[_Step, ...]]
) -> list[tuple[SiteChoice, ...]]:
    return [
        tuple(choice.refined(step.parameters, step.codes) for choice, step in zip(of_sites, of_problem, strict=True))
        for of_sites, of_problem in zip(choices, found, strict=True)
    ]


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
        starts = [(problem, of_sites[index]) for problem, of_sites in zip(problems, choices, strict=True)]
        codes = two_sided_descent(
            columns_of([scaled_weight(problem.weights[index][rows], start.input_scale) for problem, start in starts]),
            columns_of([_codes_of(start)[rows].float() for _, start in starts]),
            ColumnParameters.of([rows_of(start.parameters, rows) for _, start in starts]),
            spec,
            grams,
            torch.stack([gram[some] for gram in output_grams]),
        )
        for into, of_matrix in zip(found, codes, strict=True):
            into[rows] = as_stored(of_matrix, spec).T
    for of_sites, of_matrix in zip(choices, found, strict=True):
        of_sites[index] = of_sites[index].refined(of_sites[index].parameters, of_matrix)


def _codes_of(choice: SiteChoice) -> Integer[Tensor, "N K"]:
    assert choice.codes is not None
    return choice.codes
