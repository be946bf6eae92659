"""Rules become a total plan: every site is listed, with its number format, or kept with the reason."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stages.errors import RecipeError
from stages.records import ActivationGroup, Granularity, MatMulSite, QuantSpec

_LM_HEAD = "lm_head"
_ROUTER = "router of a mixture of experts (--layers_8bit can name it)"
_SENSITIVE = re.compile(r"layers[./](\d+)[./](?:(?:attn|self_attn)[./](qkv_proj|v_proj)|mlp[./](down_proj))(?![\w])")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRules:
    """What a person asked for. ``exclude`` and ``layers_8bit`` are comma-separated patterns of site names.

    ``lm_head`` decides about the site that makes the logits whatever the patterns say; None leaves it to them.
    """

    four_bit: Granularity
    eight_bit: Granularity
    symmetric: bool
    exclude: str
    layers_8bit: str
    mixed: bool
    lm_head: Literal["4", "8", "none"] | None
    keep_mixed_because: str = ""
    """Why the sites that ``mixed`` alone would make INT8 stay as they are; empty where they become INT8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """``groups`` hold only the sites to quantize; ``specs`` has one entry for each; ``kept`` are (site, why)."""

    groups: tuple[ActivationGroup, ...]
    specs: Mapping[str, QuantSpec]
    kept: tuple[tuple[str, str], ...]

    @property
    def kept_routers(self) -> int:
        return sum(why == _ROUTER for _, why in self.kept)

    @property
    def eight_bit_sites(self) -> int:
        return sum(spec.bits == 8 for spec in self.specs.values())


def make_plan(groups: tuple[ActivationGroup, ...], rules: FormatRules) -> QuantPlan:
    """A number format for every site, or the reason why it is kept.

    Raises:
        RecipeError: a pattern matches no site, mixed precision finds no site of its rule, or no site is left.
    """
    sites = [site for group in groups for site in group.sites]
    eight_bit = _eight_bit(sites, rules)
    kept = _kept(sites, rules, eight_bit)
    quantized = tuple(_without(group, kept) for group in groups if any(site.name not in kept for site in group.sites))
    if not quantized:
        raise RecipeError(f"--exclude {rules.exclude} matches every MatMul of the model: nothing would be quantized.")
    specs = {
        site.name: QuantSpec(
            bits=8 if site.name in eight_bit else 4,
            symmetric=rules.symmetric,
            granularity=rules.eight_bit if site.name in eight_bit else rules.four_bit,
            scale_dtype=site.dtype,
        )
        for group in quantized
        for site in group.sites
    }
    return QuantPlan(groups=quantized, specs=specs, kept=tuple(kept.items()))


def _eight_bit(sites: Sequence[MatMulSite], rules: FormatRules) -> frozenset[str]:
    if rules.layers_8bit:
        chosen = set(_matches(sites, rules.layers_8bit, "--layers_8bit"))
    else:
        chosen = set(reference_mixed_rule(sites)) if rules.mixed and not rules.keep_mixed_because else set()
    if rules.lm_head is not None:
        heads = {site.name for site in sites if matches_site(_LM_HEAD, site)}
        chosen = chosen | heads if rules.lm_head == "8" else chosen - heads
    return frozenset(chosen)


def _kept(sites: Sequence[MatMulSite], rules: FormatRules, eight_bit: frozenset[str]) -> dict[str, str]:
    """Site name -> the words why it is kept; an lm_head or a router that was asked for by name is not."""
    kept = _matches(sites, rules.exclude, "--exclude")
    # Small, and a token that goes to another expert is lost: rounding routers saves nothing and costs most.
    kept |= {site.name: _ROUTER for site in sites if site.routes_experts and site.name not in {*kept, *eight_bit}}
    if rules.mixed and not rules.layers_8bit and rules.keep_mixed_because:
        kept |= dict.fromkeys(reference_mixed_rule(sites), f"--enable_mixed_quant: {rules.keep_mixed_because}")
    for site in sites:
        if not matches_site(_LM_HEAD, site):
            continue
        if rules.lm_head == "none":
            kept[site.name] = "--lm_head none"
        elif rules.lm_head is not None or site.name in eight_bit:
            kept.pop(site.name, None)
    return kept


def reference_mixed_rule(sites: Sequence[MatMulSite]) -> tuple[str, ...]:
    """The sites that NVIDIA ModelOpt's default mixed strategy stores as INT8 (graph_utils.py, 917-929).

    Of the n qkv (or v) projections in layer order, and of the n down projections: the first n // 8, the last n // 8,
    and every third of those between, starting with the first of them.

    Raises:
        RecipeError: no site has a name that the rule knows.
    """
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for site in sites:
        if (match := _SENSITIVE.search(site.name)) is not None:
            kinds[match[2] or match[3]].append((int(match[1]), site.name))
    if not kinds:
        raise RecipeError(
            "--enable_mixed_quant: no site is called layers.N/attn/qkv_proj, v_proj or layers.N/mlp/down_proj; "
            "name the sensitive sites with --layers_8bit."
        )
    return tuple(
        name
        for members in kinds.values()
        for rank, (_, name) in enumerate(sorted(members))
        if _is_sensitive(rank, len(members))
    )


def _is_sensitive(rank: int, count: int) -> bool:
    edge = count // 8
    return rank < edge or rank >= count - edge or (rank - edge) % 3 == 0


def _without(group: ActivationGroup, kept: Mapping[str, str]) -> ActivationGroup:
    """The group with its quantized sites; a kept sibling reads the same activation, which then can't be divided."""
    sites = tuple(site for site in group.sites if site.name not in kept)
    if len(sites) == len(group.sites):
        return group
    sibling = next(site.name for site in group.sites if site.name in kept)
    return replace(group, sites=sites, absorber=None, unfoldable_because=f"{sibling} reads it too and stays as it is")


def _matches(sites: Sequence[MatMulSite], patterns: str, option: str) -> dict[str, str]:
    """Names of the sites that match, each with the option and pattern that did."""
    found: dict[str, str] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        names = [site.name for site in sites if matches_site(pattern, site)]
        if not names and pattern != _LM_HEAD:
            nearest = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.1)
            raise RecipeError(f"{option}: '{pattern}' matches no site; the nearest names are {', '.join(nearest)}.")
        found |= dict.fromkeys(names, f"{option} {pattern}")
    return found


def matches_site(pattern: str, site: MatMulSite) -> bool:
    """Whether ``pattern`` is a whole part of the site's name: layers.1 matches layers.1, not layers.10.

    ``lm_head`` also means the site that makes the logits, whatever its name.
    """
    if pattern == _LM_HEAD and site.feeds_logits:
        return True
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(pattern)}(?![A-Za-z0-9_])", site.name) is not None
