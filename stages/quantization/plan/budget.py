"""From a budget in bits a weight or in bytes to a format for every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stages.errors import OptionError
from stages.quantization.plan.allocate import Allocation, Candidate, allocate, smallest_cost
from stages.quantization.plan.plan_file import KEEP
from stages.quantization.plan.rules import (
    FormatRules,
    NamedSites,
    QuantPlan,
    all_sites,
    is_lm_head,
    named_by_rules,
    plan_of,
)
from stages.quantization.targets.formats import OpenFormats
from stages.records.formats import QuantSpec
from stages.records.sites import ActivationGroup, MatMulSite


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCandidates:
    """The formats that one site may have, by label; None: it stays as it is."""

    site: MatMulSite
    formats: Mapping[str, QuantSpec | None]
    fixed_because: str = ""
    """The option that left one format alone, or INT4 alone; empty where everything is open."""


def site_candidates(
    groups: Sequence[ActivationGroup], rules: FormatRules, formats: OpenFormats
) -> tuple[SiteCandidates, ...]:
    """The menu of every site, in graph order. ``rules`` holds what was asked for by name; its blocks are not used.

    lm_head may stay as it is, where nobody said what becomes of it; nothing else may.

    Raises:
        OptionError: a pattern matches no site.
    """
    sites = all_sites(groups)
    named = named_by_rules(sites, rules)
    return tuple(_menu(site, rules, formats, named) for site in sites)


def chosen_plan(
    groups: Sequence[ActivationGroup], menus: Sequence[SiteCandidates], labels: Mapping[str, str], kept_because: str
) -> QuantPlan:
    """The plan that gives every site the format of its label; ``kept_because`` stands where a menu gives no reason."""
    formats = {menu.site.name: menu.formats[labels[menu.site.name]] for menu in menus}
    specs = {name: spec for name, spec in formats.items() if spec is not None}
    kept = {menu.site.name: menu.fixed_because or kept_because for menu in menus if formats[menu.site.name] is None}
    return plan_of(groups, specs, kept)


def _menu(site: MatMulSite, rules: FormatRules, formats: OpenFormats, named: NamedSites) -> SiteCandidates:
    four_bit = [
        QuantSpec(bits=4, symmetric=rules.symmetric, granularity=each, scale_dtype=site.dtype)
        for each in formats.four_bit
    ]
    eight_bit = QuantSpec(
        bits=8, symmetric=rules.symmetric, granularity=formats.eight_bit or rules.eight_bit, scale_dtype=site.dtype
    )
    open_specs = four_bit if formats.eight_bit is None else [*four_bit, eight_bit]
    if site.name in named.kept:
        return SiteCandidates(site=site, formats={KEEP: None}, fixed_because=named.kept[site.name])
    if site.name in named.eight_bit:
        because = "--lm_head 8" if is_lm_head(site) and rules.lm_head == "8" else "--layers_8bit"
        return SiteCandidates(site=site, formats=_by_label([eight_bit]), fixed_because=because)
    if not is_lm_head(site):
        return SiteCandidates(site=site, formats=_by_label(open_specs))
    if rules.lm_head == "4":
        return SiteCandidates(site=site, formats=_by_label(four_bit), fixed_because="--lm_head 4")
    return SiteCandidates(site=site, formats={**_by_label(open_specs), KEEP: None})


def _by_label(specs: Sequence[QuantSpec]) -> dict[str, QuantSpec | None]:
    return {spec.label: spec for spec in specs}


def may_stay(menu: SiteCandidates) -> bool:
    """Whether the budget decides if the site is quantized at all."""
    return len(menu.formats) > 1 and KEEP in menu.formats


def without_keep(menu: SiteCandidates) -> SiteCandidates:
    """The same menu, quantized in any case."""
    return replace(menu, formats={label: spec for label, spec in menu.formats.items() if spec is not None})


def kept_only(menu: SiteCandidates) -> SiteCandidates:
    """The same menu, left as it is in any case."""
    return replace(menu, formats={KEEP: None})


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsBudget:
    """``--target_bpw``: stored bits, scales and zero points counted, a weight of the sites that are quantized."""

    bits_per_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeBudget:
    """``--target_size``: bytes of the whole model.

    ``cost`` gives the bytes that a site takes in the file under a label; ``fixed_bytes`` is everything else.
    """

    num_bytes: int
    fixed_bytes: int
    cost: Callable[[SiteCandidates, str], int]


Budget = BitsBudget | SizeBudget


Losses = Mapping[str, Mapping[str, float]]
"""Expected loss by site and label; keep has none and needs no entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The smallest and the largest value that a budget can have, in its own unit."""

    smallest: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A budget in bytes over menus whose number of quantized weights is settled."""

    menus: tuple[SiteCandidates, ...]
    cost: Callable[[SiteCandidates, str], int]
    num_bytes: int


