"""Every pair of values meets, in few combinations."""

from __future__ import annotations

from itertools import combinations, product

from tests.support.pairwise import pairwise


def test_every_pair_of_values_meets_in_few_combinations() -> None:
    values = ("abcd", "efgh", "ijkl", "mn")
    chosen = pairwise(*values)
    for (one, first), (other, second) in combinations(enumerate(values), 2):
        assert {(row[one], row[other]) for row in chosen} == set(product(first, second))
    assert 16 <= len(chosen) <= 24


def test_values_that_are_equal_are_kept_apart_by_their_place() -> None:
    assert pairwise([1, 1], [2]) == [(1, 2), (1, 2)]
