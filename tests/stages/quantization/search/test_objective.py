"""The output error against the product with the activations spelled out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stages.quantization.search.affine import split
from stages.quantization.search.objective import full_gram, gram_blocks, joint_errors, output_error, scaled_gram
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
    scaled = replace(stats, gram=scaled_gram(full_gram(stats), scale), rows=None)
    # The same sum in another order: float32 rounding of 576 products.
    torch.testing.assert_close(output_error(error * scale, scaled), output_error(error, stats), rtol=1e-4, atol=0)
    whole = split(scaled.gram, 10)  # 24 inputs: the last block is padded
    blocks = gram_blocks(stats, 10, scale)
    torch.testing.assert_close(blocks[1], whole[10:20, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(blocks[2, :4], whole[20:, 2], rtol=1e-4, atol=0)
    assert not blocks[2, 4:].any()


def test_a_scaled_gram_matrix_is_a_new_one() -> None:
    """Damping changes it in place."""
    gram = torch.rand(4, 4)
    before = gram.clone()
    scaled_gram(gram, None).zero_()
    scaled_gram(gram, torch.ones(4)).zero_()
    assert torch.equal(gram, before)


def test_wide_matrices_are_summed_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.quantization.search.objective._WIDE", 20)
    monkeypatch.setattr("stages.quantization.search.objective._WIDE_STRIP", 7)
    tokens = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    error = torch.randn(9, 24)
    direct = (error.double() @ tokens.double().T).square().mean(dim=-1)
    stats = gram_stats(tokens)
    torch.testing.assert_close(output_error(error, stats).double(), direct, rtol=2e-5, atol=0)
    assert joint_errors(error, [stats, stats]) == pytest.approx([float(direct.sum())] * 2, rel=2e-5)


@pytest.mark.parametrize("difference", [300.0, 1e-4])
def test_squares_that_float16_cannot_hold_neither_overflow_nor_vanish(difference: float) -> None:
    rows = torch.ones(4, 1).half()
    for stats in (gram_stats(rows.float()), row_stats(rows)):
        error = output_error(torch.tensor([[difference]]), stats)
        assert error.dtype == torch.float32
        assert float(error) == pytest.approx(difference**2, rel=1e-6)
