"""One group at a time: pose the problem, run the planned algorithm, turn its choices into codes and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.records import (
    ActivationGroup,
    ActivationStats,
    MatMulSite,
    QuantSpec,
    SiteReport,
    SolvedGroup,
    TokenStats,
    ValueAbsorber,
)
from stages.solve.evaluate import full_range, output_energy, site_error, stored_weight
from stages.solve.objective import to_device
from stages.solve.problem import IDENTITY, Algorithm, GroupProblem, SearchOptions, SiteChoice
from stages.solve.rtn import rtn

_UNSEEN = "no calibration token reached it, so it was rounded to nearest; calibrate on more text to search here too"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSolver:
    """Everything that stays the same from group to group.

    ``read_weight`` gives a site's [N, K] float32 weight on the device; ``read_stats`` a group's statistics by
    activation, or is None where the algorithm needs none. ``fold`` says that input scales will be folded into the
    producer where there is one; ``one_scale`` that sites of a group share a scale even where it is not folded.
    """

    algorithm_name: str
    algorithm: Algorithm
    options: SearchOptions
    specs: Mapping[str, QuantSpec]
    device: torch.device
    read_weight: Callable[[MatMulSite], Tensor]
    read_stats: Callable[[str], ActivationStats] | None
    fold: bool
    one_scale: bool

    def solve(self, group: ActivationGroup) -> SolvedGroup:
        """Quantize all sites of ``group``; by plain rounding where calibration never saw its activation."""
        started = time.perf_counter()
        problems = self.problems(group)
        unseen = any(part.is_unseen for part in problems)
        algorithm = rtn if unseen else self.algorithm
        pairs = [
            (part, index, choice) for part in problems for index, choice in enumerate(algorithm(part, self.options))
        ]
        weights = tuple(
            stored_weight(part.group.sites[index], part.weights[index], part.specs[index], choice)
            for part, index, choice in pairs
        )
        seconds = (time.perf_counter() - started) / len(pairs)
        name, note = ("rtn", _UNSEEN) if unseen else (self.algorithm_name, "")
        reports = tuple(
            replace(_report(part, index, choice, self.options), algorithm=name, note=note, seconds=seconds)
            for part, index, choice in pairs
        )
        return SolvedGroup(group=group, weights=weights, reports=reports)

    def problems(self, group: ActivationGroup) -> list[GroupProblem]:
        """What is searched for ``group``: all its sites at once, or each alone where each has its own input scale."""
        problem = self._pose(group)
        return [problem] if self.fold or self.one_scale else _one_by_one(problem)

    def _pose(self, group: ActivationGroup) -> GroupProblem:
        stats = None
        if self.read_stats is not None:
            both = self.read_stats(group.activation)
            stats = ActivationStats(
                calibration=to_device(both.calibration, self.device), held_out=to_device(both.held_out, self.device)
            )
        absorber = group.absorber if self.fold else None
        return GroupProblem(
            group=group,
            weights=tuple(self.read_weight(site) for site in group.sites),
            specs=tuple(self.specs[site.name] for site in group.sites),
            stats=stats,
            head_sharing=absorber.heads if isinstance(absorber, ValueAbsorber) else None,
        )


def _one_by_one(problem: GroupProblem) -> list[GroupProblem]:
    """The same sites, each with an input scale of its own."""
    return [
        replace(problem, group=replace(problem.group, sites=(site,)), weights=(weight,), specs=(spec,))
        for site, weight, spec in zip(problem.group.sites, problem.weights, problem.specs, strict=True)
    ]


def _report(problem: GroupProblem, index: int, choice: SiteChoice, options: SearchOptions) -> SiteReport:
    site, spec, weight = problem.group.sites[index], problem.specs[index], problem.weights[index]
    report = SiteReport(
        site=site.name,
        algorithm="",
        format=spec.label,
        bytes=spec.stored_bytes(site.out_features, site.in_features),
        scale_family=choice.input_scale.family,
        alpha=choice.input_scale.alpha,
        mean_clip_ratio=_mean_clip_ratio(choice, full_range(weight, spec, options.range_rule, choice.input_scale)),
    )
    if problem.stats is None:
        return report
    plain = full_range(weight, spec, options.range_rule, IDENTITY)
    seen, unseen = (
        _relative_losses(weight, spec, (plain, choice), stats)
        for stats in (problem.stats.calibration, problem.stats.held_out)
    )
    return replace(report, loss_rtn=seen[0], loss=seen[1], held_out_loss_rtn=unseen[0], held_out_loss=unseen[1])


def _relative_losses(
    weight: Tensor, spec: QuantSpec, choices: tuple[SiteChoice, ...], stats: TokenStats
) -> list[float | None]:
    """Each choice's output error as a part of the output's energy; None where no token was seen."""
    energy = output_energy(weight, stats)
    return [None if energy is None else site_error(weight, spec, choice, stats) / energy for choice in choices]


def _mean_clip_ratio(choice: SiteChoice, full: SiteChoice) -> float | None:
    """How large the chosen scales are beside those of full ranges; None where they are the same."""
    ratios = choice.parameters.scales / full.parameters.scales
    return None if bool((ratios == 1).all()) else float(ratios.mean())
