"""Write values for people: numbers with their units, ranges, and words that say whether a number is good."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np

from stages.evaluation.accuracy import Accuracy

UNKNOWN = "-"
"""What a table shows for an unknown number."""


def percent(value: float | None) -> str:
    """Return a share as per cent with three significant digits."""
    if value is None:
        return UNKNOWN
    return f"{np.format_float_positional(100 * value, precision=3, unique=False, fractional=False, trim='-')} %"


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
SCALE = tuple(
    (grade, (f"{kl:g} or less", f"{percent(top1)} or more", f"{percent(perplexity)} or less", f"{speed:g}x or more"))
    for grade, kl, top1, perplexity, speed in zip(_GRADES, _KL, _TOP1, _PERPLEXITY, _SPEED, strict=False)
)
"""Each grade but the last, and what earns it: KL in nats, top-1 agreement, growth of the perplexity, speed."""


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


def number(value: float | None, form: str) -> str:
    """Return ``value`` in ``form``, or a dash where it isn't known."""
    return UNKNOWN if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    """Return bytes in millions."""
    return number(None if value is None else value / 1e6, ",.1f")


def text_name(text: str) -> str:
    """Return the name of a text without its folders."""
    return re.split(r"[/\\]", text)[-1]


def format_in_words(label: str) -> str:
    """Describe a format of which only the label is known: 4b32, 8ch."""
    found = re.fullmatch(r"(\d)(?:b(\d+)|ch)(z?)", label)
    if found is None:
        return label
    zero_point = " and a zero point" if found[3] else ""
    return f"INT{found[1]}, a scale{zero_point} for every " + (f"{found[2]} weights" if found[2] else "output channel")


def span(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    """Return the smallest and the largest of the known values, once where they read alike."""
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    low, high = form(min(known)), form(max(known))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def visible(text: str) -> str:
    """Return ``text`` with signs for line breaks and tabs."""
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
