"""Layer numbers past a model's end: ModelOpt-Windows' own example names layers.16 of a model that ends at 15."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"layers[./](\d+)")


def past_the_end(patterns: str, site_names: Iterable[str]) -> tuple[str, tuple[str, ...], int]:
    """``--layers_8bit`` without its layer numbers past the last layer, those numbers, and the last layer.

    Nothing is left out where no layer would remain, or no site has a number: then the plan refuses the pattern.
    """
    last = max((int(match[1]) for name in site_names for match in _LAYER.finditer(name)), default=None)
    parts = [part for part in (piece.strip() for piece in patterns.split(",")) if part]
    beyond = tuple(part for part in parts if last is not None and _is_past(part, last))
    if last is None or not beyond or len(beyond) == len(parts):
        return patterns, (), last or 0
    return ",".join(part for part in parts if part not in beyond), beyond, last


def _is_past(pattern: str, last: int) -> bool:
    match = _LAYER.fullmatch(pattern)
    return match is not None and int(match[1]) > last
