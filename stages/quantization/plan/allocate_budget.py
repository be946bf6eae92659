"""Spend a budget: forecast every format's loss from the cache, weigh it, and choose a format for every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from stages.calibration.cache import CalibrationCache
from stages.commands.progress import progress_bar
from stages.commands.quantize_options import QuantizeConfig
from stages.model.directory import ModelDirectory
from stages.model.sites import find_groups
from stages.model.weights import read_weight
from stages.quantization.plan.allocate import Allocation
from stages.quantization.plan.budget import BitsBudget, SiteCandidates, chosen_plan, num_weights, spend, stored_bytes
from stages.quantization.plan.forecast import WHOLE, forecast_key, forecast_site, read_forecasts, write_forecasts
from stages.quantization.plan.plan import ModelPlan, OpenPlan
from stages.quantization.plan.plan_file import PlannedSite, plan_text
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
    config: QuantizeConfig,
    model: ir.Model,
    directory: ModelDirectory,
    cache: CalibrationCache,
    plan: ModelPlan,
    device: torch.device,
) -> BudgetResult:
    """Decide what ``plan`` left open.

    Raises:
        CacheMismatch: the cache lacks statistics.
        GraphError: ``--sensitivity measured`` can't run the model.
        UserError: its results can't be written.
    """
    left_open = plan.left_open
    assert left_open is not None, "the caller has a plan with a budget"
    groups = find_groups(model)
    forecasts = _forecast(groups, left_open.menus, model, cache, device)
    if config.sensitivity == "measured":
        measure = SensitivityMeasure(
            model=model,
            directory=directory,
            cache=cache,
            device=device,
            spec_of=_rough_format(left_open.menus),
            sections=output_sections(groups),
        )
        weights = measure.measure(_open_groups(groups, left_open.menus))
    else:
        weights = residual_sensitivities(groups, {name: forecast.energy for name, forecast in forecasts.items()})
    losses = {
        menu.site.name: {
            label: weights.get(menu.site.name, 0.0) * forecasts[menu.site.name].errors[forecast_key(spec)]
            for label, spec in _specs(menu).items()
        }
        for menu in left_open.menus
    }
    allocation = spend(left_open.menus, left_open.budget, losses)
    return _spent(config, plan, groups, allocation, losses)


def _forecast(
    groups: Sequence[ActivationGroup],
    menus: Sequence[SiteCandidates],
    model: ir.Model,
    cache: CalibrationCache,
    device: torch.device,
) -> dict[str, SiteForecast]:
    specs = _forecast_specs(menus)
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


def needs_weights(groups: Sequence[ActivationGroup], menus: Sequence[SiteCandidates], cache: CalibrationCache) -> bool:
    """Whether a site's errors have to be forecast, because no earlier budget on the same statistics has done it."""
    return bool(_unforecast(groups, _forecast_specs(menus), read_forecasts(cache.folder)))


def unmeasured_groups(
    groups: Sequence[ActivationGroup], menus: Sequence[SiteCandidates], cache: CalibrationCache
) -> list[ActivationGroup]:
    """The groups that ``--sensitivity measured`` has to run the model for."""
    return unmeasured(cache, _open_groups(groups, menus), _rough_format(menus))


def _forecast_specs(menus: Sequence[SiteCandidates]) -> dict[str, dict[str, QuantSpec]]:
    return {menu.site.name: {forecast_key(spec): spec for spec in _specs(menu).values()} for menu in menus}


def _unforecast(
    groups: Sequence[ActivationGroup],
    specs: Mapping[str, Mapping[str, QuantSpec]],
    known: Mapping[str, SiteForecast],
) -> list[ActivationGroup]:
    return [group for group in groups if not all(_knows(known, site.name, specs) for site in group.sites)]


def _knows(known: Mapping[str, SiteForecast], site: str, specs: Mapping[str, Mapping[str, QuantSpec]]) -> bool:
    return site in known and set(specs[site]) <= set(known[site].errors)


