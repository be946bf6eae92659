"""A symmetric matrix in half its room: rectangular full packing (Gustavson et al. 2010, ACM TOMS 37(2)).

Row r of the lower triangle and row K-1-r, backwards, share a row of K+1 numbers; no loop over rows is needed.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

_BLOCK = 1024


def pack(matrix: Float[Tensor, "K K"]) -> Float[Tensor, "half columns"]:
    """The lower triangle of ``matrix`` as [ceil(K / 2), K + 1]; what is above the diagonal isn't read."""
    size = len(matrix)
    half = -(-size // 2)
    packed = matrix.new_zeros(half, size + 1)
    packed[:, :size] = matrix[:half].tril()
    packed[:, 1:] += matrix[size - half :].flip(0, 1).triu()
    return packed


def unpack(packed: Float[Tensor, "half columns"]) -> Float[Tensor, "K K"]:
    """The whole symmetric matrix."""
    half, size = packed.shape[0], packed.shape[1] - 1
    matrix = packed.new_empty(size, size)
    matrix[size - half :] = packed[:, 1:].triu().flip(0, 1)
    matrix[:half] = packed[:, :size].tril()
    return mirrored(matrix)


def mirrored(matrix: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """``matrix`` itself, with what is below the diagonal copied above it, some rows at a time."""
    for start in range(0, len(matrix), _BLOCK):
        end = start + _BLOCK
        corner = matrix[start:end, start:end].tril()
        matrix[start:end, start:end] = corner + corner.tril(-1).T
        matrix[start:end, end:] = matrix[end:, start:end].T
    return matrix
