"""Carry out choices: codes of a site, the output error that they cause, and which choice held-out tokens confirm.

Rounding to nearest (RTN) is here too: it is the baseline that no choice may be worse than.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from stages.quantization.search.affine import (
    RangeRule,
    as_stored,
    choose_parameters,
    dequantize,
    join,
    quantize,
    round_trip,
    rows_of,
    split,
    stack_parameters,
)
from stages.quantization.search.objective import joint_errors, mixed_outputs, output_error
from stages.quantization.search.problem import (
    IDENTITY,
    MEASURED_CHANNELS,
    Errors,
    GroupProblem,
    InputScale,
    SearchOptions,
    SiteChoice,
    evenly_spaced,
)
from stages.quantization.weights.bitpack import slices
from stages.records.formats import QuantSpec, torch_float
from stages.records.results import QuantizedWeight, TokenStats
from stages.records.sites import MatMulSite

_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 1 << 22, 1 << 27
"""Elements of one temporary: about what a CPU's caches hold; a few hundred megabytes on an accelerator."""
_SMALLEST_ENERGY = 1e-30
"""Least energy that an error is divided by."""


def rtn(problem: GroupProblem, options: SearchOptions) -> tuple[SiteChoice, ...]:
    """Round every site to nearest."""
    return problem.rtn_baseline or full_ranges(problem, options.range_rule, IDENTITY)


def full_ranges(problem: GroupProblem, rule: RangeRule, input_scale: InputScale) -> tuple[SiteChoice, ...]:
    """Choose rounding to nearest for every site of a group; the other arguments are those of ``full_range``."""
    return tuple(
        full_range(weight, spec, rule, input_scale) for weight, spec in zip(problem.weights, problem.specs, strict=True)
    )


def full_range(weight: Float[Tensor, "N K"], spec: QuantSpec, rule: RangeRule, input_scale: InputScale) -> SiteChoice:
    """Choose rounding to nearest: every block keeps its full range.

    Args:
        weight: the unscaled weight.
        spec: the format that it is stored in.
        rule: how a block's full range becomes its scale.
        input_scale: what the weight is multiplied by first.
    """
    size = spec.block_size(weight.shape[1])
    parts = [
        choose_parameters(split(scaled_weight(rows, input_scale), size), spec, rule)
        for rows in torch.split(weight, rows_per_chunk(weight))
    ]
    return SiteChoice(input_scale=input_scale, parameters=stack_parameters(parts))


def scaled_weight(weight: Float[Tensor, "N K"], input_scale: InputScale) -> Float[Tensor, "N K"]:
    """Return W diag(s): what is stored under an input scale."""
    return weight if input_scale.scale is None else weight * input_scale.scale


def stored_weight(
    site: MatMulSite, weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice
) -> QuantizedWeight:
    """Return what the file will hold for one site, on the CPU.

    Args:
        site: the MatMul.
        weight: its unscaled weight.
        spec: the format that it is stored in.
        choice: its input scale, scales, zero points and codes.
    """
    zero_points, scale = choice.parameters.zero_points, choice.input_scale.scale
    return QuantizedWeight(
        site=site,
        spec=spec,
        codes=_stored_codes(weight, spec, choice).cpu(),
        scales=choice.parameters.scales.to(torch_float(spec.scale_dtype)).cpu(),
        zero_points=None if zero_points is None else zero_points.to(torch.uint8).cpu(),
        input_scale=None if scale is None else scale.cpu(),
    )


def first_validated(
    problem: GroupProblem, options: SearchOptions, ranked: Iterable[tuple[SiteChoice, ...]]
) -> tuple[SiteChoice, ...]:
    """Return the first candidate that is no worse than RTN, on calibration and on held-out tokens; else RTN.

    Refinements that are worse on held-out tokens are undone first.

    Args:
        problem: the group that is searched.
        options: how RTN is to round.
        ranked: the candidates, best first; each is made only when its turn comes.
    """
    baseline = measured(problem, rtn(problem, options))
    limits = _total_errors(baseline)
    for candidate in ranked:
        choices = keep_validated(problem, candidate)
        errors = _total_errors(choices)
        if errors.held_out <= limits.held_out and errors.calibration <= limits.calibration:
            return choices
    return baseline


