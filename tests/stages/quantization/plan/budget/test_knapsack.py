import random
from itertools import pairwise

import pytest

from stages.quantization.plan.budget.knapsack import (
    Allocation,
    Candidate,
    Candidates,
    allocate,
    largest_cost,
    pareto_front,
    smallest_cost,
)
from tests.reference.knapsack import lower_bound, smallest_loss

HULL_ONLY = 1
"""A table of one entry holds nothing: the hull decides."""


def _random_candidates(seed: int, sites: int = 6, unit: int = 1) -> dict[str, list[Candidate]]:
    draw = random.Random(seed)
    return {
        f"site{index}": [
            Candidate(key=f"{place}", cost=unit * draw.randint(1, 40), loss=draw.random() ** 3)
            for place in range(draw.randint(1, 4))
        ]
        for index in range(sites)
    }


def _cost(allocation: Allocation) -> int:
    return sum(candidate.cost for candidate in allocation.chosen.values())


def _pairs(choices: Candidates) -> list[list[tuple[int, float]]]:
    return [[(candidate.cost, candidate.loss) for candidate in site] for site in choices.values()]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("unit", [1, 96])
def test_the_table_finds_the_optimum(seed: int, unit: int) -> None:
    candidates = _random_candidates(seed, unit=unit)
    low, high = smallest_cost(candidates), largest_cost(candidates)
    for budget in {low, low + 1, (low + high) // 2, high - 1, high, high + 7}:
        if budget < low:
            continue
        found = allocate(candidates, budget)
        assert _cost(found) <= budget
        # Sums of the same six numbers in another order.
        assert found.loss == pytest.approx(smallest_loss(_pairs(candidates), budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_costs_without_a_divisor_leave_a_thousandth_unspent_at_most(seed: int) -> None:
    draw = random.Random(seed)
    candidates = {
        site: [
            Candidate(key=each.key, cost=10_000 * each.cost + draw.randint(0, 9), loss=each.loss) for each in choices
        ]
        for site, choices in _random_candidates(seed).items()
    }
    low, high = smallest_cost(candidates), largest_cost(candidates)
    # Six sites, and units of a little less than a six-thousandth of the range.
    table, unspent = 6 * 6500, (high - low) // 1000
    for budget in range(low + unspent, high + 1, max((high - low) // 7, 1)):
        found = allocate(candidates, budget, largest_table=table)
        assert _cost(found) <= budget
        best, with_less = (smallest_loss(_pairs(candidates), each) for each in (budget, budget - unspent))
        assert best - 1e-12 <= found.loss <= with_less + 1e-12
    assert _cost(allocate(candidates, high, largest_table=table)) == high


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_no_further_from_the_optimum_than_one_step(seed: int) -> None:
    candidates = _random_candidates(seed)
    low, high = smallest_cost(candidates), largest_cost(candidates)
    fronts = [pareto_front(site) for site in candidates.values()]
    step = max(front[0].loss - front[-1].loss for front in fronts)
    for budget in range(low, high + 1, max((high - low) // 7, 1)):
        found = allocate(candidates, budget, largest_table=HULL_ONLY)
        best = smallest_loss(_pairs(candidates), budget)
        assert _cost(found) <= budget
        # 1e-12: rounding of sums.
        assert best - 1e-12 <= found.loss <= best + step + 1e-12


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("largest_table", [10**8, HULL_ONLY])
def test_a_larger_budget_never_gives_a_larger_loss(seed: int, largest_table: int) -> None:
    candidates = _random_candidates(seed, sites=12)
    budgets = range(smallest_cost(candidates), largest_cost(candidates) + 10)
    losses = [allocate(candidates, budget, largest_table).loss for budget in budgets]
    # 1e-12: sums of the same numbers in another order.
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))


def test_ends_of_the_range() -> None:
    candidates = _random_candidates(3)
    assert _cost(allocate(candidates, smallest_cost(candidates))) == smallest_cost(candidates)
    best = sum(min(candidate.loss for candidate in site) for site in candidates.values())
    assert allocate(candidates, 10**9).loss == pytest.approx(best, rel=1e-12)
    assert _cost(allocate(candidates, 10**9)) == largest_cost(candidates)


def test_what_costs_more_and_is_no_better_is_no_candidate() -> None:
    cheap, dear, worse, equal = (
        Candidate(key=key, cost=cost, loss=loss)
        for key, cost, loss in (("cheap", 1, 0.5), ("dear", 4, 0.1), ("worse", 3, 0.6), ("equal", 2, 0.5))
    )
    assert pareto_front([dear, worse, equal, cheap]) == [cheap, dear]


def test_every_site_gets_one_of_its_own_candidates() -> None:
    candidates = _random_candidates(5, sites=30)
    chosen = allocate(candidates, (smallest_cost(candidates) + largest_cost(candidates)) // 2).chosen
    assert list(chosen) == list(candidates)
    assert all(chosen[site] in candidates[site] for site in candidates)


def test_thousands_of_sites_with_costs_without_a_common_divisor_are_solved_closely() -> None:
    candidates = _random_candidates(1, sites=5000)
    budget = (smallest_cost(candidates) + largest_cost(candidates)) // 2
    found = allocate(candidates, budget, largest_table=10**6)
    # One step of five thousand sites.
    assert 0 < found.loss - lower_bound(_pairs(candidates), budget) < 1e-3 * found.loss
