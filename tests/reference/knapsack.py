"""The smallest loss under a budget: by trying every combination, or a bound that none can beat."""

from __future__ import annotations

from itertools import product


def smallest_loss(sites: list[list[tuple[int, float]]], budget: int) -> float:
    """``sites``: for each its (cost, loss) pairs."""
    fitting = [choice for choice in product(*sites) if sum(cost for cost, _ in choice) <= budget]
    return min(sum(loss for _, loss in choice) for choice in fitting)


def lower_bound(sites: list[list[tuple[int, float]]], budget: int) -> float:
    """Return the largest Lagrangian bound: the loss, with bytes beyond ``budget`` at a price, minimized freely."""

    def bound(price: float) -> float:
        return sum(min(loss + price * cost for cost, loss in site) for site in sites) - price * budget

    low, high = 0.0, max(loss for site in sites for _, loss in site)
    for _ in range(80):  # the bound is concave in the price: thirds close in on its peak
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (left, high) if bound(left) < bound(right) else (low, right)
    return bound((low + high) / 2)
