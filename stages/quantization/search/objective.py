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
from stages.records.results import ActivationStats, SearchStats, TokenStats

_STRIP = 128
"""Rows of a symmetric product that are computed at once: narrower ones run slower, wider ones compute more twice."""


def output_error(error: Float[Tensor, "*batch N K"], stats: TokenStats) -> Float[Tensor, "*batch N"]:
    """Return the mean over tokens of every output channel's squared error, in float32.

    A Gram matrix is symmetric, so half of it, doubled off the diagonal, is enough.
    """
    if stats.gram is not None:
        gram = stats.gram.triu(1).mul_(2)
        gram.diagonal().copy_(stats.gram.diagonal())
        total = error.new_zeros(error.shape[:-1])
        for start in range(0, len(gram), _STRIP):
            strip = slice(start, start + _STRIP)
            product = error[..., : strip.stop] @ gram[: strip.stop, strip]
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
    for start in range(0, error.shape[1], _STRIP):
        end = start + _STRIP
        strip = error[:, start:end].T @ error[:, :end]
        strip[:, :start] *= 2
        for index, gram in with_gram.items():
            parts[index].append((strip * gram[start:end, :end]).sum(dim=-1))
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


def gram_blocks(stats: TokenStats, block_size: int) -> Float[Tensor, "nB B B"]:
    """Return the diagonal blocks of the Gram matrix, from whichever form the statistics have."""
    if stats.gram is not None:
        return diagonal_blocks(stats.gram, block_size)
    assert stats.rows is not None
    blocks = split(stats.rows.float(), block_size)  # [T, nB, B]
    return torch.einsum("tbi,tbj->bij", blocks, blocks) / max(stats.num_tokens, 1)


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


def in_scaled_space(stats: TokenStats, input_scale: Float[Tensor, " K"]) -> TokenStats:
    """Return the statistics of x / s: they give the same loss, for errors of the scaled weight W diag(s)."""
    return TokenStats(
        num_tokens=stats.num_tokens,
        abs_mean=stats.abs_mean / input_scale,
        gram=None if stats.gram is None else stats.gram / input_scale / input_scale[:, None],
        rows=None if stats.rows is None else stats.rows.float() / input_scale,
    )
