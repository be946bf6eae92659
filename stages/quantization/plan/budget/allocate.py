"""Allocate a budget: forecast every format's loss from the cache, and choose a format for every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from stages.calibration.cache import CalibrationCache
from stages.calibration.end_loss.sums import PROJECTIONS
from stages.calibration.expert_statistics import search_statistics
from stages.commands.progress import progress_bar
from stages.errors import OptionError
from stages.model.directory import ModelDirectory
from stages.model.sites import find_groups
from stages.model.unquantized import find_unquantized
from stages.model.weights import read_weight
from stages.quantization.plan.budget.candidates import SiteCandidates, best_allocation, chosen_experts, chosen_plan
from stages.quantization.plan.budget.forecast import Forecasts, GroupForecast, read_forecasts, write_forecasts
from stages.quantization.plan.budget.left_open import OpenPlan
from stages.quantization.plan.budget.lookups import LookupForecast
from stages.quantization.plan.budget.sensitivity import SensitivityMeasure, few_windows, unmeasured
from stages.quantization.plan.embeddings import TableCandidates, following_heads, with_tables
from stages.quantization.plan.plan import ModelPlan
from stages.quantization.plan.plan_file import PlannedSite, plan_text
from stages.quantization.search.objective import search_to_device
from stages.quantization.search.parallel import workers_on
from stages.quantization.search.problem import evenly_spaced
from stages.records.formats import EmbeddingTable, QuantSpec
from stages.records.sites import ActivationGroup, MatMulSite
from stages.system.hardware import one_thread_each

_ROWS = 512
"""Of a table, at most as many as the text's few windows have tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetResult:
    """The plan with every site decided, the same as a file, and one line about it."""

    plan: ModelPlan
    file_text: str
    summary: str


def allocate_budget(
    plan: ModelPlan,
    model: ir.Model,
    directory: ModelDirectory,
    cache: CalibrationCache,
    device: torch.device,
) -> BudgetResult:
    """Decide what ``plan`` left open.

    Args:
        plan: a plan with a budget.
        model: the base model.
        directory: where it lies.
        cache: its statistics; forecasts and sensitivities are kept beside them.
        device: where forecasts are made.

    Raises:
        CacheMismatch: the cache lacks statistics.
        GraphError: ``--sensitivity measured`` can't run the model.
        OptionError: the budget is so large that nothing would be quantized.
        UserError: its results can't be written.
    """
    undecided = plan.left_open
    assert undecided is not None, "the caller has a plan with a budget"
    groups = find_groups(model)
    opened = _open_groups(groups, undecided.candidates)
    if not opened:  # all formats are given, and the forecasts only say what they cost
        undecided = replace(undecided, sensitivity="cache")
    losses = _forecast((*groups, *plan.experts.groups), undecided, model, cache, device)
    if undecided.sensitivity == "measured":
        measure = SensitivityMeasure(
            model=model,
            directory=directory,
            cache=cache,
            device=device,
            rough_format=_rough_format(undecided.candidates),
            rule=undecided.search.rule,
        )
        factors = measure.measure(opened)
        losses = {
            name: {label: factors.get(name, 0.0) * loss for label, loss in of_site.items()}
            for name, of_site in losses.items()
        }
    in_nats = undecided.sensitivity == "measured" or cache.manifest.key.token_weights == "end loss"
    losses = _with_lookups(losses, plan, undecided, model, directory, cache, in_nats=in_nats)
    allocation = best_allocation(undecided.candidates, undecided.budget, losses)
    labels = {name: candidate.key for name, candidate in allocation.chosen.items()}
    decided = _decided(plan, undecided, model, groups, labels)
    if not decided.sites.groups:
        raise OptionError(
            f"{undecided.option} leaves every MatMul as it is: nothing would be quantized; pass a smaller one."
        )
    summary = _summary(undecided, decided, allocation.loss, in_nats=in_nats)
    lines = {
        each.name: _planned(each, labels[each.name], losses[each.name] if _counts(each, undecided) else None)
        for each in undecided.candidates
    }
    notes = [summary, *(_about_table(each, labels[each.name], losses[each.name]) for each in undecided.tables)]
    return BudgetResult(plan=decided, file_text=plan_text(lines, notes), summary=summary)


def _about_table(candidates: TableCandidates, label: str, losses: Mapping[str, float]) -> str:
    """Return a comment of the plan file, which can't choose a table's format itself."""
    plan = candidates.formats[label]
    options = "--embedding none" if plan is None else f"--embedding {plan.bits} --gather_block_size {plan.block_size}"
    others = ", ".join(f"{each} {losses.get(each, 0.0):.2g}" for each in candidates.formats)
    return f"{candidates.name}: {label} ({others}); with this file it takes {options}"


