"""Devices, and the machine's description."""

from __future__ import annotations

import platform

import pytest
import torch

from stages.errors import UserError
from stages.system.hardware import (
    choose_device,
    describe_machine,
    one_thread_each,
    processor,
)
from stages.system.threads import physical_cores


def test_a_device_is_the_one_that_is_named() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["toaster", "cuda:77", ""])
def test_a_device_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=f"^--device {name} can't be used here; choose auto"):
        choose_device(name)


def test_a_pool_computes_with_one_torch_thread_each() -> None:
    with one_thread_each(2) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4


def test_the_machine_is_described_in_one_line() -> None:
    described = describe_machine()
    assert described.startswith(f"{processor()}, {physical_cores()} cores, ")
    assert described.endswith(f" GB, {platform.system()}")
    assert processor().strip() == processor() != ""
