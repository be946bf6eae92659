"""Accumulate the statistics of one activation: mean |x|, and the Gram matrix or the raw rows, whichever is smaller.

The output error of a weight error D [N, K] over T tokens is ||X D^T||^2 / T = tr(D G D^T) with G = X^T X / T: exact,
and independent of T once G is known. Sums are float32 whatever the model's type; float16 products are exact there.
G is symmetric, so files hold its lower triangle only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.errors import SolveError
from stages.model.weights import all_finite
from stages.records.formats import FLOAT_TYPES
from stages.records.results import TokenStats
from stages.records.sites import FloatName

_STRIP = 256
"""Rows of a Gram matrix in one product: narrower ones run slower, wider ones compute more above the diagonal."""
_MIRROR_STRIP = 1024
"""Rows that are mirrored at a time."""


def tapped_itemsize(dtype: FloatName) -> int:
    """Return the bytes of each number of an activation whose sites have weights of type ``dtype``."""
    # numpy can't take bfloat16 from a session, so it is tapped as float32.
    return torch.float32.itemsize if dtype == "bfloat16" else FLOAT_TYPES[dtype].numpy.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsSize:
    """Size of the statistics of one activation.

    Rows are kept where there are fewer than ``in_features``, so that they cost less to multiply with too, and where
    they are smaller than the packed Gram matrix.

    Args:
        in_features: channels of the activation (K).
        tokens: rows that will be seen in all; None: that isn't known, and the Gram matrix is kept.
        itemsize: bytes of each number.
    """

    in_features: int
    tokens: int | None
    itemsize: int

    @property
    def keeps_rows(self) -> bool:
        """Return whether the tokens' own rows are kept in place of the Gram matrix."""
        return (
            self.tokens is not None
            and self.tokens < self.in_features
            and self._bytes_of(self.tokens) < self._packed_bytes
        )

    @property
    def memory(self) -> int:
        """Return the bytes that they take while they are accumulated."""
        if self.tokens is not None and self.keeps_rows:
            return self._bytes_of(self.tokens)
        return self.in_features**2 * torch.float32.itemsize

    @property
    def disk(self) -> int:
        """Return the bytes that they take in the cache."""
        return self._bytes_of(self.tokens) if self.tokens is not None and self.keeps_rows else self._packed_bytes

    @property
    def _packed_bytes(self) -> int:
        return self.in_features * (self.in_features + 1) // 2 * torch.float32.itemsize

    def _bytes_of(self, tokens: int) -> int:
        return tokens * self.in_features * self.itemsize


class StatisticsAccumulator:
    """Accumulates batches of one activation into TokenStats.

    Args:
        activation: the tapped value's name, for messages.
        size: what will be seen in all.
        device: where sums live.
    """

    def __init__(self, activation: str, size: StatisticsSize, device: torch.device) -> None:
        self._activation = activation
        self._device = device
        self._num_tokens = 0
        self._abs_sum = torch.zeros(size.in_features, dtype=torch.float64, device="cpu")
        self._rows: list[Tensor] | None = [] if size.keeps_rows else None
        self._gram = None if size.keeps_rows else torch.zeros(size.in_features, size.in_features, device=device)

    def add(self, batch: Float[Tensor, "*tokens K"]) -> None:
        """Add one batch of any floating type.

        Raises:
            SolveError: it holds NaN or infinite values.
        """
        stored = batch.reshape(-1, batch.shape[-1]).to(self._device)
        rows = stored.float()
        abs_sum = rows.abs().sum(dim=0)
        if not all_finite(abs_sum):
            raise SolveError(
                f"The activation '{self._activation}' holds NaN or infinite values; run a float32 or bfloat16 build "
                "of the base model, or another execution provider."
            )
        self._abs_sum += abs_sum.double().cpu()
        self._num_tokens += rows.shape[0]
        if self._gram is not None:
            _add_lower_triangle(self._gram, rows)
        elif self._rows is not None:
            self._rows.append(stored.cpu().clone())

    def state(self) -> dict[str, Tensor]:
        """Return all that was added so far, from which ``go_on`` goes on with the same bits."""
        found = {"num_tokens": torch.tensor(self._num_tokens), "abs_sum": self._abs_sum}
        if self._gram is not None:
            found["gram_triangle"] = pack_symmetric(self._gram.cpu())
        elif self._rows:
            found["rows"] = torch.cat(self._rows)
        return found

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Take what another accumulator's ``state`` has returned as added; nothing where it is empty."""
        if not state:
            return
        self._num_tokens, self._abs_sum = int(state["num_tokens"]), state["abs_sum"]
        if self._gram is not None:
            self._gram = unpack_symmetric(state["gram_triangle"]).to(self._device)
        elif "rows" in state:
            self._rows = [state["rows"]]

    def finish(self) -> TokenStats:
        """Return the statistics, on the CPU; zeros where no token came (an expert that was never chosen).

        The sums themselves become the mean: nothing can be added afterwards.
        """
        divisor = max(self._num_tokens, 1)
        return TokenStats(
            num_tokens=self._num_tokens,
            abs_mean=(self._abs_sum / divisor).float(),
            gram=None if self._gram is None else _mirror_lower_triangle(self._gram.div_(divisor).cpu()),
            rows=None if self._rows is None else torch.cat(self._rows),
        )


