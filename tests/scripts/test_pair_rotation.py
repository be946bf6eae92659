"""The rotation is what its equations say."""

from __future__ import annotations

import pytest
import torch

from scripts.pair_rotation import random_rotation


@pytest.mark.parametrize("channels", [8, 9])
def test_the_rotation_is_orthogonal_and_mixes_every_pair(channels: int) -> None:
    rotation = random_rotation(channels, torch.Generator().manual_seed(0))
    matrix = rotation.of_columns(torch.eye(channels))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (matrix != 0).sum() == 2 * (channels // 2) * 2 + channels % 2
    weight = torch.randn(5, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(rotation.of_columns(weight), weight @ matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotation.of_rows(weight.T), matrix.T @ weight.T, rtol=0, atol=1e-14)
    gain = weight[0]
    torch.testing.assert_close(rotation.mean_gain(gain), (matrix.T**2) @ gain.abs(), rtol=0, atol=1e-14)