def _with_lookups(
    losses: Forecasts,
    plan: ModelPlan,
    undecided: OpenPlan,
    model: ir.Model,
    directory: ModelDirectory,
    cache: CalibrationCache,
    *,
    in_nats: bool,
) -> Forecasts:
    """Add what lookups lose: of a table of its own, or to the losses of an lm_head whose table they read.

    Forecasts are kept as others are.
    """
    search, specs = undecided.search, _specs(undecided.candidates)
    known = read_forecasts(cache.folder, search)
    added = dict(losses)

    def lookups(table: EmbeddingTable, formats: Mapping[str, QuantSpec]) -> dict[str, float]:
        kept = f"lookups of {table.weight} in {'nats' if in_nats else 'relative errors'}"
        if not set(formats) <= set(known.get(kept, {})):
            windows = _looked_up(cache, table)
            forecast = LookupForecast(model=model, directory=directory, windows=windows, rule=search.rule)
            known[kept] = known.get(kept, {}) | forecast.losses(table, formats, in_nats=in_nats)
            write_forecasts(cache.folder, search, known)
        return known[kept]

    for plan_of_table in plan.embeddings:
        head = plan_of_table.shared_with
        if head is not None and len(specs[head]) > 1:
            lost = lookups(plan_of_table.table, specs[head])
            added[head] = {label: loss + lost[label] for label, loss in losses[head].items()}
    return added | {each.name: lookups(each.table, each.specs) for each in undecided.tables}


def _looked_up(cache: CalibrationCache, table: EmbeddingTable) -> np.ndarray:
    """Return token ids to look up, [windows, length]: some of the text, or of all where there is none."""
    if cache.manifest.key.seq_len is not None:
        return few_windows(cache.read_tokens()[0])
    return np.arange(table.vocabulary)[evenly_spaced(table.vocabulary, _ROWS)][None]


def needs_weights(undecided: OpenPlan, cache: CalibrationCache) -> bool:
    """Return whether a site's losses have to be forecast: no earlier budget on the same statistics has done it.

    Args:
        undecided: the formats that each site may have.
        cache: where forecasts are kept.
    """
    return bool(_unforecast(undecided.candidates, read_forecasts(cache.folder, undecided.search)))


def unmeasured_groups(
    groups: Sequence[ActivationGroup], candidates: Sequence[SiteCandidates], cache: CalibrationCache
) -> list[ActivationGroup]:
    """Return the groups that ``--sensitivity measured`` has to run the model for.

    Args:
        groups: all sites of the model.
        candidates: the formats that each site may have.
        cache: where sensitivities are kept.
    """
    return unmeasured(cache, _open_groups(groups, candidates), _rough_format(candidates))


def _forecast(
    groups: Sequence[ActivationGroup],
    undecided: OpenPlan,
    model: ir.Model,
    cache: CalibrationCache,
    device: torch.device,
) -> Forecasts:
    """Return the forecasts of all candidates, and keep those that are new in the cache's folder."""
    search, read = undecided.search, search_statistics(model, cache, device)
    known = read_forecasts(cache.folder, search)
    missing = {site.name: each for each in _unforecast(undecided.candidates, known) for site in each.sites}
    found: Forecasts = {}
    lacking = [group for group in groups if any(site.name in missing for site in group.sites)]
    with progress_bar() as progress, one_thread_each(workers_on(device)) as pool:
        for group in progress.track(lacking, description="forecast", unit="groups"):
            forecast = GroupForecast.of(search_to_device(read(group.activation), device), search)
            for site in group.sites:
                if (each := missing.get(site.name)) is not None:
                    losses = _losses(each, site, read_weight(model, site, device), forecast, pool)
                    before = found.get(each.name, {})
                    found[each.name] = {label: before.get(label, 0.0) + loss for label, loss in losses.items()}
    if lacking:
        known |= {name: known.get(name, {}) | losses for name, losses in found.items()}
        write_forecasts(cache.folder, search, known)
    return {each.name: known.get(each.name, {}) for each in undecided.candidates}


