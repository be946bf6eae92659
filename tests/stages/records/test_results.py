"""What the records say of themselves."""

from __future__ import annotations

import pytest
import torch

from stages.records.results import TokenStats


@pytest.mark.parametrize(("abs_mean", "silent"), [([0.0, 0.0], True), ([0.0, 1e-30], False)])
def test_statistics_of_zeros_are_silent(abs_mean: list[float], silent: bool) -> None:
    assert TokenStats(num_tokens=4, abs_mean=torch.tensor(abs_mean)).is_silent is silent
