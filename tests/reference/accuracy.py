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
    rows = zip(base[:-1], model[:-1], strict=True)
    return math.fsum(divergence(base_row, model_row) for base_row, model_row in rows) / (len(base) - 1)


def top1_agreement(base: list[list[float]], model: list[list[float]]) -> float:
    same = sum(b.index(max(b)) == m.index(max(m)) for b, m in zip(base[:-1], model[:-1], strict=True))
    return same / (len(base) - 1)


def divergence(base_row: list[float], model_row: list[float]) -> float:
    pairs = zip(probabilities(base_row), probabilities(model_row), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs)


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest of the sorted values, linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def log_likelihood(logits: list[list[float]], tokens: list[int]) -> float:
    """Of ``tokens``, each predicted by the row of the same index."""
    return math.fsum(math.log(probabilities(row)[token]) for row, token in zip(logits, tokens, strict=True))
