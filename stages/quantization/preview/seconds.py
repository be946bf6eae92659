"""Estimate how long a search takes: search one group of each shape with random numbers, and scale its time."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stages.calibration.capture import TextShape
from stages.calibration.statistics import StatisticsSize
from stages.commands.quantize_options import QuantizeConfig
from stages.quantization.plan.plan import ModelPlan
from stages.quantization.plan.recipe import group_solver
from stages.quantization.preview.costs import seconds_of
from stages.quantization.search.parallel import small_groups, solve_groups, workers_on
from stages.quantization.search.solver import GroupSolver, search_cost
from stages.records.results import ActivationStats, SearchStats, TokenStats
from stages.records.sites import ActivationGroup, MatMulSite

_TIMED = 6e10
"""The ``search_cost`` of a timed group, at most: a dry run shall take seconds."""
_WARM_UP = 5e7
"""The same of a group that is searched first, so that starting the device isn't timed."""
_BLOCK = 256
"""Inputs are cut to multiples of the largest block."""
_FINER, _SMALLEST = 0.9, 1e-3
"""What inputs and outputs are cut by at a time, and at most."""


def search_seconds(
    config: QuantizeConfig, plan: ModelPlan, text: TextShape | None, device: torch.device
) -> dict[str, float]:
    """Estimate the seconds of the search by site; those of an activation's sites are shared by size.

    Args:
        config: names the algorithm and its options.
        plan: the groups that are searched, and their formats.
        text: the calibration text; None where the algorithm reads no statistics.
        device: where the search runs.
    """
    given = {} if plan.imported is None else plan.imported.sites
    groups = [group for group in plan.sites.groups if group.sites[0].name not in given]
    if not groups:
        return {}
    workers = workers_on(device)
    small = set(small_groups(groups, device))

    def cost(group: ActivationGroup) -> float:
        return _weights(group) if text is None else search_cost(group, config.search_algorithm)

    def timed(group: ActivationGroup, together: int) -> float:
        solver = _random_solver(config, plan, group, text, device)
        return seconds_of(lambda: list(solve_groups(solver, [group] * together)), device) / together

    timed(_shrunk(groups[0], config.search_algorithm, _WARM_UP), 1)
    seconds: dict[tuple[object, ...], float] = {}
    found: dict[str, float] = {}
    for place, group in enumerate(groups):
        together = workers if place in small else 1
        shape = (
            together,
            group.in_features,
            *((site.out_features, plan.sites.specs[site.name]) for site in group.sites),
        )
        if shape not in seconds:
            smaller = _shrunk(group, config.search_algorithm, _TIMED)
            seconds[shape] = timed(smaller, together) * cost(group) / cost(smaller)
        channels = sum(site.out_features for site in group.sites)
        found |= {site.name: seconds[shape] * site.out_features / channels for site in group.sites}
    return found


def _shrunk(group: ActivationGroup, algorithm: str, limit: float) -> ActivationGroup:
    """Return ``group`` where its ``search_cost`` is at most ``limit``; else about so large, its inputs and outputs cut.

    Both are cut by the same factor, so that what grows with one of them keeps its part of the time.
    """
    factor, cut = 1.0, group
    while search_cost(cut, algorithm) > limit and factor > _SMALLEST:
        factor *= _FINER
        cut = _cut(group, factor)
    return cut


def _cut(group: ActivationGroup, factor: float) -> ActivationGroup:
    inputs = min(group.in_features, max(_BLOCK, round(group.in_features * factor / _BLOCK) * _BLOCK))
    sites = tuple(
        replace(site, in_features=inputs, out_features=math.ceil(site.out_features * factor)) for site in group.sites
    )
    # What absorbs the input scale has the shape of the whole group.
    return replace(group, in_features=inputs, sites=sites, absorber=None)


def _weights(group: ActivationGroup) -> float:
    return float(group.in_features * sum(site.out_features for site in group.sites))


def _random_solver(
    config: QuantizeConfig, plan: ModelPlan, group: ActivationGroup, text: TextShape | None, device: torch.device
) -> GroupSolver:
    """Return a solver that reads random numbers for ``group``: neither weights nor statistics need to be there yet."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        site.name: torch.randn(site.out_features, site.in_features, generator=generator).to(device)
        for site in group.sites
    }

    def read_weight(site: MatMulSite) -> Tensor:
        return weights[site.name]

    if text is None:
        stored = {name: weight.T.contiguous().T for name, weight in weights.items()}  # inputs first, as most graphs
        return group_solver(config, plan, device, read_weight, None, lambda site: stored[site.name])

    def read_stats(_: str) -> SearchStats:
        stats = ActivationStats(
            calibration=_random_stats(text.size(group, "calibration"), generator),
            held_out=_random_stats(text.size(group, "held_out"), generator),
        )
        return SearchStats(tokens=stats, channel_weights={})

    if group.sites[0].expert is not None:  # computed when their turn comes, which takes time too
        return group_solver(config, plan, device, read_weight, read_stats)
    found = read_stats(group.activation)
    return group_solver(config, plan, device, read_weight, lambda _: found)


def _random_stats(size: StatisticsSize, generator: torch.Generator) -> TokenStats:
    seen = 2 * size.in_features if size.tokens is None else size.tokens
    tokens = seen if size.keeps_rows else min(seen, 2 * size.in_features)
    rows = torch.randn(tokens, size.in_features, generator=generator)
    return TokenStats(
        num_tokens=seen,
        abs_mean=rows.abs().mean(dim=0),
        gram=None if size.keeps_rows else rows.T @ rows / tokens,
        rows=rows if size.keeps_rows else None,
    )
