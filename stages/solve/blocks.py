"""Cut the input dimension into blocks and put it together again: the only place that knows how channels are grouped.

Blocks are contiguous along K. Where B does not divide K the last block is filled up with zeros, which change neither a
block's range (zero is always inside it) nor any loss (their weight error is cut off again).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def num_blocks(in_features: int, block_size: int) -> int:
    """nB = ceil(K / B)."""
    return -(-in_features // block_size)


def split(weight: Float[Tensor, "*batch K"], block_size: int) -> Float[Tensor, "*batch nB B"]:
    """[..., K] -> [..., nB, B], zero-padded at the end; a view of ``weight`` where nothing is added."""
    *batch, in_features = weight.shape
    blocks = num_blocks(in_features, block_size)
    missing = blocks * block_size - in_features
    whole = pad(weight, (0, missing)) if missing else weight  # a copy even where there is nothing to add
    return whole.reshape(*batch, blocks, block_size)


def join(blocks: Float[Tensor, "*batch nB B"], in_features: int) -> Float[Tensor, "*batch K"]:
    """The inverse of ``split``: [..., nB, B] -> [..., K] with the padding cut off."""
    return blocks.flatten(-2)[..., :in_features]


def diagonal_blocks(gram: Float[Tensor, "K K"], block_size: int) -> Float[Tensor, "nB B B"]:
    """The B x B blocks on the diagonal of a Gram matrix, zero where the last one is padded."""
    padded = split(split(gram, block_size).movedim(0, -1), block_size)  # [nB, B, nB, B]: columns, then rows
    return torch.diagonal(padded, dim1=0, dim2=2).permute(2, 0, 1).contiguous()
