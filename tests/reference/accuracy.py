"""Perplexity, KL divergence and top-1 agreement, one token at a time in Python floats."""

from __future__ import annotations

import math


def probabilities(logits: list[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def perplexity(logits: list[list[float]], tokens: list[int]) -> float:
    predictions = list(zip(logits[:-1], tokens[1:], strict=True))
    return math.exp(-math.fsum(math.log(probabilities(row)[token]) for row, token in predictions) / len(predictions))


def mean_divergence(base: list[list[float]], model: list[list[float]]) -> float:
    total = 0.0
    for base_row, model_row in zip(base[:-1], model[:-1], strict=True):
        pairs = zip(probabilities(base_row), probabilities(model_row), strict=True)
        total += math.fsum(p * math.log(p / q) for p, q in pairs)
    return total / (len(base) - 1)


def top1_agreement(base: list[list[float]], model: list[list[float]]) -> float:
    same = sum(b.index(max(b)) == m.index(max(m)) for b, m in zip(base[:-1], model[:-1], strict=True))
    return same / (len(base) - 1)
