"""What each site may become under a budget: the formats that are open to it, or the only one that a person left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stages.plan_file import KEEP
from stages.records import ActivationGroup, MatMulSite, QuantSpec
from stages.solve.recipe import FormatRules, NamedSites, QuantPlan, all_sites, is_lm_head, named_by_rules, plan_of
from stages.target.formats import OpenFormats


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMenu:
    """The formats that one site may have, by label; None: it stays as it is."""

    site: MatMulSite
    formats: Mapping[str, QuantSpec | None]
    fixed_because: str = ""
    """The option that left one format alone, or INT4 alone; empty where everything is open."""


def site_menus(groups: Sequence[ActivationGroup], rules: FormatRules, formats: OpenFormats) -> tuple[SiteMenu, ...]:
    """The menu of every site, in graph order. ``rules`` holds what was asked for by name; its blocks are not used.

    lm_head may stay as it is, where nobody said what becomes of it; nothing else may.

    Raises:
        RecipeError: a pattern matches no site.
    """
    sites = all_sites(groups)
    named = named_by_rules(sites, rules)
    return tuple(_menu(site, rules, formats, named) for site in sites)


def chosen_plan(
    groups: Sequence[ActivationGroup], menus: Sequence[SiteMenu], labels: Mapping[str, str], kept_because: str
) -> QuantPlan:
    """The plan that gives every site the format of its label; ``kept_because`` stands where a menu gives no reason."""
    formats = {menu.site.name: menu.formats[labels[menu.site.name]] for menu in menus}
    specs = {name: spec for name, spec in formats.items() if spec is not None}
    kept = {menu.site.name: menu.fixed_because or kept_because for menu in menus if formats[menu.site.name] is None}
    return plan_of(groups, specs, kept)


def _menu(site: MatMulSite, rules: FormatRules, formats: OpenFormats, named: NamedSites) -> SiteMenu:
    four_bit = [
        QuantSpec(bits=4, symmetric=rules.symmetric, granularity=each, scale_dtype=site.dtype)
        for each in formats.four_bit
    ]
    eight_bit = QuantSpec(
        bits=8, symmetric=rules.symmetric, granularity=formats.eight_bit or rules.eight_bit, scale_dtype=site.dtype
    )
    open_specs = four_bit if formats.eight_bit is None else [*four_bit, eight_bit]
    if site.name in named.kept:
        return SiteMenu(site=site, formats={KEEP: None}, fixed_because=named.kept[site.name])
    if site.name in named.eight_bit:
        because = "--lm_head 8" if is_lm_head(site) and rules.lm_head == "8" else "--layers_8bit"
        return SiteMenu(site=site, formats=_by_label([eight_bit]), fixed_because=because)
    if not is_lm_head(site):
        return SiteMenu(site=site, formats=_by_label(open_specs))
    if rules.lm_head == "4":
        return SiteMenu(site=site, formats=_by_label(four_bit), fixed_because="--lm_head 4")
    return SiteMenu(site=site, formats={**_by_label(open_specs), KEEP: None})


def _by_label(specs: Sequence[QuantSpec]) -> dict[str, QuantSpec | None]:
    return {spec.label: spec for spec in specs}


def may_stay(menu: SiteMenu) -> bool:
    """Whether the budget decides if the site is quantized at all."""
    return len(menu.formats) > 1 and KEEP in menu.formats


def without_keep(menu: SiteMenu) -> SiteMenu:
    """The same menu, quantized in any case."""
    return replace(menu, formats={label: spec for label, spec in menu.formats.items() if spec is not None})


def kept_only(menu: SiteMenu) -> SiteMenu:
    """The same menu, left as it is in any case."""
    return replace(menu, formats={KEEP: None})
