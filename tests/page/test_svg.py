"""Axes put numbers where they belong, and their ticks are round and inside."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from stages.page.svg import Axis, linear_axis, log_axis


def test_ends_and_middle() -> None:
    axis = Axis(low=10.0, high=30.0, start=200.0, end=0.0)
    assert [axis(value) for value in (10, 20, 30)] == pytest.approx([200, 100, 0])
    logarithmic = Axis(low=0.01, high=100.0, start=0.0, end=400.0, log=True)
    assert [logarithmic(value) for value in (0.01, 0.1, 1, 100)] == pytest.approx([0, 100, 200, 400])


@pytest.mark.parametrize("values", [(0.3,), (1, 2, 3), (285.7, 297.0), (-3.0, 1e6), (0.0, 0.0)])
def test_linear_axes_hold_their_values_and_a_few_round_ticks(values: tuple[float, ...]) -> None:
    axis = linear_axis(values, 0.0, 100.0)
    assert all(0 <= axis(value) <= 100 for value in values)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 7
    (step,) = {round(after - before, 9) for before, after in pairwise(ticks)}
    assert round(step / 10 ** math.floor(math.log10(step)), 6) in (1, 2, 2.5, 5)
    assert all(axis.low <= tick <= axis.high for tick in ticks)


@pytest.mark.parametrize("values", [(0.5,), (0.09, 0.2), (1e-7, 3.0), (0.0, 0.02, 0.03), (0.0,)])
def test_logarithmic_axes_hold_their_values_and_ticks(values: tuple[float, ...]) -> None:
    axis = log_axis(values, 100.0, 0.0)
    assert all(0 <= axis(value) <= 100 for value in values if value > 0)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_an_axis_without_a_range_puts_all_in_its_middle() -> None:
    assert Axis(low=0.0, high=0.0, start=0.0, end=10.0)(0) == 5
