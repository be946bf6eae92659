"""Packing a symmetric matrix: an exact inverse pair, in half the room."""

from __future__ import annotations

import pytest
import torch

from stages.observe import triangle
from stages.observe.triangle import pack, unpack


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 33])
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_unpacking_gives_back_the_matrix(size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "_BLOCK", block)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    matrix = x.T @ x
    matrix = matrix.tril() + matrix.tril(-1).T
    packed = pack(matrix)
    assert packed.numel() == -(-size // 2) * (size + 1)
    assert torch.equal(unpack(packed), matrix)


@pytest.mark.parametrize("size", [4, 5])
def test_every_number_below_the_diagonal_is_there(size: int) -> None:
    matrix = torch.arange(float(size * size)).reshape(size, size) + 1
    below = sorted(matrix[row, column].item() for row in range(size) for column in range(row + 1))
    assert set(below) == set(pack(matrix).flatten().tolist())
