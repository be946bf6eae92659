"""Output error of quantized weights, which every search minimizes: ||X D^T||^2 / T = tr(D G D^T), G = X^T X / T.

D [N, K] is the error of the weight, X [T, K] the activation and G its Gram matrix. Exact for a linear layer, and
computed from G or from the rows X themselves, whichever the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.quantization.search.affine import diagonal_blocks, split
from stages.quantization.weights.bitpack import slices
from stages.records.results import ActivationStats, SearchStats, TokenStats

_WIDE, _STRIP, _WIDE_STRIP = 2048, 128, 256
"""Inputs from which a matrix counts as wide; columns that are computed at once in others, and in those."""


def columns_at_once(inputs: int) -> int:
    """Return how many columns (or rows) of a K x K matrix a product shall have.

    In a wide matrix libraries compute fewer at half the rate; in a small one more of them would be computed in vain.
    """
    return _STRIP if inputs < _WIDE else _WIDE_STRIP


def output_error(error: Float[Tensor, "*batch N K"], stats: TokenStats) -> Float[Tensor, "*batch N"]:
    """Return the mean over tokens of every output channel's squared error, in float32.

    A Gram matrix is symmetric, so half of it, doubled off the diagonal, is enough.
    """
    if (gram := stats.gram) is not None:
        total = error.new_zeros(error.shape[:-1])
        for strip in slices(len(gram), columns_at_once(len(gram))):
            product = (error[..., : strip.start] @ gram[: strip.start, strip]).mul_(2)
            product += error[..., strip] @ gram[strip, strip]
            total += product.mul_(error[..., strip]).sum(dim=-1)
        return total
    assert stats.rows is not None
    return (error @ stats.rows.to(error.dtype).T).square().sum(dim=-1) / max(stats.num_tokens, 1)


def joint_errors(error: Float[Tensor, "N K"], stats: Sequence[TokenStats]) -> list[float]:
    """Return tr(D G D^T) for each of ``stats``: the squared output errors, summed over channels.

    Computed as <D^T D, G>: the first factor is common to all, and symmetric, so half of it is enough.
    """
    totals = [0.0 if each.gram is not None else float(output_error(error, each).double().sum()) for each in stats]
    with_gram = {index: each.gram for index, each in enumerate(stats) if each.gram is not None}
    if not with_gram:
        return totals
    parts: dict[int, list[Tensor]] = {index: [] for index in with_gram}
    for strip in slices(error.shape[1], columns_at_once(error.shape[1])):
        product = error[:, strip].T @ error[:, : strip.stop]
        product[:, : strip.start] *= 2
        for index, gram in with_gram.items():
            parts[index].append((product * gram[strip, : strip.stop]).sum(dim=-1))
    for index, sums in parts.items():
        totals[index] = float(torch.cat(sums).cpu().double().sum())
    return totals


def mixed_outputs(
    rows: Float[Tensor, "N K"], output_gram: Float[Tensor, "heads size size"] | None
) -> Float[Tensor, "N K"]:
    """Return U rows, with U^T U the output channels' Gram matrix H: tr(H D G D^T) is the plain error of U D.

    Args:
        rows: D, or any other matrix of N output channels.
        output_gram: the diagonal blocks of H, positive definite; None: the identity.
    """
    if output_gram is None:
        return rows
    upper: Tensor = torch.linalg.cholesky(output_gram).transpose(-1, -2)
    return (upper @ rows.view(*output_gram.shape[:2], -1)).view_as(rows)


def full_gram(stats: TokenStats) -> Float[Tensor, "K K"]:
    """Return the Gram matrix X^T X / T, from whichever form the statistics have."""
    if stats.gram is not None:
        return stats.gram
    assert stats.rows is not None
    rows = stats.rows.float()
    return rows.T @ rows / max(stats.num_tokens, 1)


def scaled_gram(gram: Float[Tensor, "K K"], input_scale: Float[Tensor, " K"] | None) -> Float[Tensor, "K K"]:
    """Return a new matrix, the Gram matrix of x / s: errors of the scaled weight W diag(s) have the same loss with it.

    Args:
        gram: of x.
        input_scale: s; None: ones.
    """
    return gram.clone() if input_scale is None else (gram / input_scale).div_(input_scale[:, None])


def gram_blocks(
    stats: TokenStats, block_size: int, input_scale: Float[Tensor, " K"] | None = None
) -> Float[Tensor, "nB B B"]:
    """Return the diagonal blocks of the Gram matrix of x / s, from whichever form the statistics have.

    Args:
        stats: of x.
        block_size: inputs of a block; the last one is padded with zeros.
        input_scale: s; None: ones.
    """
    if stats.gram is not None:
        blocks = diagonal_blocks(stats.gram, block_size)
    else:
        assert stats.rows is not None
        rows = split(stats.rows.float(), block_size)  # [T, nB, B]
        blocks = torch.einsum("tbi,tbj->bij", rows, rows) / max(stats.num_tokens, 1)
    if input_scale is None:
        return blocks
    reach = split(input_scale.reciprocal(), block_size)
    return blocks * reach.unsqueeze(1) * reach.unsqueeze(2)


def to_device(stats: TokenStats, device: torch.device) -> TokenStats:
    """Return the statistics with their tensors on ``device``."""
    return TokenStats(
        num_tokens=stats.num_tokens,
        abs_mean=stats.abs_mean.to(device),
        gram=None if stats.gram is None else stats.gram.to(device),
        rows=None if stats.rows is None else stats.rows.to(device),
    )


def search_to_device(stats: SearchStats, device: torch.device) -> SearchStats:
    """Return ``stats`` with what searches and forecasts compute with on ``device``."""
    tokens = ActivationStats(
        calibration=to_device(stats.tokens.calibration, device), held_out=to_device(stats.tokens.held_out, device)
    )
    output_grams = {name: gram.to(device) for name, gram in stats.output_grams.items()}
    return replace(stats, tokens=tokens, output_grams=output_grams)
