"""Layer numbers past a model's end: ModelOpt-Windows' own example names layers.16 of a model that ends at 15."""

from __future__ import annotations

from collections.abc import Iterable

from stages.site_names import layer_of, within_layer


def past_the_end(patterns: str, site_names: Iterable[str]) -> tuple[str, tuple[str, ...], int]:
    """``--layers_8bit`` without its layer numbers past the last layer, those numbers, and the last layer.

    Nothing is left out where no layer would remain, or no site has a number: then the plan refuses the pattern.
    """
    last = max((layer for name in site_names if (layer := layer_of(name)) is not None), default=None)
    parts = [part for part in (piece.strip() for piece in patterns.split(",")) if part]
    beyond = tuple(part for part in parts if last is not None and _is_past(part, last))
    if last is None or not beyond or len(beyond) == len(parts):
        return patterns, (), last or 0
    return ",".join(part for part in parts if part not in beyond), beyond, last


def _is_past(pattern: str, last: int) -> bool:
    layer = layer_of(pattern)
    return layer is not None and layer > last and not within_layer(pattern)