def scaled(stats: TokenStats, factor: float) -> TokenStats:
    """Return ``stats`` of tokens whose squared length is ``factor`` times as large."""
    root = factor**0.5
    return TokenStats(
        num_tokens=stats.num_tokens,
        abs_mean=stats.abs_mean * root,
        gram=None if stats.gram is None else stats.gram * factor,
        rows=None if stats.rows is None else stats.rows * root,
    )


def pack_symmetric(matrix: Float[Tensor, "K K"]) -> Float[Tensor, "half columns"]:
    """Return the lower triangle of ``matrix`` as a rectangle [ceil(K / 2), K + 1], without reading the upper one.

    Row i of the triangle has i + 1 numbers, so it and row K - 1 - i, written backwards, fill a row of the rectangle::

        a . . .
        b c . .   ->   a j i h g
        d e f .        b c f e d
        g h i j

    The middle row of an odd K stands there both ways. ``unpack_symmetric`` is the inverse.
    """
    size = len(matrix)
    half = -(-size // 2)
    packed = matrix.new_zeros(half, size + 1)
    packed[:, :size] = matrix[:half].tril()
    packed[:, 1:] += matrix[size - half :].flip(0, 1).triu()
    return packed


def unpack_symmetric(packed: Float[Tensor, "half columns"]) -> Float[Tensor, "K K"]:
    """Return the symmetric matrix whose lower triangle ``pack_symmetric`` has packed."""
    half, size = packed.shape[0], packed.shape[1] - 1
    matrix = packed.new_empty(size, size)
    matrix[size - half :] = packed[:, 1:].triu().flip(0, 1)
    matrix[:half] = packed[:, :size].tril()
    return _mirror_lower_triangle(matrix)


def _mirror_lower_triangle(matrix: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """Copy what is below the diagonal above it, in place and some rows at a time; return ``matrix`` itself."""
    for start in range(0, len(matrix), _MIRROR_STRIP):
        end = start + _MIRROR_STRIP
        corner = matrix[start:end, start:end].tril()
        matrix[start:end, start:end] = corner + corner.tril(-1).T
        matrix[start:end, end:] = matrix[end:, start:end].T
    return matrix


def _add_lower_triangle(gram: Float[Tensor, "K K"], rows: Float[Tensor, "T K"]) -> None:
    """Add X^T X to ``gram`` in place, on and below the diagonal; above it only near the diagonal, for speed.

    A symmetric product has half the arithmetic of a general one; in strips, a general one's routine does little more.
    """
    for start in range(0, len(gram), _STRIP):
        end = start + _STRIP
        gram[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])
