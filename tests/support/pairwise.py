"""Choose few combinations of parameters that still hold every pair of their values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

Combination = tuple[object, ...]


def pairwise(*values: Sequence[object]) -> list[Combination]:
    """Return combinations in which each two values of two parameters meet at least once.

    Give parameters that interact three at a time as one, by their product.

    Args:
        values: The values of each parameter; all parameters together give one combination.
    """
    rows = list(product(*(range(len(each)) for each in values)))
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen: list[Combination] = []
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        chosen.append(tuple(each[index] for each, index in zip(values, best, strict=True)))
    return chosen


def _pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(row), 2))
