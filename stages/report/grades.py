"""Say in words whether a number is good, on one scale for all reports."""

from __future__ import annotations

from enum import Enum

from stages.evaluation.accuracy import Accuracy


class Grade(Enum):
    """How good a number is; the value is its class in page.css."""

    EXCELLENT = "excellent"
    GOOD = "good"
    FAIR = "fair"
    POOR = "poor"


_GRADES = tuple(Grade)
_KL = (0.01, 0.05, 0.2)
_PERPLEXITY = (0.01, 0.05, 0.2)
_TOP1 = (0.95, 0.9, 0.75)
_SPEED = (1.5, 1.1, 0.98)
"""Multiples of the base's; the last leaves room for noise."""
SCALE = "\n".join(
    [
        "KL divergence: how far the model's probabilities for the next token are from the base's. Same top-1: how "
        "often both find the same token most likely.",
        *(
            f"{grade.value}: KL at most {kl:g} nats, same top-1 at least {top1:.0%}, perplexity at most "
            f"{perplexity:.0%} above the base's, decoding at least {speed:g}x as fast"
            for grade, kl, top1, perplexity, speed in zip(_GRADES, _KL, _TOP1, _PERPLEXITY, _SPEED, strict=False)
        ),
        f"{Grade.POOR.value}: anything beyond",
    ]
)
"""The scale in words."""


def grade_divergence(accuracy: Accuracy) -> Grade:
    """Return the grade of the mean KL divergence."""
    return _grade(accuracy.mean_divergence, _KL)


def grade_perplexity(accuracy: Accuracy, base: Accuracy) -> Grade:
    """Return the grade of the perplexity beside the base's."""
    return _grade(accuracy.perplexity / base.perplexity - 1, _PERPLEXITY)


def grade_top1(accuracy: Accuracy) -> Grade:
    """Return the grade of the share of places with the base's most likely token."""
    return _grade(-accuracy.top1_agreement, tuple(-limit for limit in _TOP1))


def grade_speed(ratio: float) -> Grade:
    """Return the grade of a speed as a multiple of the base's: slower than the base is poor."""
    return _grade(-ratio, tuple(-limit for limit in _SPEED))


def _grade(value: float, limits: tuple[float, ...]) -> Grade:
    """Return the grade of ``value``, of which less is better: one worse for each limit that it passes."""
    return _GRADES[sum(value > limit for limit in limits)]