def _losses(
    candidates: SiteCandidates, site: MatMulSite, weight: Tensor, forecast: GroupForecast, pool: Executor
) -> dict[str, float]:
    """Return what each format costs one of the candidates' sites; experts' relative errors become their mean."""
    if site.expert is None:
        return forecast.of_site(site, weight, candidates.specs, pool)
    losses = forecast.of_expert(site, weight, candidates.specs, pool)
    experts = 1 if forecast.stats.channel_weights else len(candidates.sites) / len(PROJECTIONS)
    return {label: loss / experts for label, loss in losses.items()}


def _specs(candidates: Sequence[SiteCandidates]) -> dict[str, dict[str, QuantSpec]]:
    return {each.name: each.specs for each in candidates}


def _unforecast(candidates: Sequence[SiteCandidates], known: Forecasts) -> list[SiteCandidates]:
    """Return those of which ``known`` lacks one of the formats."""
    return [each for each in candidates if not set(each.specs) <= set(known.get(each.name, {}))]


def _counts(candidates: SiteCandidates, undecided: OpenPlan) -> bool:
    """Return whether the sum of losses has those of a site: only of one with a choice a sensitivity is measured."""
    return undecided.sensitivity != "measured" or len(candidates.formats) > 1


def _open_groups(groups: Sequence[ActivationGroup], candidates: Sequence[SiteCandidates]) -> list[ActivationGroup]:
    """Return the groups with their sites that have a choice; others need no sensitivity."""
    undecided = {each.site.name for each in candidates if len(each.formats) > 1}
    parts = [replace(group, sites=tuple(site for site in group.sites if site.name in undecided)) for group in groups]
    return [group for group in parts if group.sites]


def _rough_format(candidates: Sequence[SiteCandidates]) -> Callable[[MatMulSite], QuantSpec]:
    """Return the format half way through a site's INT4 formats: an error that is no extreme."""
    formats = {each.site.name: list(each.specs.values()) for each in candidates}

    def rough(site: MatMulSite) -> QuantSpec:
        specs = formats[site.name]
        four_bit = [spec for spec in specs if spec.bits == 4] or specs
        return four_bit[len(four_bit) // 2]

    return rough


def _decided(
    plan: ModelPlan,
    undecided: OpenPlan,
    model: ir.Model,
    groups: Sequence[ActivationGroup],
    labels: Mapping[str, str],
) -> ModelPlan:
    sites = chosen_plan(groups, undecided.candidates, labels, f"{undecided.option} spends its bytes elsewhere")
    experts = chosen_experts(plan.experts, undecided.candidates, labels)
    no_sites = tuple(entry for entry in plan.sites.skipped if entry[0] not in labels)
    embeddings = with_tables(following_heads(plan.embeddings, sites.specs), undecided.tables, labels)
    quantized = {each.table.weight for each in embeddings} | experts.tables
    return replace(
        plan,
        sites=experts.joined(replace(sites, skipped=(*sites.skipped, *no_sites))),
        embeddings=embeddings,
        unquantized=find_unquantized(model, quantized, experts.stay),
        experts=experts,
        left_open=None,
    )


def _summary(undecided: OpenPlan, decided: ModelPlan, loss: float, *, in_nats: bool) -> str:
    """Return one line about what a budget gave.

    Args:
        undecided: the budget.
        decided: the formats.
        loss: the sum of the forecasts.
        in_nats: their unit; else they are relative errors.
    """
    sites = [site for each in undecided.candidates for site in each.sites]
    size = replace(undecided.size, embeddings=decided.embeddings)
    total = size.total_bytes(sites, decided.sites.specs)
    expected = f"expected KL {loss:.2g} nats a token" if in_nats else f"relative errors of {loss:.4g} in sum"
    bits = size.bits_per_weight(decided.sites)
    if not all(_counts(each, undecided) for each in undecided.candidates):
        expected += " at the sites that had a choice"
    return (
        f"{undecided.option}: {bits:.3f} bits a weight, about {total / 1e6:,.1f} MB in all, "
        f"{expected} by --sensitivity {undecided.sensitivity}; {undecided.reachable.summary}."
    )


def _planned(candidates: SiteCandidates, label: str, losses: Mapping[str, float] | None) -> PlannedSite:
    """Return a line of the file: what was chosen, and what the other formats would have lost; None: it isn't known."""
    known = losses or {}
    others = [f"{other} {known.get(other, 0.0):.2g}" for other in candidates.formats if other != label]
    alternatives = f"others: {', '.join(others)}" if others else ""
    return PlannedSite(
        format=label,
        loss=None if losses is None else float(f"{known.get(label, 0.0):.4g}"),
        why="; ".join(filter(None, (candidates.fixed_because, alternatives))),
    )
