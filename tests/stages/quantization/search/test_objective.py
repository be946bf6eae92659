"""The output error against the product with the activations spelled out."""

from __future__ import annotations

import pytest
import torch

from stages.quantization.search.objective import gram_blocks, in_scaled_space, output_error
from stages.records.results import TokenStats
from tests.stages.quantization.search.problems import gram_stats, row_stats


@pytest.fixture(params=[gram_stats, row_stats])
def tokens_and_stats(request: pytest.FixtureRequest) -> tuple[torch.Tensor, TokenStats]:
    tokens = torch.randn(50, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 5, 24)
    return tokens, request.param(tokens)


def test_gram_identity(tokens_and_stats: tuple[torch.Tensor, TokenStats]) -> None:
    tokens, stats = tokens_and_stats
    error = torch.randn(2, 9, 24)
    direct = (error.double() @ tokens.double().T).square().mean(dim=-1)
    # Sums of 24 * 24 float32 products.
    torch.testing.assert_close(output_error(error, stats).double(), direct, rtol=2e-5, atol=0)


def test_gram_blocks_give_each_blocks_own_output_error(tokens_and_stats: tuple[torch.Tensor, TokenStats]) -> None:
    tokens, stats = tokens_and_stats
    error = torch.randn(3, 5, 8)  # [nB, N, B]
    ours = ((error @ gram_blocks(stats, 8)) * error).sum(dim=-1)
    for block in range(3):
        part = tokens[:, 8 * block : 8 * block + 8].double()
        direct = (error[block].double() @ part.T).square().mean(dim=-1)
        torch.testing.assert_close(ours[block].double(), direct, rtol=2e-5, atol=0)


def test_scaled_space_keeps_the_loss(tokens_and_stats: tuple[torch.Tensor, TokenStats]) -> None:
    _, stats = tokens_and_stats
    scale = torch.rand(24) + 0.5
    error = torch.randn(4, 24)
    # The same sum in another order: float32 rounding of 576 products.
    torch.testing.assert_close(
        output_error(error * scale, in_scaled_space(stats, scale)), output_error(error, stats), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("difference", [300.0, 1e-4])
def test_squares_that_float16_cannot_hold_neither_overflow_nor_vanish(difference: float) -> None:
    rows = torch.ones(4, 1).half()
    for stats in (gram_stats(rows.float()), row_stats(rows)):
        error = output_error(torch.tensor([[difference]]), stats)
        assert error.dtype == torch.float32
        assert float(error) == pytest.approx(difference**2, rel=1e-6)
