"""Equivalent weights: change a model's weights at random and leave its function as it is.

Givens rotations of randomly paired channels (R) and random positive factors a channel (f, between 2/3 and 3/2) take
every block of a projection off its 4-bit grid, while channels with large activations keep them.

Where norms only read the residual stream x (Llama, Mistral, Qwen), the stream itself is rotated. RMSNorm without its
gain commutes with R, so the gain g is first folded into the matrices that read the norm's output; then, with g' a new
positive gain that averages |g| over each pair,

    reading  W  becomes  (W diag(g) R) diag(1 / g')        norm(x) -> norm(x R)
    writing  W  becomes  R^T W                             x + W y -> (x + W y) R

Where a norm stands behind each branch (Gemma 2 and 3), its gain keeps the stream from being rotated. Three changes
inside each layer reach every projection:

    norm -> q, k, v; gate, up    gain / f                                W diag(f)
    v -> o                       R^T W a key/value head                  W R a query head, the same R for all heads
    up -> down                   diag(1 / f) W                           W diag(f)

Softmax weights mix tokens, not channels, so R passes through attention; the gate multiplies channel by channel, so a
rotation would not pass through it, and a factor does. The embedding, and the head tied to it, stay: a GGUF stores them
with 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LARGEST_ANGLE = 0.6
_LARGEST_FACTOR = 1.5


def rotate_residual_stream(model: nn.Module, generator: torch.Generator) -> None:
    """Rotate ``model`` in place; an output head tied to the embedding becomes its own."""
    network: Any = model
    _untie(network)
    rotation = random_rotation(network.config.hidden_size, generator)
    decoder = network.model
    embedding: Tensor = decoder.embed_tokens.weight
    embedding.copy_(rotation.of_columns(embedding))
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _rotate_readers(layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj], rotation)
        _rotate_readers(layer.post_attention_layernorm.weight, [mlp.gate_proj, mlp.up_proj], rotation)
        _rotate_writer(attention.o_proj, rotation)
        _rotate_writer(mlp.down_proj, rotation)
    _rotate_readers(decoder.norm.weight, [network.lm_head], rotation)


def change_channels(model: nn.Module, generator: torch.Generator) -> None:
    """Change every projection of ``model`` in place: resized channels, and values rotated inside each head."""
    network: Any = model
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _resize_normed(layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj], generator)
        _resize_normed(layer.pre_feedforward_layernorm.weight, [mlp.gate_proj, mlp.up_proj], generator)
        _rotate_values(attention.v_proj, attention.o_proj, attention.head_dim, generator)
        _resize_hidden(mlp.up_proj, mlp.down_proj, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRotation:
    """Rotations of disjoint channel pairs: R[i, i] = R[j, j] = cos, R[i, j] = sin, R[j, i] = -sin, all in float64."""

    first: Tensor
    second: Tensor
    cos: Float[Tensor, " pairs"]
    sin: Float[Tensor, " pairs"]

    def of_columns(self, matrix: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Return ``matrix @ R`` in float64."""
        rotated = matrix.double().clone()
        left, right = rotated[:, self.first], rotated[:, self.second]
        rotated[:, self.first] = self.cos * left - self.sin * right
        rotated[:, self.second] = self.sin * left + self.cos * right
        return rotated

    def of_rows(self, matrix: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Return ``R^T @ matrix`` in float64."""
        return self.of_columns(matrix.T).T.contiguous()

    def mean_gain(self, gain: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """Return |gain| averaged over each pair with the squared entries of R, in float64."""
        averaged = gain.double().abs()
        left, right = averaged[self.first], averaged[self.second]
        averaged[self.first] = self.cos**2 * left + self.sin**2 * right
        averaged[self.second] = self.sin**2 * left + self.cos**2 * right
        return averaged


def random_rotation(channels: int, generator: torch.Generator) -> PairRotation:
    """Pair ``channels`` at random (an odd one stays alone) and draw each angle from [-0.6, 0.6] radians."""
    order = torch.randperm(channels, generator=generator)
    pairs = channels // 2
    angles = (torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 - 1) * _LARGEST_ANGLE
    return PairRotation(
        first=order[:pairs], second=order[pairs : 2 * pairs], cos=torch.cos(angles), sin=torch.sin(angles)
    )


# --------------------------------------------------------------------------- the residual stream


def _untie(model: nn.Module) -> None:
    # The head takes up the final norm's gain, the embedding doesn't.
    network: Any = model
    network.config.tie_word_embeddings = False
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone(), requires_grad=False)


def _rotate_readers(gain: Tensor, readers: list[nn.Linear], rotation: PairRotation) -> None:
    mixed = rotation.mean_gain(gain)
    for linear in readers:
        linear.weight.copy_(rotation.of_columns(linear.weight.double() * gain.double()) / mixed)
    gain.copy_(mixed)


def _rotate_writer(linear: nn.Linear, rotation: PairRotation) -> None:
    linear.weight.copy_(rotation.of_rows(linear.weight))
    bias: Tensor | None = linear.bias
    if bias is not None:
        bias.copy_(rotation.of_columns(bias[None])[0])


# --------------------------------------------------------------------------- channels inside a layer


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
    """Return ``matrix`` times R in the columns of each head."""
    return rotation.of_columns(matrix.reshape(-1, head_dim)).reshape(matrix.shape)


def _resize_hidden(up: nn.Linear, down: nn.Linear, generator: torch.Generator) -> None:
    factors = _random_factors(up.out_features, generator)
    up.weight.copy_(up.weight.double() / factors[:, None])
    down.weight.copy_(down.weight.double() * factors)
