"""Axes put numbers where they belong, and their ticks are round and inside."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from stages.report.svg import Axis, axis_over


def test_ends_and_middle() -> None:
    axis = Axis(title="", low=10.0, high=30.0)
    assert [axis.share(value) for value in (10, 20, 30)] == pytest.approx([0, 0.5, 1])
    logarithmic = Axis(title="", low=0.01, high=100.0, log=True)
    assert [logarithmic.share(value) for value in (0, 0.01, 0.1, 1, 100)] == pytest.approx([0, 0, 0.25, 0.5, 1])
    assert Axis(title="", low=0.0, high=0.0).share(0) == 0.5


@pytest.mark.parametrize("values", [(0.3,), (1, 2, 3), (285.7, 297.0), (-3.0, 1e6), (0.0, 0.0)])
def test_linear_axes_hold_their_values_and_a_few_round_ticks(values: tuple[float, ...]) -> None:
    axis = axis_over("", values)
    assert all(0 < axis.share(value) < 1 for value in values)
    ticks = [tick for tick, _ in axis.ticks()]
    assert 2 <= len(ticks) <= 7
    (step,) = {round(after - before, 9) for before, after in pairwise(ticks)}
    assert round(step / 10 ** math.floor(math.log10(step)), 6) in (1, 2, 5)
    assert all(axis.low <= tick <= axis.high for tick in ticks)


@pytest.mark.parametrize("values", [(0.5,), (0.09, 0.2), (1e-7, 3.0), (0.0, 0.02, 0.03), (0.0,), (0.014,), (1.4e-14,)])
def test_logarithmic_axes_hold_their_values_and_ticks(values: tuple[float, ...]) -> None:
    axis = axis_over("", values, log=True)
    assert all(0 < axis.share(value) < 1 for value in values if value > 0)
    ticks = [tick for tick, _ in axis.ticks()]
    assert 3 <= len(ticks) <= 12
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_ticks_are_written_in_the_unit_of_the_axis() -> None:
    assert Axis(title="", low=0.001, high=0.1, log=True, shares=True).ticks() == [
        (0.001, "0.1 %"), (0.01, "1 %"), (0.1, "10 %"),
    ]  # fmt: skip
    assert Axis(title="layer", low=-0.5, high=1.5, whole=True).ticks() == [(0, "0"), (1, "1")]
