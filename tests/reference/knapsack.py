"""The smallest loss under a budget, by trying every combination."""

from __future__ import annotations

from itertools import product


def smallest_loss(sites: list[list[tuple[int, float]]], budget: int) -> float:
    """``sites``: for each its (cost, loss) pairs."""
    fitting = [choice for choice in product(*sites) if sum(cost for cost, _ in choice) <= budget]
    return min(sum(loss for _, loss in choice) for choice in fitting)
