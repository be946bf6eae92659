"""Plan by rules: every site gets INT4, INT8 where options or a mixed-precision rule say so, or is skipped, with why."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from stages.commands.quantize_options import MixedRule, QuantizeConfig
from stages.errors import OptionError
from stages.quantization.targets.formats import FormatChoice
from stages.records.formats import QuantSpec
from stages.records.sites import ActivationGroup, MatMulSite, layer_of, within_layer

_LM_HEAD = "lm_head"
_ROUTER = "router of a mixture of experts (--layers_8bit can name it)"
_SENSITIVE = re.compile(r"(?:(?:self_)?attn[./](qkv_proj|v_proj)|mlp[./](down_proj))(?!\w)")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """``groups`` hold only the sites to quantize; ``specs`` has one entry for each; ``skipped`` are (node, why)."""

    groups: tuple[ActivationGroup, ...]
    specs: Mapping[str, QuantSpec]
    skipped: tuple[tuple[str, str], ...]

    @property
    def skipped_routers(self) -> int:
        return sum(why == _ROUTER for _, why in self.skipped)

    @property
    def eight_bit_sites(self) -> int:
        return sum(spec.bits == 8 for spec in self.specs.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSites:
    """The sites that a person's options decide about: INT8, or skipped for the reason that stands there."""

    eight_bit: frozenset[str]
    skipped: Mapping[str, str]


def make_plan(
    groups: tuple[ActivationGroup, ...],
    config: QuantizeConfig,
    choice: FormatChoice,
    experts: Sequence[MatMulSite] = (),
) -> QuantPlan:
    """Return a number format for every site, or the reason why it is skipped.

    Args:
        groups: all MatMuls of the model.
        config: names sites and rules.
        choice: the formats that INT4 and INT8 sites get.
        experts: those of experts, which patterns may name too.

    Raises:
        OptionError: a pattern matches no site, mixed precision finds no site of its rule, or no site is left.
    """
    sites = all_sites(groups)
    named = named_sites([*sites, *experts], config, choice)
    skipped = {site.name: named.skipped[site.name] for site in sites if site.name in named.skipped}
    experts_left = choice.experts is not None and any(site.name not in named.skipped for site in experts)
    if len(skipped) == len(sites) and not experts_left:
        raise OptionError(
            f"--exclude {_excluded(config, choice)} matches every MatMul of the model: nothing would be quantized."
        )
    return plan_of(groups, {site.name: _spec(site, choice, named) for site in sites}, skipped)


def plan_of(groups: Sequence[ActivationGroup], specs: Mapping[str, QuantSpec], skipped: Mapping[str, str]) -> QuantPlan:
    """Return the plan that gives every site its spec.

    Args:
        groups: all sites of the model.
        specs: number formats by site.
        skipped: reasons by site, for those that stay as they are whatever ``specs`` says.
    """
    quantized = tuple(_without(group, skipped) for group in groups if any(s.name not in skipped for s in group.sites))
    return QuantPlan(
        groups=quantized,
        specs={site.name: specs[site.name] for site in all_sites(quantized)},
        skipped=tuple(skipped.items()),
    )


def all_sites(groups: Sequence[ActivationGroup]) -> list[MatMulSite]:
    """Return the sites of all groups, in graph order."""
    return [site for group in groups for site in group.sites]


def named_sites(sites: Sequence[MatMulSite], config: QuantizeConfig, choice: FormatChoice) -> NamedSites:
    """Return what ``config`` says about ``sites``; ``choice`` says whether a mixed rule's sites can become INT8.

    Raises:
        OptionError: a pattern matches no site, or mixed precision finds no site of its rule.
    """
    eight_bit = _eight_bit(sites, config, choice)
    return NamedSites(eight_bit=eight_bit, skipped=_skipped(sites, config, choice, eight_bit))


def excludes_lm_head(sites: Sequence[MatMulSite], config: QuantizeConfig) -> bool:
    """Return whether ``exclude`` was given and matches lm_head.

    Raises:
        OptionError: a pattern matches no site.
    """
    excluded = _matches(sites, config.exclude or "", "--exclude")
    return any(site.is_lm_head and site.name in excluded for site in sites)


def names_lm_head(sites: Sequence[MatMulSite], config: QuantizeConfig) -> bool:
    """Return whether ``layers_8bit`` was given and matches lm_head."""
    patterns = _patterns(config.layers_8bit)
    return any(site.is_lm_head and _matches_site(pattern, site) for site in sites for pattern in patterns)


def asked_by_name(sites: Sequence[MatMulSite], config: QuantizeConfig, choice: FormatChoice) -> dict[str, QuantSpec]:
    """Return the formats of those ``sites`` that ``layers_8bit`` or ``lm_head`` names, by name."""
    named = {site.name for site in sites if any(_matches_site(each, site) for each in _patterns(config.layers_8bit))}
    heads = {site.name for site in sites if site.is_lm_head}
    eight_bit = named | (heads if config.lm_head == "8" else set())
    asked = eight_bit | (heads if config.lm_head == "4" else set())
    names = NamedSites(eight_bit=frozenset(eight_bit), skipped={})
    return {site.name: _spec(site, choice, names) for site in sites if site.name in asked}


def sensitive_sites(sites: Sequence[MatMulSite], rule: MixedRule) -> tuple[str, ...]:
    """Return the qkv (or v) and down projections that ``rule`` stores as INT8, counted by kind in layer order.

    Raises:
        OptionError: no site has a name that the rules know.
    """
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for site in sites:
        layer, match = layer_of(site.name), _SENSITIVE.match(within_layer(site.name))
        if layer is not None and match is not None:
            kinds[match[1] or match[2]].append((layer, site.name))
    if not kinds:
        raise OptionError(
            "--enable_mixed_quant: no site is called layers.N/attn/qkv_proj, v_proj or layers.N/mlp/down_proj; "
            "name the sensitive sites with --layers_8bit."
        )
    takes = _RULES[rule]
    return tuple(
        name
        for members in kinds.values()
        for rank, (_, name) in enumerate(sorted(members))
        if takes(rank, len(members))
    )


