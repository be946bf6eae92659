"""Rules become a total plan: every site is listed, with its number format, or kept with the reason."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from stages.commands.quantize_options import MixedRule
from stages.errors import OptionError
from stages.records.formats import EmbeddingPlan, EmbeddingTable, Granularity, QuantSpec
from stages.records.sites import ActivationGroup, BlockAxis, GatherForm, MatMulSite, layer_of, within_layer

_SENSITIVE = re.compile(r"(?:(?:self_)?attn[./](qkv_proj|v_proj)|mlp[./](down_proj))(?!\w)")


def modelopt_takes(rank: int, count: int) -> bool:
    """NVIDIA ModelOpt's default strategy (graph_utils.py, 917-929).

    The first and the last ``count`` // 8, and every third of those between, starting with the first of them.
    """
    edge = count // 8
    return rank < edge or rank >= count - edge or (rank - edge) % 3 == 0


def llamacpp_takes(rank: int, count: int) -> bool:
    """llama.cpp's use_more_bits, which makes Q4_K_M, and k_quant_mixed of onnxruntime-genai's builder (base.py, 1229).

    As many as ModelOpt's, but of those between the last of every three.
    """
    edge = count // 8
    return rank < edge or rank >= 7 * count // 8 or (rank - edge) % 3 == 2


_RULES: Mapping[MixedRule, Callable[[int, int], bool]] = MappingProxyType(
    {"modelopt": modelopt_takes, "llamacpp": llamacpp_takes}
)


def sensitive_sites(sites: Sequence[MatMulSite], rule: MixedRule) -> tuple[str, ...]:
    """The qkv (or v) projections and down projections that ``rule`` stores as INT8, counted by kind in layer order.

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


_LM_HEAD = "lm_head"


_ROUTER = "router of a mixture of experts (--layers_8bit can name it)"


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
    mixed_rule: MixedRule
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
        OptionError: a pattern matches no site, mixed precision finds no site of its rule, or no site is left.
    """
    sites = all_sites(groups)
    named = named_by_rules(sites, rules)
    eight_bit, kept = named.eight_bit, named.kept
    if len(kept) == len(sites):
        raise OptionError(f"--exclude {rules.exclude} matches every MatMul of the model: nothing would be quantized.")
    specs = {site.name: _spec(site, rules, 8 if site.name in eight_bit else 4) for site in sites}
    return plan_of(groups, {name: spec for name, spec in specs.items() if name not in kept}, kept)


def all_sites(groups: Sequence[ActivationGroup]) -> list[MatMulSite]:
    """The sites of all groups, in graph order."""
    return [site for group in groups for site in group.sites]


def plan_of(groups: Sequence[ActivationGroup], specs: Mapping[str, QuantSpec], kept: Mapping[str, str]) -> QuantPlan:
    """The plan that gives every site its spec; sites without one are ``kept``, for the reason that stands there."""
    quantized = tuple(_without(group, kept) for group in groups if any(site.name in specs for site in group.sites))
    return QuantPlan(
        groups=quantized,
        specs={site.name: specs[site.name] for site in all_sites(quantized)},
        kept=tuple((name, why) for name, why in kept.items() if name not in specs),
    )


def _spec(site: MatMulSite, rules: FormatRules, bits: Literal[4, 8]) -> QuantSpec:
    return QuantSpec(
        bits=bits,
        symmetric=rules.symmetric,
        granularity=rules.eight_bit if bits == 8 else rules.four_bit,
        scale_dtype=site.dtype,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSites:
    """The sites that a person's rules decide about: INT8, or kept for the reason that stands there."""

    eight_bit: frozenset[str]
    kept: Mapping[str, str]


def named_by_rules(sites: Sequence[MatMulSite], rules: FormatRules) -> NamedSites:
    """What ``rules`` say about ``sites``.

    Raises:
        OptionError: a pattern matches no site, or mixed precision finds no site of its rule.
    """
    eight_bit = _eight_bit(sites, rules)
    return NamedSites(eight_bit=eight_bit, kept=_kept(sites, rules, eight_bit))


def is_lm_head(site: MatMulSite) -> bool:
    """Whether the site is called lm_head or makes the logits."""
    return matches_site(_LM_HEAD, site)


def _eight_bit(sites: Sequence[MatMulSite], rules: FormatRules) -> frozenset[str]:
    if rules.layers_8bit:
        chosen = set(_matches(sites, rules.layers_8bit, "--layers_8bit"))
    else:
        chosen = (
            set(sensitive_sites(sites, rules.mixed_rule)) if rules.mixed and not rules.keep_mixed_because else set()
        )
    if rules.lm_head is not None:
        heads = {site.name for site in sites if is_lm_head(site)}
        chosen = chosen | heads if rules.lm_head == "8" else chosen - heads
    return frozenset(chosen)


def _kept(sites: Sequence[MatMulSite], rules: FormatRules, eight_bit: frozenset[str]) -> dict[str, str]:
    """Site name -> the words why it is kept; an lm_head or a router that was asked for by name is not."""
    kept = _matches(sites, rules.exclude, "--exclude")
    # Small, and a token that goes to another expert is lost: rounding routers saves nothing and costs most.
    kept |= {site.name: _ROUTER for site in sites if site.routes_experts and site.name not in {*kept, *eight_bit}}
    if rules.mixed and not rules.layers_8bit and rules.keep_mixed_because:
        kept |= dict.fromkeys(
            sensitive_sites(sites, rules.mixed_rule), f"--enable_mixed_quant: {rules.keep_mixed_because}"
        )
    for site in sites:
        if not is_lm_head(site):
            continue
        if rules.lm_head == "none":
            kept[site.name] = "--lm_head none"
        elif rules.lm_head is not None or site.name in eight_bit:
            kept.pop(site.name, None)
    return kept


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
            raise OptionError(f"{option}: '{pattern}' matches no site; the nearest names are {', '.join(nearest)}.")
        found |= dict.fromkeys(names, f"{option} {pattern}")
    return found


def matches_site(pattern: str, site: MatMulSite) -> bool:
    """Whether ``pattern`` is a whole part of the site's name: layers.1 matches layers.1, not layers.10.

    ``lm_head`` also means the site that makes the logits, whatever its name.
    """
    if pattern == _LM_HEAD and site.feeds_logits:
        return True
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(pattern)}(?![A-Za-z0-9_])", site.name) is not None


def plan_embeddings(
    tables: Sequence[EmbeddingTable], *, axis: BlockAxis, block_size: int, form: GatherForm
) -> tuple[EmbeddingPlan, ...]:
    """The same format for every table.

    Raises:
        OptionError: there is no table.
    """
    if not tables:
        raise OptionError(
            "--gather_quantize_axis: no Gather of the model looks input_ids up in a constant rank-2 floating-point "
            "table; leave the option out."
        )
    return tuple(EmbeddingPlan(table=table, axis=axis, block_size=block_size, form=form) for table in tables)
