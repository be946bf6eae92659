"""Allocate a budget: forecast every format's loss from the cache, weigh it, and choose a format for every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from stages.calibration.cache import CalibrationCache
from stages.commands.progress import progress_bar
from stages.model.directory import ModelDirectory
from stages.model.sites import find_groups
from stages.model.weights import read_weight
from stages.quantization.plan.budget import SiteCandidates, best_allocation, chosen_plan
from stages.quantization.plan.forecast import WHOLE, forecast_key, forecast_site, read_forecasts, write_forecasts
from stages.quantization.plan.plan import ModelPlan, OpenPlan
from stages.quantization.plan.plan_file import PlannedSite, plan_text
from stages.quantization.plan.rules import QuantPlan
from stages.quantization.plan.sensitivity import SensitivityMeasure, output_sections, residual_sensitivities, unmeasured
from stages.quantization.search.objective import to_device
from stages.records.formats import QuantSpec
from stages.records.results import SiteForecast
from stages.records.sites import ActivationGroup, MatMulSite


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
        UserError: its results can't be written.
    """
    undecided = plan.left_open
    assert undecided is not None, "the caller has a plan with a budget"
    groups = find_groups(model)
    forecasts = _forecast(groups, undecided.candidates, model, cache, device)
    if undecided.sensitivity == "measured":
        measure = SensitivityMeasure(
            model=model,
            directory=directory,
            cache=cache,
            device=device,
            rough_format=_rough_format(undecided.candidates),
            sections=output_sections(groups),
        )
        sensitivities = measure.measure(_open_groups(groups, undecided.candidates))
    else:
        sensitivities = residual_sensitivities(groups, {name: each.energy for name, each in forecasts.items()})
    losses = {
        each.site.name: {
            label: sensitivities.get(each.site.name, 0.0) * forecasts[each.site.name].errors[forecast_key(spec)]
            for label, spec in each.specs.items()
        }
        for each in undecided.candidates
    }
    allocation = best_allocation(undecided.candidates, undecided.budget, losses)
    labels = {name: candidate.key for name, candidate in allocation.chosen.items()}
    decided = _decided(plan, undecided, groups, labels)
    summary = _summary(undecided, decided.sites, allocation.loss)
    candidates = {each.site.name: each for each in undecided.candidates}
    lines = {name: _planned(each, labels[name], losses[name]) for name, each in candidates.items()}
    return BudgetResult(plan=decided, file_text=plan_text(lines, [summary]), summary=summary)


def needs_weights(
    groups: Sequence[ActivationGroup], candidates: Sequence[SiteCandidates], cache: CalibrationCache
) -> bool:
    """Return whether a site's errors have to be forecast: no earlier budget on the same statistics has done it.

    Args:
        groups: all sites of the model.
        candidates: the formats that each site may have.
        cache: where forecasts are kept.
    """
    return bool(_unforecast(groups, _forecast_specs(candidates), read_forecasts(cache.folder)))


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
    candidates: Sequence[SiteCandidates],
    model: ir.Model,
    cache: CalibrationCache,
    device: torch.device,
) -> dict[str, SiteForecast]:
    """Return the forecasts of all sites, and keep those that are new in the cache's folder."""
    specs = _forecast_specs(candidates)
    known = read_forecasts(cache.folder)
    missing = _unforecast(groups, specs, known)
    sections = output_sections(groups)
    found: dict[str, SiteForecast] = {}
    with progress_bar() as progress:
        for group in progress.track(missing, description="forecast", unit="groups"):
            stats = to_device(cache.read(group.activation).calibration, device)
            for site in group.sites:
                weight = read_weight(model, site, device)
                parts = sections.get(site.name, WHOLE)
                found[site.name] = forecast_site(site, weight, specs[site.name], stats, parts)
    if found:
        known |= {name: _joined(known.get(name), forecast) for name, forecast in found.items()}
        write_forecasts(cache.folder, known)
    return {name: known[name] for name in specs}


def _forecast_specs(candidates: Sequence[SiteCandidates]) -> dict[str, dict[str, QuantSpec]]:
    return {each.site.name: {forecast_key(spec): spec for spec in each.specs.values()} for each in candidates}


def _unforecast(
    groups: Sequence[ActivationGroup],
    specs: Mapping[str, Mapping[str, QuantSpec]],
    known: Mapping[str, SiteForecast],
) -> list[ActivationGroup]:
    """Return the groups with a site of which ``known`` lacks one of ``specs``."""

    def is_known(site: MatMulSite) -> bool:
        return site.name in known and set(specs[site.name]) <= set(known[site.name].errors)

    return [group for group in groups if not all(map(is_known, group.sites))]


def _joined(old: SiteForecast | None, new: SiteForecast) -> SiteForecast:
    return new if old is None else replace(new, errors={**old.errors, **new.errors})


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
    plan: ModelPlan, undecided: OpenPlan, groups: Sequence[ActivationGroup], labels: Mapping[str, str]
) -> ModelPlan:
    sites = chosen_plan(groups, undecided.candidates, labels, f"{undecided.option} spends its bytes elsewhere")
    no_sites = tuple(entry for entry in plan.sites.skipped if entry[0] not in labels)
    return replace(plan, sites=replace(sites, skipped=(*sites.skipped, *no_sites)), left_open=None)


def _summary(undecided: OpenPlan, decided: QuantPlan, loss: float) -> str:
    total = undecided.size.total_bytes([each.site for each in undecided.candidates], decided.specs)
    return (
        f"{undecided.option}: {decided.bits_per_weight:.3f} bits a weight, about {total / 1e6:,.1f} MB in all, "
        f"expected loss {loss:.4g} by --sensitivity {undecided.sensitivity}; {undecided.reachable.summary}."
    )


def _planned(candidates: SiteCandidates, label: str, losses: Mapping[str, float]) -> PlannedSite:
    """Return a line of the file: what was chosen, and what the other formats would have lost."""
    others = [f"{other} {losses.get(other, 0.0):.2g}" for other in candidates.formats if other != label]
    alternatives = f"others: {', '.join(others)}" if others else ""
    return PlannedSite(
        format=label,
        loss=float(f"{losses.get(label, 0.0):.4g}"),
        why="; ".join(filter(None, (candidates.fixed_because, alternatives))),
    )
