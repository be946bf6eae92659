import pytest
import torch

from stages.solve.blocks import diagonal_blocks, join, num_blocks, split


@pytest.mark.parametrize(("in_features", "block_size"), [(64, 16), (80, 32), (5, 16), (16, 16)])
def test_join_is_the_exact_inverse_of_split(in_features: int, block_size: int) -> None:
    weight = torch.randn(3, 7, in_features)
    blocks = split(weight, block_size)
    assert blocks.shape == (3, 7, num_blocks(in_features, block_size), block_size)
    assert torch.equal(join(blocks, in_features), weight)


def test_blocks_are_contiguous_along_the_inputs() -> None:
    # The competitor groups channels strided by K / B: channel 0's block must hold channels 0 to 3.
    weight = torch.arange(8.0).repeat(3, 1)
    assert torch.equal(split(weight, 4)[0], torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]]))


@pytest.mark.parametrize("in_features", [12, 10])
def test_diagonal_blocks_are_the_gram_matrix_of_each_block(in_features: int) -> None:
    tokens = torch.randn(30, in_features, dtype=torch.float64)
    blocks = diagonal_blocks(tokens.T @ tokens, 4)
    for index in range(num_blocks(in_features, 4)):
        part = torch.zeros(30, 4, dtype=torch.float64)
        channels = tokens[:, 4 * index : 4 * index + 4]
        part[:, : channels.shape[1]] = channels
        assert torch.equal(blocks[index], part.T @ part) or torch.allclose(blocks[index], part.T @ part, rtol=1e-12)
