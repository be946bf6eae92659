"""Rates that a search's time is foretold with."""

from __future__ import annotations

import threading
from dataclasses import astuple

import pytest
import torch

from stages.search_time import rates_beside
from stages.solve.cost import Work


def test_threads_that_work_side_by_side_are_measured_side_by_side() -> None:
    all_there = threading.Barrier(3, timeout=60)
    speeds = iter([1.0, 2.0, 6.0])
    threads: list[int] = []

    def measure() -> Work:
        all_there.wait()  # breaks where they run one after another
        threads.append(torch.get_num_threads())
        return Work(products=next(speeds), descended=12)

    found = rates_beside(measure, 3)
    assert threads == [1, 1, 1]
    assert astuple(found) == pytest.approx(astuple(Work(products=3, descended=12)))


def test_one_that_works_alone_has_all_threads() -> None:
    here = torch.get_num_threads()
    assert rates_beside(lambda: Work(ranged=torch.get_num_threads()), 1) == Work(ranged=here)
