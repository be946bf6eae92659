"""Sums are right, whatever the seed, and a seed gives the same text again."""

from __future__ import annotations

import re
from itertools import islice

from stages.calibration.text.arithmetic import arithmetic_documents

_RULES = {
    r"(\d+) \+ (\d+) = (\d+)": lambda a, b, c: a + b == c,
    r"(\d+) \* (\d+) = (\d+)": lambda a, b, c: a * b == c,
    r"(\d+) / (\d+) = (\d+)": lambda a, b, c: a == b * c,
    r"(\d+)\.(\d+), and .* - (\d+)\.(\d+) = ": lambda a, b, c, d: (a, b) == (c, d),
}


def test_what_is_computed_is_right_and_the_same_for_a_seed() -> None:
    text = "\n".join(islice(arithmetic_documents(3), 40))
    for pattern, holds in _RULES.items():
        found = re.findall(pattern, text)
        assert found
        assert all(holds(*map(int, numbers)) for numbers in found)
    assert text == "\n".join(islice(arithmetic_documents(3), 40))
    assert text != "\n".join(islice(arithmetic_documents(4), 40))
