"""All numbers finite: against torch.isfinite, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from stages.finite import all_finite

_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize(("wrong", "place"), [(math.nan, (0, 0)), (math.inf, (17, 3)), (-math.inf, (-1, -1))])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, wrong: float, place: tuple[int, int]) -> None:
    numbers = torch.randn(64, 257, dtype=torch.float32).to(dtype)
    assert all_finite(numbers)
    numbers[place] = wrong
    assert not all_finite(numbers)
    assert not all_finite(numbers.T)


@pytest.mark.parametrize("dtype", _TYPES)
def test_the_extremes_of_a_type_are_finite_and_so_is_nothing(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert all_finite(torch.tensor([info.max, info.min, info.tiny, 0.0], dtype=dtype))
    assert all_finite(torch.empty(0, 4, dtype=dtype))
