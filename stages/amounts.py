"""Sizes as people write them: 1.1GB, 900MB, 850MiB."""

from __future__ import annotations

import math
import re

from stages.errors import RecipeError

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-z]*)")


def parse_bytes(text: str, option: str) -> int:
    """Bytes of an amount such as 1.1GB (10^9) or 850MiB (2^20); a bare number counts bytes.

    Raises:
        RecipeError: ``text`` is no such amount, or zero.
    """
    match = _AMOUNT.fullmatch(text.strip().replace(" ", "").lower())
    number = float(match[1]) * _UNITS[match[2]] if match is not None and match[2] in _UNITS else 0.0
    if not 1 <= number < math.inf:
        raise RecipeError(f"{option} '{text}' is no size; write one such as 1.1GB, 900MB or 850MiB.")
    return int(number)
