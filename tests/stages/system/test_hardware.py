"""Devices, threads in every form that OMP_NUM_THREADS may have, and the machine's description."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from stages.errors import UserError
from stages.system.hardware import (
    choose_device,
    describe_machine,
    granted_threads,
    one_thread_each,
    physical_cores,
    processor,
)

_TOO_MANY_DIGITS = 5000
"""More than int() reads."""


@pytest.mark.parametrize(
    ("value", "granted"),
    [
        ("4", 4),
        ("4,2", 4),
        (" 3 , 2", 3),
        ("02", 2),
        ("999999999", 6),
        ("", None),
        (" ", None),
    ],
)
def test_a_list_grants_its_first_number_and_an_empty_value_nothing(
    value: str, granted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 6)
    assert granted_threads() == granted


@pytest.mark.parametrize(
    "value", [",", "abc", "4 threads", "0", "-1", "²", "9" * _TOO_MANY_DIGITS], ids=lambda value: value[:9]
)
def test_anything_else_is_one_sentence(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UserError, match=r"^OMP_NUM_THREADS is .*, which is not a number of threads; set it to one"):
        granted_threads()


def test_an_unset_variable_grants_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert granted_threads() is None


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
