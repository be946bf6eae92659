"""How long a search will take: counted operations, and what this device does of each kind in a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch

from stages.config import QuantizeConfig
from stages.footprint import TextShape
from stages.planning import ModelPlan, search_options
from stages.records import ActivationGroup
from stages.solve.cost import StatisticsForm, Work, count_work, estimated_seconds, measure_rates
from stages.solve.side_by_side import small_groups, workers_on
from stages.threads import one_thread_each


def search_seconds(
    config: QuantizeConfig, plan: ModelPlan, text: TextShape | None, device: torch.device
) -> dict[str, float]:
    """Seconds by site; those of an activation's sites are shared by size. An estimate: rates are measured first.

    Groups that are solved side by side have a thread each, so that each takes its part of the workers' time.
    ``text`` is None where the algorithm reads no statistics.
    """
    groups, specs, options = plan.sites.groups, plan.sites.specs, search_options(config, plan.choice)
    workers = workers_on(device)
    small = set(small_groups(groups, workers))
    commonest = Counter(specs.values()).most_common(1)[0][0]

    measure = partial(measure_rates, device, commonest, options)
    rates = cache(partial(rates_beside, measure))
    found: dict[str, float] = {}
    for place, group in enumerate(groups):
        beside = workers if place in small else 1
        parts = _searched_together(config, group)
        works = (count_work(config.search_algorithm, part, specs, _form(part, text), options) for part in parts)
        seconds = sum(estimated_seconds(work, rates(beside)) for work in works) / beside
        channels = sum(site.out_features for site in group.sites)
        found |= {site.name: seconds * site.out_features / channels for site in group.sites}
    return found


def rates_beside(measure: Callable[[], Work], workers: int) -> Work:
    """What one of ``workers`` threads does in a second while the others do the same; one alone has all threads.

    Threads side by side share the memory's bandwidth and the interpreter: each is slower than it would be alone.
    """
    if workers == 1:
        return measure()
    with one_thread_each(workers) as pool:
        measured = [pool.submit(measure) for _ in range(workers)]
        return sum((rates.result() for rates in measured), Work()).times(1 / workers)


def _searched_together(config: QuantizeConfig, group: ActivationGroup) -> list[ActivationGroup]:
    """The group, or each site by itself where each has an input scale of its own."""
    if not config.awqlite_disable_fuse_nodes or config.awqlite_run_per_subgraph:
        return [group]
    return [replace(group, sites=(site,)) for site in group.sites]


def _form(group: ActivationGroup, text: TextShape | None) -> StatisticsForm:
    if text is None:
        return StatisticsForm()
    calibration, held_out = text.sizes(group)
    return StatisticsForm(
        calibration_rows=calibration.tokens if calibration.keeps_rows else None,
        held_out_rows=held_out.tokens if held_out.keeps_rows else None,
    )
