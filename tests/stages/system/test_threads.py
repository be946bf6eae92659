"""Threads, in every form that OMP_NUM_THREADS may have."""

from __future__ import annotations

import psutil
import pytest

from stages.errors import UserError
from stages.system.threads import granted_threads, usable_threads

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


def test_what_is_not_granted_is_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert usable_threads() == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert usable_threads() == 6
