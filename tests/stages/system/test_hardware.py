"""How many threads OMP_NUM_THREADS grants, in every form that OpenMP allows or ignores."""

from __future__ import annotations

import pytest

from stages.system.hardware import threads

_TOO_MANY_DIGITS = 5000
"""More than int() reads."""


@pytest.mark.parametrize(
    ("value", "granted"),
    [
        ("4", 4),
        ("4,2", 4),
        (" 3 , 2", 3),
        ("02", 2),
        ("", None),
        (",", None),
        ("abc", None),
        ("4 threads", None),
        ("0", None),
        ("-1", None),
        ("²", None),
        ("9" * _TOO_MANY_DIGITS, None),
    ],
    ids=lambda value: str(value)[:9],
)
def test_a_list_grants_its_first_number_and_what_openmp_ignores_nothing(
    value: str, granted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads() == granted


def test_an_unset_variable_grants_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads() is None