def keep_validated(problem: GroupProblem, choices: tuple[SiteChoice, ...]) -> tuple[SiteChoice, ...]:
    """Return every site's choice, or its fallback where that is better on held-out tokens; all are measured.

    Nothing that is returned has a fallback any more: the question is decided, and its tensors can be freed.
    """
    return tuple(_validated(choice) for choice in measured(problem, choices))


def _validated(choice: SiteChoice) -> SiteChoice:
    if choice.fallback is None:
        return choice
    other = _validated(choice.fallback)
    return replace(choice, fallback=None) if errors_of(choice).held_out <= errors_of(other).held_out else other


def measured(problem: GroupProblem, choices: tuple[SiteChoice, ...]) -> tuple[SiteChoice, ...]:
    """Return ``choices`` and their fallbacks with their errors; what was measured is not measured again."""
    assert problem.stats is not None
    both = (problem.stats.calibration, problem.stats.held_out)
    return tuple(
        _measured(weight, output_gram, spec, choice, both)
        for weight, output_gram, spec, choice in _by_site(problem, choices)
    )


def _by_site(
    problem: GroupProblem, choices: tuple[SiteChoice, ...]
) -> Iterator[tuple[Tensor, Tensor | None, QuantSpec, SiteChoice]]:
    return zip(problem.weights, problem.output_grams, problem.specs, choices, strict=True)


def _measured(
    weight: Tensor,
    output_gram: Tensor | None,
    spec: QuantSpec,
    choice: SiteChoice,
    both: tuple[TokenStats, TokenStats],
) -> SiteChoice:
    if choice.fallback is not None:
        choice = replace(choice, fallback=_measured(weight, output_gram, spec, choice.fallback, both))
    if choice.errors is not None:
        return choice
    calibration, held_out = _site_errors(weight, output_gram, spec, choice, both)
    return replace(choice, errors=Errors(calibration=calibration, held_out=held_out))


def errors_of(choice: SiteChoice) -> Errors:
    """Return the errors of a choice that was measured."""
    assert choice.errors is not None, "not measured"
    return choice.errors


def _total_errors(choices: tuple[SiteChoice, ...]) -> Errors:
    errors = [errors_of(choice) for choice in choices]
    return Errors(
        calibration=sum(error.calibration for error in errors), held_out=sum(error.held_out for error in errors)
    )


def site_errors(problem: GroupProblem, choices: tuple[SiteChoice, ...], stats: TokenStats) -> tuple[float, ...]:
    """Return tr(H D G D^T) of every site: the mean over tokens of its squared output error, where H is the identity.

    Of a site with many output channels it is estimated from MEASURED_CHANNELS.

    Args:
        problem: the sites.
        choices: one a site.
        stats: of the activation that the sites share.
    """
    return tuple(
        _site_errors(weight, output_gram, spec, choice, (stats,))[0]
        for weight, output_gram, spec, choice in _by_site(problem, choices)
    )


def output_energies(
    weight: Float[Tensor, "N K"], output_gram: Float[Tensor, "heads size size"] | None, stats: tuple[TokenStats, ...]
) -> list[float | None]:
    """Return tr(H W G W^T) over each of ``stats``, what errors are relative to; None where no token was seen.

    Args:
        weight: the weight.
        output_gram: the diagonal blocks of H; None: the identity.
        stats: of the activation.
    """
    energies = joint_energies(weight, output_gram, stats)
    return [
        None if each.is_silent else max(energy, _SMALLEST_ENERGY) for each, energy in zip(stats, energies, strict=True)
    ]


def joint_energies(
    rows: Float[Tensor, "N K"], output_gram: Float[Tensor, "heads size size"] | None, stats: tuple[TokenStats, ...]
) -> list[float]:
    """Return tr(H R G R^T) over each of ``stats``, from as many channels of R as errors of sites are measured on.

    Args:
        rows: R, a weight or its error.
        output_gram, stats: see ``output_energies``.
    """
    return _energies(rows[_channels(rows, output_gram)], len(rows), output_gram, stats)


