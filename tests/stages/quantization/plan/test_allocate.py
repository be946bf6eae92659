import random
from itertools import pairwise

import pytest

from stages.quantization.plan.allocate import Candidate, Menu, allocate, largest_cost, smallest_cost, useful
from tests.reference.knapsack import lower_bound, smallest_loss

HULL_ONLY = 1
"""A table of one entry holds nothing: the hull decides."""


def _random_menu(seed: int, sites: int = 6, unit: int = 1) -> dict[str, list[Candidate]]:
    draw = random.Random(seed)
    return {
        f"site{index}": [
            Candidate(key=f"{place}", cost=unit * draw.randint(1, 40), loss=draw.random() ** 3)
            for place in range(draw.randint(1, 4))
        ]
        for index in range(sites)
    }


def _pairs(menu: Menu) -> list[list[tuple[int, float]]]:
    return [[(candidate.cost, candidate.loss) for candidate in candidates] for candidates in menu.values()]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("unit", [1, 96])
def test_the_table_finds_the_optimum(seed: int, unit: int) -> None:
    menu = _random_menu(seed, unit=unit)
    low, high = smallest_cost(menu), largest_cost(menu)
    for budget in {low, low + 1, (low + high) // 2, high - 1, high, high + 7}:
        if budget < low:
            continue
        found = allocate(menu, budget)
        assert found.cost <= budget
        # Sums of the same six numbers in another order.
        assert found.loss == pytest.approx(smallest_loss(_pairs(menu), budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_no_further_from_the_optimum_than_one_step(seed: int) -> None:
    menu = _random_menu(seed)
    low, high = smallest_cost(menu), largest_cost(menu)
    ladders = [useful(candidates) for candidates in menu.values()]
    step = max(ladder[0].loss - ladder[-1].loss for ladder in ladders)
    for budget in range(low, high + 1, max((high - low) // 7, 1)):
        found = allocate(menu, budget, largest_table=HULL_ONLY)
        best = smallest_loss(_pairs(menu), budget)
        assert found.cost <= budget
        # 1e-12: rounding of sums.
        assert best - 1e-12 <= found.loss <= best + step + 1e-12


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("largest_table", [10**8, HULL_ONLY])
def test_a_larger_budget_never_gives_a_larger_loss(seed: int, largest_table: int) -> None:
    menu = _random_menu(seed, sites=12)
    budgets = range(smallest_cost(menu), largest_cost(menu) + 10)
    losses = [allocate(menu, budget, largest_table).loss for budget in budgets]
    # 1e-12: sums of the same numbers in another order.
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))


def test_ends_of_the_range() -> None:
    menu = _random_menu(3)
    assert allocate(menu, smallest_cost(menu)).cost == smallest_cost(menu)
    best = sum(min(candidate.loss for candidate in candidates) for candidates in menu.values())
    assert allocate(menu, 10**9).loss == pytest.approx(best, rel=1e-12)
    assert allocate(menu, 10**9).cost == largest_cost(menu)


def test_what_costs_more_and_is_no_better_is_no_candidate() -> None:
    cheap, dear, worse, equal = (
        Candidate(key=key, cost=cost, loss=loss)
        for key, cost, loss in (("cheap", 1, 0.5), ("dear", 4, 0.1), ("worse", 3, 0.6), ("equal", 2, 0.5))
    )
    assert useful([dear, worse, equal, cheap]) == [cheap, dear]


def test_every_site_gets_one_of_its_own_candidates() -> None:
    menu = _random_menu(5, sites=30)
    chosen = allocate(menu, (smallest_cost(menu) + largest_cost(menu)) // 2).chosen
    assert list(chosen) == list(menu)
    assert all(chosen[site] in menu[site] for site in menu)


def test_thousands_of_sites_with_costs_without_a_common_divisor_are_solved_closely() -> None:
    menu = _random_menu(1, sites=5000)
    budget = (smallest_cost(menu) + largest_cost(menu)) // 2
    found = allocate(menu, budget, largest_table=10**6)
    # One step of five thousand sites.
    assert 0 < found.loss - lower_bound(_pairs(menu), budget) < 1e-3 * found.loss
