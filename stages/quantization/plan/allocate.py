"""Spend a budget of bytes: one candidate for each site so that the sum of their losses is smallest.

The multiple-choice knapsack problem. Layers repeat, so costs share a large divisor and a table over all budgets is
small: dynamic programming then finds the optimum. Where the table would be too large (thousands of experts) the lower
convex hull of every site is climbed step by step, the best loss per byte first: optimal for each sum that a step ends
at, and in between no worse than the optimum by more than one step's gain (Sinha and Zoltners 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8

_LARGEST_TABLE = 100_000_000
"""Entries, one byte each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to store a site; ``key`` is the caller's name for it."""

    key: str
    cost: int
    """Bytes."""
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The candidate of every site."""

    chosen: Mapping[str, Candidate]

    @property
    def cost(self) -> int:
        return sum(candidate.cost for candidate in self.chosen.values())

    @property
    def loss(self) -> float:
        return math.fsum(candidate.loss for candidate in self.chosen.values())


Menu = Mapping[str, Sequence[Candidate]]
"""Every site's candidates; none is without."""


def smallest_cost(menu: Menu) -> int:
    """Bytes of the smallest allocation there is."""
    return sum(min(candidate.cost for candidate in candidates) for candidates in menu.values())


def largest_cost(menu: Menu) -> int:
    """Bytes of the smallest allocation with the smallest loss: a larger budget changes nothing."""
    return sum(useful(candidates)[-1].cost for candidates in menu.values())


def useful(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Ascending in cost and descending in loss: without those that another beats or equals in both."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.cost, each.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept


def allocate(menu: Menu, budget: int, largest_table: int = _LARGEST_TABLE) -> Allocation:
    """The allocation of at most ``budget`` bytes with the smallest sum of losses.

    A larger budget never gives a larger loss. Beyond ``largest_table`` entries the optimum is approached, not reached.
    Requires: ``budget`` is at least ``smallest_cost(menu)``.
    """
    spare = min(budget, largest_cost(menu)) - smallest_cost(menu)
    assert spare >= 0, "the caller has compared the budget with smallest_cost"
    ladders = {site: useful(candidates) for site, candidates in menu.items()}
    extras = [step.cost - ladder[0].cost for ladder in ladders.values() for step in ladder[1:]]
    unit = math.gcd(*extras) or 1
    if len(ladders) * (spare // unit + 1) <= largest_table:
        return Allocation(chosen=_by_table(ladders, spare // unit, unit))
    return Allocation(chosen=_by_hull(ladders, spare))


def _by_table(ladders: Mapping[str, list[Candidate]], bins: int, unit: int) -> dict[str, Candidate]:
    """best[b]: the smallest loss of the sites so far with at most b units beyond the cheapest allocation."""
    best = np.zeros(bins + 1)
    picks: list[UInt8[np.ndarray, " bins"]] = []
    for ladder in ladders.values():
        best, pick = _add_site(best, ladder, unit)
        picks.append(pick)
    chosen: dict[str, Candidate] = {}
    left = bins
    for (site, ladder), pick in reversed(list(zip(ladders.items(), picks, strict=True))):
        chosen[site] = ladder[pick[left]]
        left -= (chosen[site].cost - ladder[0].cost) // unit
    return {site: chosen[site] for site in ladders}


def _add_site(
    best: Float64[np.ndarray, " bins"], ladder: list[Candidate], unit: int
) -> tuple[Float64[np.ndarray, " bins"], UInt8[np.ndarray, " bins"]]:
    """The table with one more site, and which of its candidates each entry takes; the cheapest of equals."""
    totals = best + ladder[0].loss
    picks = np.zeros(len(best), np.uint8)
    for index, candidate in enumerate(ladder[1:], start=1):
        shift = (candidate.cost - ladder[0].cost) // unit
        if shift >= len(best):
            break
        with_it = best[: len(best) - shift] + candidate.loss
        better = with_it < totals[shift:]
        totals[shift:][better] = with_it[better]
        picks[shift:][better] = index
    return totals, picks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    site: str
    candidate: Candidate
    cost: int
    gain: float


def _by_hull(ladders: Mapping[str, list[Candidate]], spare: int) -> dict[str, Candidate]:
    """Steps along every site's hull, the most gain per byte first, up to the first that the budget can't pay."""
    steps = [step for site, ladder in ladders.items() for step in _hull_steps(site, ladder)]
    chosen = {site: ladder[0] for site, ladder in ladders.items()}
    # Sorting is stable and gains per byte fall along a hull: a site's steps stay in order.
    for step in sorted(steps, key=lambda each: -each.gain / each.cost):
        if step.cost > spare:
            break
        chosen[step.site] = step.candidate
        spare -= step.cost
    return chosen


def _hull_steps(site: str, ladder: list[Candidate]) -> list[_Step]:
    """From each corner of the lower convex hull of (cost, loss) to the next."""
    steps: list[_Step] = []
    current = 0
    while current + 1 < len(ladder):
        here = ladder[current]
        rates = [(here.loss - other.loss) / (other.cost - here.cost) for other in ladder[current + 1 :]]
        current += 1 + max(range(len(rates)), key=rates.__getitem__)
        corner = ladder[current]
        steps.append(_Step(site=site, candidate=corner, cost=corner.cost - here.cost, gain=here.loss - corner.loss))
    return steps
