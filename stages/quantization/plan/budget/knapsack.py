"""Solve the multiple-choice knapsack problem: choose one candidate a site, for the smallest loss in a budget of bytes.

Dynamic programming over a table of budgets finds the optimum. Layers repeat, so that costs share a divisor; where it is
small, costs are rounded up to a larger unit, which may leave a thousandth of the range unspent. Where it would be more
(thousands of experts) the lower convex hull of every site is climbed step by step, the best loss per byte first:
optimal for each sum that a step ends at, and in between no worse than the optimum by more than one step's gain (Sinha
and Zoltners 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8

_LARGEST_TABLE = 100_000_000
"""Entries, one byte each."""
_UNSPENT = 1e-3
"""The largest part of the range of costs that rounding them up may leave unspent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to store a site; ``key`` is the caller's name for it."""

    key: str
    cost: int
    """Bytes."""
    loss: float


Candidates = Mapping[str, Sequence[Candidate]]
"""By site; none is without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The candidate of every site."""

    chosen: Mapping[str, Candidate]

    @property
    def loss(self) -> float:
        return math.fsum(candidate.loss for candidate in self.chosen.values())


def allocate(candidates: Candidates, budget: int, largest_table: int = _LARGEST_TABLE) -> Allocation:
    """Return the allocation with the smallest sum of losses; a larger budget never gives a larger sum.

    Args:
        candidates: what each site can become.
        budget: bytes of all sites together, ``smallest_cost(candidates)`` or more.
        largest_table: entries of the table, beyond which the optimum is approached, not reached.
    """
    least, most = smallest_cost(candidates), largest_cost(candidates)
    spare = min(budget, most) - least
    assert spare >= 0, "the caller has compared the budget with smallest_cost"
    fronts = {site: pareto_front(choices) for site, choices in candidates.items()}
    if spare == most - least:
        return Allocation(chosen={site: front[-1] for site, front in fronts.items()})
    extras = [step.cost - front[0].cost for front in fronts.values() for step in front[1:]]
    exact = math.gcd(*extras) or 1
    # Of the whole range, not of the budget: else a larger budget could have a coarser unit and so a larger loss.
    unit = max(exact, -(-len(fronts) * (most - least) // largest_table))
    if unit == exact or len(fronts) * unit <= _UNSPENT * (most - least):
        return Allocation(chosen=_by_table(fronts, spare // unit, unit))
    return Allocation(chosen=_by_hull(fronts, spare))


def smallest_cost(candidates: Candidates) -> int:
    """Return the bytes of the smallest allocation there is."""
    return sum(min(candidate.cost for candidate in choices) for choices in candidates.values())


def largest_cost(candidates: Candidates) -> int:
    """Return the bytes of the smallest allocation with the smallest loss: a larger budget changes nothing."""
    return sum(pareto_front(choices)[-1].cost for choices in candidates.values())


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other beats or equals in both cost and loss, ascending in cost and descending in loss."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.cost, each.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def _by_table(fronts: Mapping[str, list[Candidate]], bins: int, unit: int) -> dict[str, Candidate]:
    """Choose by best[b], the smallest loss of the sites so far with at most b units beyond the cheapest allocation."""
    best = np.zeros(bins + 1)
    picks: list[UInt8[np.ndarray, " bins"]] = []
    for front in fronts.values():
        best, pick = _add_site(best, front, unit)
        picks.append(pick)
    chosen: dict[str, Candidate] = {}
    left = bins
    for (site, front), pick in reversed(list(zip(fronts.items(), picks, strict=True))):
        chosen[site] = front[pick[left]]
        left -= _units(chosen[site], front, unit)
    return {site: chosen[site] for site in fronts}


def _units(candidate: Candidate, front: list[Candidate], unit: int) -> int:
    """Return what a candidate costs beyond the cheapest, in whole units."""
    return -(-(candidate.cost - front[0].cost) // unit)


def _add_site(
    best: Float64[np.ndarray, " bins"], front: list[Candidate], unit: int
) -> tuple[Float64[np.ndarray, " bins"], UInt8[np.ndarray, " bins"]]:
    """Return the table with one more site, and which candidate each entry takes; the cheapest of equals."""
    totals = best + front[0].loss
    picks = np.zeros(len(best), np.uint8)
    for index, candidate in enumerate(front[1:], start=1):
        shift = _units(candidate, front, unit)
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


def _by_hull(fronts: Mapping[str, list[Candidate]], spare: int) -> dict[str, Candidate]:
    """Step along every site's hull, the most gain per byte first, up to the first that the budget can't pay."""
    steps = [step for site, front in fronts.items() for step in _hull_steps(site, front)]
    chosen = {site: front[0] for site, front in fronts.items()}
    # Sorting is stable and gains per byte fall along a hull: a site's steps stay in order.
    for step in sorted(steps, key=lambda each: -each.gain / each.cost):
        if step.cost > spare:
            break
        chosen[step.site] = step.candidate
        spare -= step.cost
    return chosen


def _hull_steps(site: str, front: list[Candidate]) -> list[_Step]:
    """Return the steps from each corner of the lower convex hull of (cost, loss) to the next."""
    steps: list[_Step] = []
    current = 0
    while current + 1 < len(front):
        here = front[current]
        rates = [(here.loss - other.loss) / (other.cost - here.cost) for other in front[current + 1 :]]
        current += 1 + max(range(len(rates)), key=rates.__getitem__)
        corner = front[current]
        steps.append(_Step(site=site, candidate=corner, cost=corner.cost - here.cost, gain=here.loss - corner.loss))
    return steps
