"""A few hundred output channels stand for all while candidates of one activation are compared.

A candidate is good or bad for the activation's channels, and every output channel is one more sample of that: the sum
over some hundred ranks them as the sum over ten thousand does, for a small part of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stages.solve.problem import GroupProblem

GLANCE, LOOK = 128, 256
"""Output channels of a site that are looked at: enough to find the better candidates, and to find the best of those
(the standard error of a difference is then some five percent of it)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """At most ``channels`` output channels a site, evenly spaced, in the place of all of ``whole``."""

    whole: GroupProblem
    channels: int

    @property
    def problem(self) -> GroupProblem:
        """The same problem for these channels alone."""
        weights = tuple(weight[:: self._stride(weight)].contiguous() for weight in self.whole.weights)
        return replace(self.whole, weights=weights, plain=())

    def joint_error(self, errors: Sequence[float]) -> float:
        """The joint error of the whole that the ``errors`` of the sample's sites stand for."""
        return sum(
            error * len(weight) / -(-len(weight) // self._stride(weight))
            for weight, error in zip(self.whole.weights, errors, strict=True)
        )

    def _stride(self, weight: Tensor) -> int:
        return -(-len(weight) // self.channels)
