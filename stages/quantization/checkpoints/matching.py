"""Find a graph's weight among a checkpoint's layers by what they hold, whatever they are called.

The builder packs q, k and v into one MatMul, takes packed projections apart, and renames what it writes. But a
quantized row still points where the row points that it was made from, so a weight's first row finds its layer, and
as many of the rows after it as go on there; where they end, the next row looks again. A few rows that point elsewhere
end nothing: quantizers lose single rows, as Olive's GPTQ does one of SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

_LEAST_COSINE = 0.5
"""Between a row and its codes, also where AWQ multiplied their columns; 4 bits alone leave 0.99, other rows about 0."""
_SHORTEST_PIECE = 8
"""Rows. Whoever takes rows apart keeps heads, or halves of them, together; fewer that differ are strays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive outputs of one layer of a checkpoint."""

    module: str
    first: int
    last: int
    """The row behind the last."""


def find_pieces(
    weight: Float32[Tensor, "N K"], modules: Mapping[str, Float32[Tensor, "M K"]]
) -> tuple[Piece, ...] | None:
    """Return the rows of ``modules`` that ``weight`` is made of, in its order; None where it isn't.

    Args:
        weight: of the graph.
        modules: by name, the checkpoint's candidates with as many inputs.
    """
    if not modules:
        return None
    names = list(modules)
    places = [(name, row) for name in names for row in range(len(modules[name]))]
    stacked = torch.cat([_unit_rows(modules[name]) for name in names])
    ours, pieces, row = _unit_rows(weight), list[Piece](), 0
    while row < len(ours):
        piece = _longest(ours[row:], stacked, places, modules)
        whole = row == 0 and piece is not None and piece.last - piece.first == len(ours)
        if piece is None or not (whole or piece.last - piece.first >= min(_SHORTEST_PIECE, len(modules[piece.module]))):
            return None
        pieces.append(piece)
        row += piece.last - piece.first
    return tuple(pieces)


def _longest(
    ours: Float32[Tensor, "N K"],
    stacked: Float32[Tensor, "M K"],
    places: Sequence[tuple[str, int]],
    modules: Mapping[str, Tensor],
) -> Piece | None:
    """Return where the first of ``ours`` lies, with as many of those after it as go on there."""
    for anchor in ours.any(dim=1).nonzero().flatten()[:_SHORTEST_PIECE].tolist():  # rows of zeros point nowhere
        cosines = stacked @ ours[anchor]
        best = int(cosines.argmax())
        module, row = places[best]
        first, begin = row - anchor, best - anchor
        if float(cosines[best]) < _LEAST_COSINE or first < 0:
            continue
        count = min(len(ours), len(modules[module]) - first)
        theirs, mine = stacked[begin : begin + count], ours[:count]
        return Piece(module=module, first=first, last=first + _end(_differs(theirs, mine)))
    return None


def strays(weight: Float32[Tensor, "N K"], stored: Float32[Tensor, "N K"]) -> Bool[Tensor, " N"]:
    """Return which rows of ``stored``, which was found for ``weight``, point elsewhere."""
    return _differs(_unit_rows(stored), _unit_rows(weight))


def _differs(theirs: Float32[Tensor, "N K"], ours: Float32[Tensor, "N K"]) -> Bool[Tensor, " N"]:
    """Return which unit rows point elsewhere; two rows of zeros don't."""
    return ((theirs * ours).sum(dim=1) < _LEAST_COSINE) & (theirs.any(dim=1) | ours.any(dim=1))


def _end(differs: Bool[Tensor, " rows"]) -> int:
    """Return where the first run of differing rows begins that is as long as a piece."""
    runs = differs.unfold(0, min(_SHORTEST_PIECE, len(differs)), 1).all(dim=1).nonzero()
    return int(runs[0]) if len(runs) else len(differs)


def _unit_rows(rows: Float32[Tensor, "N K"]) -> Float32[Tensor, "N K"]:
    return torch.nn.functional.normalize(rows, dim=1)
