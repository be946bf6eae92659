"""Drawing from a softmax, one token at a time."""

from __future__ import annotations

import math


def draw(logits: list[float], uniforms: float) -> int:
    """The token at which the cumulated probability passes ``uniforms``."""
    weights = [math.exp(logit) for logit in logits]
    passed = 0.0
    for token, weight in enumerate(weights):
        passed += weight / sum(weights)
        if passed > uniforms:
            return token
    raise AssertionError("luck is below 1")