def candidate_errors(
    weight: Float[Tensor, "N K"],
    spec: QuantSpec,
    input_scales: Float[Tensor, "A K"],
    rule: RangeRule,
    stats: TokenStats,
) -> Float[Tensor, " A"]:
    """Return tr(D G D^T) for each of A input scales at once, in float64.

    Args:
        weight: the unscaled weight.
        spec: the format that it is stored in.
        input_scales: the candidates.
        rule: how a block's full range becomes its scale.
        stats: of the unscaled activation.
    """
    totals = torch.zeros(input_scales.shape[0], dtype=torch.float64)
    size = rows_per_chunk(weight, input_scales.shape[0])
    block_size = spec.block_size(weight.shape[1])
    for rows in torch.split(weight, size):
        blocks = split(rows * input_scales[:, None, :], block_size)  # [A, n, nB, B]
        stored = join(round_trip(blocks, choose_parameters(blocks, spec, rule), spec), weight.shape[1])
        error = stored.div_(input_scales[:, None, :]).sub_(rows)
        totals += output_error(error, stats).double().sum(dim=-1).cpu()
    return totals


def rows_per_chunk(weight: Tensor, candidates: int = 1) -> int:
    """Return how many output channels to work on at once, so that temporaries stay small whatever the layer's size."""
    budget = _CPU_ELEMENTS if weight.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(1, budget // (weight.shape[1] * candidates))


def _site_errors(
    weight: Float[Tensor, "N K"],
    output_gram: Float[Tensor, "heads size size"] | None,
    spec: QuantSpec,
    choice: SiteChoice,
    stats: tuple[TokenStats, ...],
) -> list[float]:
    some = _channels(weight, output_gram)
    return _energies(_weight_error(weight[some], spec, _rows_of(choice, some)), len(weight), output_gram, stats)


def _channels(weight: Tensor, output_gram: Tensor | None) -> slice:
    """Return which output channels stand for all: some where errors of different ones don't mix."""
    return evenly_spaced(len(weight), MEASURED_CHANNELS if output_gram is None else len(weight))


def _energies(
    rows: Float[Tensor, "n K"],
    channels: int,
    output_gram: Float[Tensor, "heads size size"] | None,
    stats: tuple[TokenStats, ...],
) -> list[float]:
    """Return tr(H R G R^T) over each of ``stats`` for the R that ``rows`` are a part of, of so many channels."""
    return [error * channels / len(rows) for error in joint_errors(mixed_outputs(rows, output_gram), stats)]


def _weight_error(weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice) -> Float[Tensor, "N K"]:
    """Return D = Q(W diag(s)) diag(1/s) - W: the error as the unscaled activation sees it."""
    codes = split(_codes(weight, spec, choice), spec.block_size(weight.shape[1]))
    stored = join(dequantize(codes, choice.parameters), weight.shape[1])
    scale = choice.input_scale.scale
    return (stored if scale is None else stored / scale) - weight


def _codes(weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice) -> Float[Tensor, "N K"]:
    """Return the codes of one site under ``choice``, integers in float32."""
    if choice.codes is not None:
        return choice.codes.float()
    blocks = split(scaled_weight(weight, choice.input_scale), spec.block_size(weight.shape[1]))
    return join(quantize(blocks, choice.parameters, spec), weight.shape[1])


def _stored_codes(weight: Float[Tensor, "N K"], spec: QuantSpec, choice: SiteChoice) -> Integer[Tensor, "N K"]:
    """Return the codes in the type that they are stored in."""
    if choice.codes is not None:
        return choice.codes
    parts = [
        as_stored(_codes(weight[chunk], spec, _rows_of(choice, chunk)), spec)
        for chunk in slices(len(weight), rows_per_chunk(weight))
    ]
    return torch.cat(parts)


def _rows_of(choice: SiteChoice, chunk: slice) -> SiteChoice:
    """Return the choice for some of the output channels."""
    return replace(
        choice,
        parameters=rows_of(choice.parameters, chunk),
        codes=None if choice.codes is None else choice.codes[chunk],
    )