def _joined(old: SiteForecast | None, new: SiteForecast) -> SiteForecast:
    return new if old is None else replace(new, errors={**old.errors, **new.errors})


def _specs(menu: SiteCandidates) -> dict[str, QuantSpec]:
    return {label: spec for label, spec in menu.formats.items() if spec is not None}


def _open_groups(groups: Sequence[ActivationGroup], menus: Sequence[SiteCandidates]) -> list[ActivationGroup]:
    """The groups with their sites that have a choice; others need no sensitivity."""
    undecided = {menu.site.name for menu in menus if len(menu.formats) > 1}
    parts = [replace(group, sites=tuple(site for site in group.sites if site.name in undecided)) for group in groups]
    return [group for group in parts if group.sites]


def _rough_format(menus: Sequence[SiteCandidates]) -> Callable[[MatMulSite], QuantSpec]:
    """Half way through a site's INT4 formats: an error that is no extreme."""

    def rough(site: MatMulSite) -> QuantSpec:
        specs = list(_specs(next(menu for menu in menus if menu.site.name == site.name)).values())
        four_bit = [spec for spec in specs if spec.bits == 4] or specs
        return four_bit[len(four_bit) // 2]

    return rough


def _spent(
    config: QuantizeConfig,
    plan: ModelPlan,
    groups: tuple[ActivationGroup, ...],
    allocation: Allocation,
    losses: Mapping[str, Mapping[str, float]],
) -> BudgetResult:
    left_open = plan.left_open
    assert left_open is not None
    labels = {name: candidate.key for name, candidate in allocation.chosen.items()}
    kept = f"{config.budget_in_words} spends its bytes elsewhere"
    sites = chosen_plan(groups, left_open.menus, labels, kept)
    elsewhere = tuple(entry for entry in plan.sites.kept if entry[0] not in labels)
    summary = _summary(config, left_open, labels, allocation)
    lines = {menu.site.name: _line(menu, labels[menu.site.name], losses) for menu in left_open.menus}
    return BudgetResult(
        plan=replace(plan, sites=replace(sites, kept=(*sites.kept, *elsewhere))),
        file_text=plan_text(lines, [summary]),
        summary=summary,
    )


def _summary(config: QuantizeConfig, left_open: OpenPlan, labels: Mapping[str, str], allocation: Allocation) -> str:
    chosen = [
        replace(menu, formats={labels[menu.site.name]: menu.formats[labels[menu.site.name]]})
        for menu in left_open.menus
    ]
    bits = 8 * sum(stored_bytes(menu, labels[menu.site.name]) for menu in chosen) / num_weights(chosen)
    size = left_open.size
    total = size.fixed_bytes([menu.site for menu in chosen]) + sum(
        size.site_bytes(menu.site, menu.formats[labels[menu.site.name]]) for menu in chosen
    )
    reach = left_open.reach
    unit = "bits a weight" if isinstance(left_open.budget, BitsBudget) else "MB"
    scale = 1 if isinstance(left_open.budget, BitsBudget) else 1e6
    return (
        f"{config.budget_in_words}: {bits:.3f} bits a weight, about {total / 1e6:,.1f} MB in all, "
        f"expected loss {allocation.loss:.4g} by --sensitivity {config.sensitivity or 'cache'}; from "
        f"{reach.smallest / scale:,.4g} to {reach.largest / scale:,.4g} {unit} can be reached."
    )


def _line(menu: SiteCandidates, label: str, losses: Mapping[str, Mapping[str, float]]) -> PlannedSite:
    site = losses[menu.site.name]
    others = [f"{other} {site.get(other, 0.0):.2g}" for other in menu.formats if other != label]
    alternatives = f"others: {', '.join(others)}" if others else ""
    return PlannedSite(
        format=label,
        loss=float(f"{site.get(label, 0.0):.4g}"),
        why="; ".join(filter(None, (menu.fixed_because, alternatives))),
    )
