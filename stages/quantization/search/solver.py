"""Solve one activation group: read it, run the chosen algorithm, turn its choices into stored weights and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from stages.errors import SolveError
from stages.quantization.search.affine import spec_for
from stages.quantization.search.awq import awq_full, awq_lite
from stages.quantization.search.choices import errors_of, full_range, measured, output_energies, rtn, stored_weight
from stages.quantization.search.gptq.compensate import COMPENSATED, awq_gptq, compensate, gptq
from stages.quantization.search.objective import search_to_device
from stages.quantization.search.problem import (
    FINE_CHANNELS,
    MEASURED_CHANNELS,
    Algorithm,
    GroupProblem,
    SearchOptions,
    SiteChoice,
)
from stages.quantization.search.ranges import awq_clip
from stages.quantization.search.rounding import Rounder
from stages.records.formats import QuantSpec
from stages.records.results import ActivationStats, SearchStats, SiteReport, SolvedGroup
from stages.records.sites import ActivationGroup, MatMulSite, ValueAbsorber

_UNSEEN = "no calibration token reached it, so it was rounded to nearest; calibrate on more text to search here too"

_NOBODYS = "the router sent this expert no calibration token: it was searched on those of its whole layer"
_LOOKED_UP = "the embedding reads it too: its rows are found without an input scale, at INT8 by rounding to nearest"
_UNSCALED: Mapping[str, str] = MappingProxyType({"awq_lite": "rtn", "awq_full": "awq_clip", "awq_gptq": "gptq"})
"""What is left of each algorithm without its input scale."""


_PER_WEIGHT, _PER_RANKED, _PER_MEASURED = 15000.0, 18.0, 5.0
"""Multiplications that take as long as the passes over a weight, and products with the Gram matrix that an output
channel takes: one that input scales are ranked by, and one that errors are measured on."""
_PER_COMPENSATED, _PER_FACTORED = 2.6, 0.25
"""The same of GPTQ with two passes of descent, of any output channel; and of the factorization, of an input."""


def search_cost(group: ActivationGroup, algorithm: str) -> float:
    """Return about how many multiplications a search of ``group`` takes.

    Args:
        group: what is searched.
        algorithm: its name.
    """
    inputs, channels = group.in_features, [site.out_features for site in group.sites]
    products = sum(
        _PER_RANKED * min(each, FINE_CHANNELS) + _PER_MEASURED * min(each, MEASURED_CHANNELS) for each in channels
    )
    if algorithm in COMPENSATED:
        products += _PER_COMPENSATED * sum(channels) + _PER_FACTORED * inputs
    return inputs**2 * products + _PER_WEIGHT * inputs * sum(channels)


@dataclass(frozen=True, slots=True)
class _Found:
    """The algorithm for a group, and why it isn't the one that was asked for."""

    name: str
    algorithm: Algorithm
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSolver:
    """Solves groups with one algorithm and its options.

    ``read_weight`` reads a site's [N, K] float32 weight onto the device; ``read_stats`` gives what is minimized, by
    activation, or is None where the algorithm needs none. ``fold`` says that input scales will be folded into the
    producer where there is one; ``one_scale`` that sites of a group share a scale even where it is not folded.
    """

    algorithm_name: str
    algorithm: Algorithm
    options: SearchOptions
    specs: Mapping[str, QuantSpec]
    device: torch.device
    read_weight: Callable[[MatMulSite], Tensor]
    read_stats: Callable[[str], SearchStats] | None
    fold: bool
    one_scale: bool
    looked_up: frozenset[str] = frozenset()
    """Sites whose stored weight is an embedding's too: no input scale may be in its rows."""
    stored_weight: Callable[[MatMulSite], Tensor] | None = None
    """Gives a site's weight as its file has it, where that is possible."""

    @property
    def rounder(self) -> Rounder | None:
        """Return what does the same faster on the CPU, where weights are only rounded."""
        if (
            self.device.type != "cpu"
            or self.stored_weight is None
            or self.read_stats is not None
            or self.algorithm is not rtn
        ):
            return None
        return Rounder(
            name=self.algorithm_name,
            rule=self.options.range_rule,
            specs=self.specs,
            stored_weight=self.stored_weight,
        )

    def solve(self, group: ActivationGroup) -> SolvedGroup:
        """Quantize all sites of ``group``; by rounding to nearest where calibration never saw its activation."""
        return self.solve_posed(self.pose(group))

    def solve_posed(self, problem: GroupProblem) -> SolvedGroup:
        """Quantize all sites of a group that was read already."""
        started = time.perf_counter()
        problems = self._parts(problem)
        found = self._algorithm_for(problems)
        choices = [self._choices(found.algorithm, part) for part in problems]
        return self._solved(problem, problems, choices, found, time.perf_counter() - started)

    def solve_alike(self, groups: Sequence[ActivationGroup]) -> list[SolvedGroup]:
        """Quantize groups of the same shapes, formats and kind at once."""
        problems = [self.pose(group) for group in groups]
        started = time.perf_counter()
        parts = [self._parts(problem) for problem in problems]
        found = [self._algorithm_for(of_problem) for of_problem in parts]
        start = COMPENSATED.get(found[0].name)
        kinds = {tuple((part.specs, _shapes(part.output_grams)) for part in of_problem) for of_problem in parts}
        if start is None or len(kinds) > 1 or any(each.name != found[0].name for each in found):
            return [self.solve_posed(problem) for problem in problems]
        choices = [
            compensate(alike, self.options, [start(part, self.options) for part in alike])
            for alike in zip(*parts, strict=True)
        ]
        seconds = (time.perf_counter() - started) / len(groups)
        return [
            self._solved(problem, of_problem, of_parts, each, seconds)
            for problem, of_problem, of_parts, each in zip(
                problems, parts, zip(*choices, strict=True), found, strict=True
            )
        ]

    def _solved(
        self,
        problem: GroupProblem,
        problems: Sequence[GroupProblem],
        choices: Sequence[tuple[SiteChoice, ...]],
        found: _Found,
        seconds: float,
    ) -> SolvedGroup:
        pairs = [
            (part, index, choice)
            for part, of_part in zip(problems, choices, strict=True)
            for index, choice in enumerate(of_part)
        ]
        weights = tuple(
            stored_weight(part.group.sites[index], part.weights[index], part.specs[index], choice)
            for part, index, choice in pairs
        )
        reports = tuple(
            replace(
                _report(part, index, choice, self.options),
                algorithm=found.name,
                note=found.note,
                seconds=seconds / len(pairs),
            )
            for part, index, choice in pairs
        )
        return SolvedGroup(group=problem.group, weights=weights, reports=reports)

    def _algorithm_for(self, problems: list[GroupProblem]) -> _Found:
        """Return the algorithm with its name, and a note where it isn't the one that was asked for."""
        if any(part.is_unseen for part in problems):
            return _Found("rtn", rtn, _UNSEEN)
        if any(site.expert is not None for part in problems for site in part.group.sites):
            # The router and all experts of a node read the same values: no input scale can be folded.
            unscaled = _UNSCALED.get(self.algorithm_name, self.algorithm_name)
            return _Found(unscaled, ALGORITHMS[unscaled], _NOBODYS if problems[0].own_tokens == 0 else "")
        sites = [(site, spec) for part in problems for site, spec in zip(part.group.sites, part.specs, strict=True)]
        looked_up = [spec for site, spec in sites if site.name in self.looked_up]
        if not looked_up or self.algorithm is rtn:
            return _Found(self.algorithm_name, self.algorithm)
        name = "rtn" if all(spec.bits == 8 for spec in looked_up) else _UNSCALED.get(self.algorithm_name)
        if name is None:
            return _Found(self.algorithm_name, self.algorithm)
        return _Found(name, ALGORITHMS[name], _LOOKED_UP)

    def _choices(self, algorithm: Algorithm, problem: GroupProblem) -> tuple[SiteChoice, ...]:
        """Run ``algorithm`` and measure the errors of its choices where there are statistics."""
        choices = algorithm(problem, self.options)
        return choices if problem.stats is None else measured(problem, choices)

    def _parts(self, problem: GroupProblem) -> list[GroupProblem]:
        """Return all sites at once, or each by itself where each has its own input scale."""
        problem = replace(problem, rtn_baseline=self._choices(rtn, problem))
        return [problem] if self.fold or self.one_scale else _site_by_site(problem)

    def pose(self, group: ActivationGroup) -> GroupProblem:
        """Read the weights and statistics of ``group``."""
        found = None if self.read_stats is None else search_to_device(self.read_stats(group.activation), self.device)
        if found is not None:
            _require_width(found.tokens, group)
        absorber = group.absorber if self.fold else None
        weights = tuple(self.read_weight(site) for site in group.sites)
        return GroupProblem(
            group=group,
            weights=weights,
            specs=tuple(
                spec_for(weight, self.specs[site.name], site.dtype)
                for site, weight in zip(group.sites, weights, strict=True)
            ),
            stats=None if found is None else found.tokens,
            output_grams=tuple(None if found is None else found.output_grams.get(site.name) for site in group.sites),
            head_sharing=absorber.heads if isinstance(absorber, ValueAbsorber) else None,
            own_tokens=None if found is None else found.own_tokens,
        )