def _modelopt_takes(rank: int, count: int) -> bool:
    """Return whether NVIDIA ModelOpt's default strategy takes a layer (graph_utils.py, 917-929).

    The first and the last ``count`` // 8, and every third of those between, starting with the first of them.
    """
    edge = count // 8
    return rank < edge or rank >= count - edge or (rank - edge) % 3 == 0


def _llamacpp_takes(rank: int, count: int) -> bool:
    """Return whether llama.cpp's use_more_bits takes a layer.

    It makes Q4_K_M, and k_quant_mixed of onnxruntime-genai's builder (base.py, 1229). As many as ModelOpt's, but of
    those between the last of every three.
    """
    edge = count // 8
    return rank < edge or rank >= 7 * count // 8 or (rank - edge) % 3 == 2


_RULES: Mapping[MixedRule, Callable[[int, int], bool]] = MappingProxyType(
    {"modelopt": _modelopt_takes, "llamacpp": _llamacpp_takes}
)


def _spec(site: MatMulSite, choice: FormatChoice, named: NamedSites) -> QuantSpec:
    bits: Literal[4, 8] = 8 if site.name in named.eight_bit else 4
    return QuantSpec(
        bits=bits,
        symmetric=choice.symmetric,
        granularity=choice.eight_bit if bits == 8 else choice.four_bit,
        scale_dtype=choice.scale_dtype(site.dtype),
    )


def _eight_bit(sites: Sequence[MatMulSite], config: QuantizeConfig, choice: FormatChoice) -> frozenset[str]:
    chosen: set[str] = set()
    if config.layers_8bit:
        chosen = set(_matches(sites, config.layers_8bit, "--layers_8bit"))
    elif not choice.keep_mixed_because:
        # A thousandth of the weights; what they get wrong stays in the state for as long as it lasts.
        chosen = set() if config.has_budget else {site.name for site in sites if site.gates_state}
        if config.enable_mixed_quant:
            chosen |= set(sensitive_sites(sites, config.mixed_rule))
    heads = {site.name for site in sites if site.is_lm_head}
    if choice.lm_head == "8":
        chosen |= heads
    elif config.lm_head is not None:
        chosen -= heads
    return frozenset(chosen)


def _excluded(config: QuantizeConfig, choice: FormatChoice) -> str:
    """Return the patterns of sites that stay; lm_head is one where nobody else says what becomes of it."""
    if config.exclude is not None:
        return config.exclude
    return _LM_HEAD if choice.lm_head is None and not config.has_budget else ""


def _skipped(
    sites: Sequence[MatMulSite], config: QuantizeConfig, choice: FormatChoice, eight_bit: frozenset[str]
) -> dict[str, str]:
    """Return why a site is skipped, by name; an lm_head or a router that was asked for by name is not."""
    skipped = _matches(sites, _excluded(config, choice), "--exclude")
    # Small, and a token that goes to another expert is lost: rounding routers saves nothing and costs most.
    skipped |= {site.name: _ROUTER for site in sites if site.routes_experts and site.name not in {*skipped, *eight_bit}}
    if config.enable_mixed_quant and not config.layers_8bit and choice.keep_mixed_because:
        reason = f"--enable_mixed_quant: {choice.keep_mixed_because}"
        skipped |= dict.fromkeys(sensitive_sites(sites, config.mixed_rule), reason)
    for site in sites:
        if not site.is_lm_head:
            continue
        if config.lm_head == "none":
            skipped[site.name] = "--lm_head none"
        elif config.lm_head is not None or site.name in eight_bit:
            skipped.pop(site.name, None)
    return skipped


def _without(group: ActivationGroup, skipped: Mapping[str, str]) -> ActivationGroup:
    """Return the group with its quantized sites only.

    A skipped sibling reads the same activation, which then can't be divided.
    """
    sites = tuple(site for site in group.sites if site.name not in skipped)
    if len(sites) == len(group.sites):
        return group
    sibling = next(site.name for site in group.sites if site.name in skipped)
    return replace(group, sites=sites, absorber=None, unfoldable_because=f"{sibling} reads it too and stays as it is")


def _matches(sites: Sequence[MatMulSite], patterns: str, option: str) -> dict[str, str]:
    """Return the names of the sites that match, each with the option and pattern that did."""
    found: dict[str, str] = {}
    for pattern in _patterns(patterns):
        names = [site.name for site in sites if _matches_site(pattern, site)]
        if not names and pattern != _LM_HEAD:
            nearest = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.1)
            hint = f"the nearest names are {', '.join(nearest)}" if nearest else f"a name is {sites[0].name}"
            raise OptionError(f"{option}: '{pattern}' matches no site; {hint}.")
        found |= dict.fromkeys(names, f"{option} {pattern}")
    return found


def _patterns(typed: str) -> list[str]:
    return [pattern for part in typed.split(",") if (pattern := part.strip())]


def _matches_site(pattern: str, site: MatMulSite) -> bool:
    """Return whether ``pattern`` is a whole part of the site's name: layers.1 matches layers.1, not layers.10.

    ``lm_head`` also means the site that makes the logits, whatever its name.
    """
    if pattern == _LM_HEAD and site.is_lm_head:
        return True
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(pattern)}(?![A-Za-z0-9_])", site.name) is not None