def check_budget(menus: Sequence[SiteCandidates], budget: Budget) -> Reach:
    """The values that can be reached.

    Raises:
        OptionError: nothing would be quantized, or ``budget`` lies below the smallest.
    """
    if all(set(menu.formats) == {KEEP} for menu in menus):
        raise OptionError("--exclude matches every MatMul of the model: nothing would be quantized.")
    reach = _reach(menus, budget)
    match budget:
        case BitsBudget(bits_per_weight=bits) if bits < reach.smallest:
            raise OptionError(
                f"--target_bpw {bits:g} can't be reached: these sites can have from {reach.smallest:.4g} to "
                f"{reach.largest:.4g} bits a weight."
            )
        case SizeBudget(num_bytes=size) if size < reach.smallest:
            raise OptionError(
                f"--target_size {size / 1e6:,.1f}MB can't be reached: this model can have from "
                f"{reach.smallest / 1e6:,.1f}MB to {reach.largest / 1e6:,.1f}MB (--gather_quantize_axis 1 makes "
                "embeddings smaller, --lm_head 4 the head)."
            )
    return reach


def spend(menus: Sequence[SiteCandidates], budget: Budget, losses: Losses) -> Allocation:
    """A label for every site with the smallest sum of ``losses`` that ``budget`` allows.

    Requires: ``check_budget`` raised nothing.
    """
    found = []
    for case in _cases(menus, budget):
        candidates = _candidates(case, losses)
        if smallest_cost(candidates) <= case.num_bytes:
            found.append(allocate(candidates, case.num_bytes))
    return min(found, key=lambda allocation: allocation.loss)


def _cases(menus: Sequence[SiteCandidates], budget: Budget) -> list[_Case]:
    """A site that stays counts for no bits a weight: with it or without it are two problems, each with its bytes."""
    if isinstance(budget, SizeBudget):
        return [_Case(menus=tuple(menus), cost=budget.cost, num_bytes=budget.num_bytes - budget.fixed_bytes)]
    quantized = tuple(without_keep(menu) if may_stay(menu) else menu for menu in menus)
    kept = tuple(kept_only(menu) if may_stay(menu) else menu for menu in menus)
    variants = [quantized] if kept == tuple(menus) or quantized == tuple(menus) else [quantized, kept]
    return [
        _Case(menus=variant, cost=stored_bytes, num_bytes=int(budget.bits_per_weight * num_weights(variant) / 8))
        for variant in variants
        if num_weights(variant)
    ]


def num_weights(menus: Sequence[SiteCandidates]) -> int:
    """Weights of the sites that are quantized in any case."""
    return sum(menu.site.in_features * menu.site.out_features for menu in menus if KEEP not in menu.formats)


def stored_bytes(menu: SiteCandidates, label: str) -> int:
    """Codes, scales and zero points of the site; none where it stays as it is."""
    spec = menu.formats[label]
    return 0 if spec is None else spec.stored_bytes(menu.site.out_features, menu.site.in_features)


def _candidates(case: _Case, losses: Losses) -> dict[str, list[Candidate]]:
    return {
        menu.site.name: [
            Candidate(
                key=label,
                cost=case.cost(menu, label),
                loss=0.0 if spec is None else losses[menu.site.name][label],
            )
            for label, spec in menu.formats.items()
        ]
        for menu in case.menus
    }


def _reach(menus: Sequence[SiteCandidates], budget: Budget) -> Reach:
    if isinstance(budget, SizeBudget):
        low, high = _cost_range(menus, budget.cost)
        return Reach(smallest=float(budget.fixed_bytes + low), largest=float(budget.fixed_bytes + high))
    ends: list[float] = []
    for case in _cases(menus, budget):
        ends += [8 * total / num_weights(case.menus) for total in _cost_range(case.menus, stored_bytes)]
    return Reach(smallest=min(ends), largest=max(ends))


def _cost_range(menus: Sequence[SiteCandidates], cost: Callable[[SiteCandidates, str], int]) -> tuple[int, int]:
    """The smallest and the largest sum of the sites' costs."""
    costs = [[cost(menu, label) for label in menu.formats] for menu in menus]
    return sum(map(min, costs)), sum(map(max, costs))
