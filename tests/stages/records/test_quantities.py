"""Counts and durations, as people read them."""

from __future__ import annotations

import pytest

from stages.records.quantities import counted, duration


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (1, ("MatMul",), "1 MatMul"),
        (0, ("MatMul",), "0 MatMuls"),
        (1234, ("site",), "1,234 sites"),
        (2, ("Gram matrix", "Gram matrices"), "2 Gram matrices"),
    ],
)
def test_a_number_has_its_noun_in_the_right_form(number: int, words: tuple[str, ...], said: str) -> None:
    assert counted(number, *words) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.5, "1 min 0 s"), (190.0, "3 min 10 s"),
        (3599.6, "1 h 0 min"), (7500.0, "2 h 5 min"),
    ],
)  # fmt: skip
def test_a_duration_has_the_units_of_its_size(seconds: float, said: str) -> None:
    assert duration(seconds) == said
