"""Calls with arguments of other types, dtypes or sizes than they say fail, as every test relies on."""

from __future__ import annotations

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from stages.quantization.search.affine import BlockParameters, join, round_to_storage

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
