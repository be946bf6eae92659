"""Rules become a total plan: every site is listed, with its number format, or kept with the reason."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stages.errors import RecipeError
from stages.records import ActivationGroup, Granularity, MatMulSite, QuantSpec

_LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """``groups`` hold only the sites to quantize; ``specs`` has one entry for each; ``kept`` are (site, why)."""

    groups: tuple[ActivationGroup, ...]
    specs: Mapping[str, QuantSpec]
    kept: tuple[tuple[str, str], ...]


def make_plan(
    groups: tuple[ActivationGroup, ...], exclude: str, granularity: Granularity, *, symmetric: bool
) -> QuantPlan:
    """INT4 for every site but those that ``exclude`` (comma-separated parts of names) matches.

    Raises:
        RecipeError: a pattern matches no site, or no site is left.
    """
    sites = [site for group in groups for site in group.sites]
    kept = _matches(sites, exclude)
    quantized = tuple(_without(group, kept) for group in groups if any(site.name not in kept for site in group.sites))
    if not quantized:
        raise RecipeError(f"--exclude {exclude} matches every MatMul of the model: nothing would be quantized.")
    specs = {
        site.name: QuantSpec(bits=4, symmetric=symmetric, granularity=granularity, scale_dtype=site.dtype)
        for group in quantized
        for site in group.sites
    }
    return QuantPlan(groups=quantized, specs=specs, kept=tuple(kept.items()))


def _without(group: ActivationGroup, kept: Mapping[str, str]) -> ActivationGroup:
    """The group with its quantized sites; a kept sibling reads the same activation, which then can't be divided."""
    sites = tuple(site for site in group.sites if site.name not in kept)
    if len(sites) == len(group.sites):
        return group
    sibling = next(site.name for site in group.sites if site.name in kept)
    return replace(group, sites=sites, absorber=None, unfoldable_because=f"{sibling} reads it too and stays as it is")


def _matches(sites: list[MatMulSite], patterns: str) -> dict[str, str]:
    """Site name -> the words why it is kept."""
    kept: dict[str, str] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        names = [site.name for site in sites if matches_site(pattern, site)]
        if not names and pattern != _LM_HEAD:
            nearest = difflib.get_close_matches(pattern, [site.name for site in sites], n=3, cutoff=0.1)
            raise RecipeError(f"--exclude: '{pattern}' matches no site; the nearest names are {', '.join(nearest)}.")
        kept |= dict.fromkeys(names, f"--exclude {pattern}")
    return kept


def matches_site(pattern: str, site: MatMulSite) -> bool:
    """Whether ``pattern`` is a whole part of the site's name: layers.1 matches layers.1, not layers.10.

    ``lm_head`` also means the site that makes the logits, whatever its name.
    """
    if pattern == _LM_HEAD and site.feeds_logits:
        return True
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(pattern)}(?![A-Za-z0-9_])", site.name) is not None
