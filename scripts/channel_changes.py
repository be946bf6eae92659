"""Models with a norm behind each branch (Gemma 2 and 3): new channel sizes and rotated values inside each layer.

That norm's gain stands between a branch and the residual stream, so the stream can't be rotated. Three other changes
leave the function alone, and between them they reach every projection. f is a random positive factor a channel:

    norm -> q, k, v; gate, up    gain / f                                W diag(f)
    v -> o                       R^T W a key/value head                  W R a query head, the same R for all heads
    up -> down                   diag(1 / f) W                           W diag(f)

Softmax weights mix tokens, not channels, so R passes through attention; the gate multiplies channel by channel, so a
rotation would not pass through it, and a factor does. f lies between 2/3 and 3/2: blocks lose their grid, and channels
with large activations keep them. The embedding, and the head tied to it, stay: a GGUF stores them with 8 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scripts.pair_rotation import PairRotation, random_rotation

_LARGEST_FACTOR = 1.5


def change_channels(model: nn.Module, generator: torch.Generator) -> None:
    """Change every projection of ``model`` in place, its function unchanged."""
    network: Any = model
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _resize_normed(layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj], generator)
        _resize_normed(layer.pre_feedforward_layernorm.weight, [mlp.gate_proj, mlp.up_proj], generator)
        _rotate_values(attention.v_proj, attention.o_proj, attention.head_dim, generator)
        _resize_hidden(mlp.up_proj, mlp.down_proj, generator)


def _random_factors(channels: int, generator: torch.Generator) -> Float[Tensor, " K"]:
    exponents = torch.rand(channels, generator=generator, dtype=torch.float64) * 2 - 1
    return torch.exp(exponents * math.log(_LARGEST_FACTOR))


def _resize_normed(gain_minus_one: Tensor, readers: list[nn.Linear], generator: torch.Generator) -> None:
    factors = _random_factors(len(gain_minus_one), generator)
    gain_minus_one.copy_((1 + gain_minus_one.double()) / factors - 1)
    for linear in readers:
        linear.weight.copy_(linear.weight.double() * factors)


def _rotate_values(values: nn.Linear, output: nn.Linear, head_dim: int, generator: torch.Generator) -> None:
    rotation = random_rotation(head_dim, generator)
    output.weight.copy_(_rotate_heads(output.weight, head_dim, rotation))
    values.weight.copy_(_rotate_heads(values.weight.T, head_dim, rotation).T)
    bias: Tensor | None = values.bias
    if bias is not None:
        bias.copy_(_rotate_heads(bias[None], head_dim, rotation)[0])


def _rotate_heads(matrix: Float[Tensor, "N K"], head_dim: int, rotation: PairRotation) -> Float[Tensor, "N K"]:
    """``matrix`` times R in the columns of each head."""
    return rotation.of_columns(matrix.reshape(-1, head_dim)).reshape(matrix.shape)


def _resize_hidden(up: nn.Linear, down: nn.Linear, generator: torch.Generator) -> None:
    factors = _random_factors(up.out_features, generator)
    up.weight.copy_(up.weight.double() / factors[:, None])
    down.weight.copy_(down.weight.double() * factors)
