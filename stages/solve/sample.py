"""A few hundred output channels stand for all while candidates of one activation are compared.

A candidate is good or bad for the activation's channels, and every output channel is one more sample of that: the sum
over some hundred ranks them as the sum over ten thousand does, for a small part of the work.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from stages.solve.problem import GroupProblem

_ROWS = 512
"""Output channels of a site that are looked at: the standard error of a difference is then a few percent of it."""


def sampled(problem: GroupProblem) -> GroupProblem:
    """The same problem with at most ``_ROWS`` output channels a site, evenly spaced."""
    return replace(problem, weights=tuple(weight[:: _stride(weight)].contiguous() for weight in problem.weights))


def represented(problem: GroupProblem, errors: tuple[float, ...]) -> float:
    """The joint error that the ``errors`` of ``sampled(problem)``'s sites stand for."""
    return sum(
        error * len(weight) / -(-len(weight) // _stride(weight))
        for weight, error in zip(problem.weights, errors, strict=True)
    )


def _stride(weight: Tensor) -> int:
    return -(-len(weight) // _ROWS)
