"""Models whose norms only read the residual stream: rotate that stream, and with it every weight.

Write x for the residual stream and R for the rotation. RMSNorm without its gain commutes with R, so the gain g is first
folded into the matrices that read the norm's output; then, with g' a new positive gain,

    reading  W  becomes  (W diag(g) R) diag(1 / g')        norm(x) -> norm(x R)
    writing  W  becomes  R^T W                             x + W y -> (x + W y) R

g' averages |g| over each pair, so that the graph keeps gains of the usual size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scripts.pair_rotation import PairRotation, random_rotation


def rotate_residual_stream(model: nn.Module, generator: torch.Generator) -> None:
    """Rotate ``model`` in place; an output head tied to the embedding becomes its own."""
    network: Any = model
    _untie(network)
    rotation = random_rotation(network.config.hidden_size, generator)
    decoder = network.model
    embedding: Tensor = decoder.embed_tokens.weight
    _store(embedding, rotation.of_columns(embedding))
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _rotate_readers(layer.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj], rotation)
        _rotate_readers(layer.post_attention_layernorm.weight, [mlp.gate_proj, mlp.up_proj], rotation)
        _rotate_writer(attention.o_proj, rotation)
        _rotate_writer(mlp.down_proj, rotation)
    _rotate_readers(decoder.norm.weight, [network.lm_head], rotation)


def _untie(model: nn.Module) -> None:
    # The head takes up the final norm's gain, the embedding doesn't.
    network: Any = model
    network.config.tie_word_embeddings = False
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone(), requires_grad=False)


def _rotate_readers(gain: Tensor, readers: list[nn.Linear], rotation: PairRotation) -> None:
    mixed = rotation.mean_gain(gain)
    for linear in readers:
        _store(linear.weight, rotation.of_columns(linear.weight.double() * gain.double()) / mixed)
    _store(gain, mixed)


def _rotate_writer(linear: nn.Linear, rotation: PairRotation) -> None:
    _store(linear.weight, rotation.of_rows(linear.weight))
    bias: Tensor | None = linear.bias
    if bias is not None:
        _store(bias, rotation.of_columns(bias[None])[0])


def _store(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