def _shapes(output_grams: Sequence[Tensor | None]) -> tuple[torch.Size | None, ...]:
    return tuple(None if gram is None else gram.shape for gram in output_grams)


def _require_width(stats: ActivationStats, group: ActivationGroup) -> None:
    """Raise SolveError where the statistics are of another width than the sites that they are for."""
    for part in (stats.calibration, stats.held_out):
        if len(part.abs_mean) != group.in_features:
            raise SolveError(
                f"The statistics of '{group.activation}' have {len(part.abs_mean)} channels and its sites take "
                f"{group.in_features}; run stages.calibrate again with --overwrite."
            )


def _site_by_site(problem: GroupProblem) -> list[GroupProblem]:
    """Make a problem of each site, so that each gets an input scale of its own."""
    return [
        replace(
            problem,
            group=replace(problem.group, sites=(site,)),
            weights=(weight,),
            specs=(spec,),
            output_grams=(output_gram,),
            rtn_baseline=(baseline,),
        )
        for site, weight, spec, output_gram, baseline in zip(
            problem.group.sites, problem.weights, problem.specs, problem.output_grams, problem.rtn_baseline, strict=True
        )
    ]


def _report(problem: GroupProblem, index: int, choice: SiteChoice, options: SearchOptions) -> SiteReport:
    site, spec, weight = problem.group.sites[index], problem.specs[index], problem.weights[index]
    report = SiteReport(
        site=site.name,
        algorithm="",
        format=spec.label,
        bytes=spec.format_bytes(site.out_features, site.in_features),
        tokens=problem.own_tokens,
        scale_family=choice.input_scale.family,
        alpha=choice.input_scale.alpha,
        mean_clip_ratio=_mean_clip_ratio(choice, full_range(weight, spec, options.range_rule, choice.input_scale)),
    )
    if problem.stats is None:
        return report
    baseline, errors = errors_of(problem.rtn_baseline[index]), errors_of(choice)
    both = (problem.stats.calibration, problem.stats.held_out)
    seen, unseen = output_energies(weight, problem.output_grams[index], both)
    return replace(
        report,
        loss_rtn=_relative(baseline.calibration, seen),
        loss=_relative(errors.calibration, seen),
        held_out_loss_rtn=_relative(baseline.held_out, unseen),
        held_out_loss=_relative(errors.held_out, unseen),
    )


def _relative(error: float, energy: float | None) -> float | None:
    """Return an output error as a part of the output's energy; None where no token was seen."""
    return None if energy is None else error / energy


def _mean_clip_ratio(choice: SiteChoice, full: SiteChoice) -> float | None:
    """Return the mean ratio of the chosen scales to those of full ranges; None where they are the same."""
    ratios = choice.parameters.scales / full.parameters.scales
    return None if bool((ratios == 1).all()) else float(ratios.mean())


ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "rtn": rtn,
        "rtn_dq": rtn,
        "awq_lite": awq_lite,
        "awq_clip": awq_clip,
        "awq_full": awq_full,
        "gptq": gptq,
        "awq_gptq": awq_gptq,
    }
)
