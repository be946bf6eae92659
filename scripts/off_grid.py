"""The same function with other weights: rotate the residual stream, so that no weight lies on its old 4-bit grid.

A checkpoint dequantized from GGUF has sixteen values in each block of 32; a quantizer with the same blocks recovers
them exactly, which says nothing about it. Small Givens rotations of randomly paired channels mix two channels each:
weights leave the grid, while outlier channels, which make quantization hard, stay where they are.

Write x for the residual stream and R for the rotation. RMSNorm without its gain commutes with R, so the gain g is first
folded into the matrices that read the norm's output; then, with g' a new positive gain,

    reading  W  becomes  (W diag(g) R) diag(1 / g')        norm(x) -> norm(x R)
    writing  W  becomes  R^T W                             x + W y -> (x + W y) R

g' averages |g| over each pair, so that the graph keeps gains of the usual size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import UserError

_KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_LARGEST_ANGLE = 0.6
_PROBE_TOKENS = 32
# Float32 arithmetic through 30 layers leaves about 1e-5 of the largest logit.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRotation:
    """Rotations of disjoint channel pairs: R[i, i] = R[j, j] = cos, R[i, j] = sin, R[j, i] = -sin, all in float64."""

    first: Tensor
    second: Tensor
    cos: Float[Tensor, " pairs"]
    sin: Float[Tensor, " pairs"]

    def of_columns(self, matrix: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """``matrix @ R`` in float64."""
        rotated = matrix.double().clone()
        left, right = rotated[:, self.first], rotated[:, self.second]
        rotated[:, self.first] = self.cos * left - self.sin * right
        rotated[:, self.second] = self.sin * left + self.cos * right
        return rotated

    def of_rows(self, matrix: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """``R^T @ matrix`` in float64."""
        return self.of_columns(matrix.T).T.contiguous()

    def mean_gain(self, gain: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """|gain| averaged over each pair with the squared entries of R, in float64."""
        averaged = gain.double().abs()
        left, right = averaged[self.first], averaged[self.second]
        averaged[self.first] = self.cos**2 * left + self.sin**2 * right
        averaged[self.second] = self.sin**2 * left + self.cos**2 * right
        return averaged


def random_rotation(channels: int, seed: int) -> PairRotation:
    """Pair ``channels`` at random (an odd one stays alone) and draw each angle from [-0.6, 0.6] radians."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(channels, generator=generator)
    pairs = channels // 2
    angles = (torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 - 1) * _LARGEST_ANGLE
    return PairRotation(
        first=order[:pairs], second=order[pairs : 2 * pairs], cos=torch.cos(angles), sin=torch.sin(angles)
    )


@torch.no_grad()
def move_off_grid(model: PreTrainedModel, seed: int = 0) -> float:
    """Rotate ``model`` in place, its function unchanged; an output head tied to the embedding becomes its own.

    Returns:
        The largest difference of logits on a few tokens, relative to the largest logit.

    Raises:
        UserError: the architecture isn't one whose norms and residual stream are known here.
    """
    kind = model.config.model_type
    if kind not in _KNOWN_MODELS:
        raise UserError(
            f"--source has architecture '{kind}', which can't be moved off its grid (known: "
            f"{', '.join(_KNOWN_MODELS)}); pass --keep_grid."
        )
    network: Any = model
    network.eval()
    probe = torch.arange(_PROBE_TOKENS)[None] * 7 % model.config.vocab_size
    before: Tensor = network(probe).logits
    _untie(network)
    _rotate(network, random_rotation(model.config.hidden_size, seed))
    after: Tensor = network(probe).logits
    difference = float((after - before).abs().max() / before.abs().max())
    assert difference < _TOLERANCE, f"rotation changed the logits by {difference:.1e} of the largest"
    return difference


def _untie(model: nn.Module) -> None:
    # The head takes up the final norm's gain, the embedding doesn't.
    network: Any = model
    network.config.tie_word_embeddings = False
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone(), requires_grad=False)


def _rotate(model: nn.Module, rotation: PairRotation) -> None:
    network: Any = model
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
