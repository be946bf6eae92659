"""Calls with arguments of other types, dtypes or sizes than they say fail, as every test relies on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from stages.quantization.search.affine import BlockParameters, join, round_to_storage
from tests.support.type_checks import decorate

BLOCKS = torch.zeros(2, 3)


def test_legal_calls_pass() -> None:
    parameters = BlockParameters(scales=round_to_storage(BLOCKS, "float16"), zero_points=BLOCKS)
    assert parameters.scales.shape == (2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: round_to_storage(BLOCKS, "float8"),
        lambda: round_to_storage(BLOCKS.int(), "float16"),
        lambda: join(torch.zeros(3), 3),
        lambda: BlockParameters(scales=BLOCKS, zero_points=torch.zeros(2, 4)),
    ],
    ids=["a type", "a dtype", "a number of axes", "sizes that disagree"],
)
def test_others_fail(call) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        call()


def test_of_many_calls_in_a_test_the_first_are_checked_and_then_some() -> None:
    calls: Counter[object] = Counter()

    def passes_on(number: int) -> int:
        return number

    def failed(times: int) -> list[int]:
        return [place for place in range(1, times + 1) if fails(decorate(passes_on, calls))]

    def fails(function) -> bool:
        try:
            function("one")
        except BeartypeCallHintViolation:
            return True
        return False

    assert failed(100) == [*range(1, 65), 80, 96]
    calls.clear()
    assert failed(2) == [1, 2]
