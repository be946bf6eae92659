"""Gemma 2 and 3: every projection leaves its grid, the function stays, and what can't move is untouched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from genai_quant.base_models.equivalent_weights import random_rotation
from genai_quant.base_models.off_grid import move_off_grid
from tests.reference.grid import grid_error

TOKENS = torch.arange(40)[None] * 7 % 300


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "attention_bias": True,
}


def gemma2() -> transformers.PretrainedConfig:
    return transformers.Gemma2Config(**SIZES, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)


def gemma3() -> transformers.PretrainedConfig:
    return transformers.Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"])


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Weights wide enough that tokens differ, gains around one (stored as gain - 1), biases away from zero; float64."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_((0.3 if "norm" in name else 0.1) * noise)
    return model


def projections(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    named = {name: module.weight.data for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: weight for name, weight in named.items() if name.split(".")[-1] in PROJECTIONS}


def on_grid(weight: torch.Tensor) -> torch.Tensor:
    """Fifteen levels a block of 32, as a 4-bit file stores them."""
    blocks = weight.view(-1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).view_as(weight)


@pytest.mark.parametrize("config", [gemma2, gemma3])
def test_the_logits_stay_in_float64(config: Callable[[], transformers.PretrainedConfig]) -> None:
    model = random_model(config())
    with torch.no_grad():
        before = model(TOKENS).logits
        move_off_grid(model)
        after = model(TOKENS).logits
    assert before.std() > 0.1
    # The changes are exact up to float64 rounding; RMSNorm and the softmax compute in float32.
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_every_projection_leaves_its_grid() -> None:
    model = random_model(gemma3())
    ordinary = {name: grid_error(weight.numpy(), 32, 16) for name, weight in projections(model).items()}
    assert len(ordinary) == 2 * len(PROJECTIONS)
    for weight in projections(model).values():
        weight.copy_(on_grid(weight))
    for weight in projections(model).values():
        assert grid_error(weight.numpy(), 32, 16) < 1e-12
    move_off_grid(model)
    for name, weight in projections(model).items():
        # As far off as random weights are; those that were exactly zero may still be.
        assert grid_error(weight.numpy(), 32, 16) > 0.9 * ordinary[name]


def test_the_embedding_stays_and_stays_tied() -> None:
    model = random_model(gemma3())
    before = model.model.embed_tokens.weight.detach().clone()
    move_off_grid(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_channels_change_by_no_more_than_half() -> None:
    """Channels with large activations keep them: what makes quantization hard stays."""
    model = random_model(gemma3())
    gains = {name: 1 + parameter.detach().clone() for name, parameter in model.named_parameters() if "norm" in name}
    move_off_grid(model)
    changed = 0
    for name, parameter in model.named_parameters():
        if name in gains:
            ratio = ((1 + parameter.detach()) / gains[name]).numpy()
            assert np.all((ratio >= 1 / 1.5 - 1e-9) & (ratio <= 1.5 + 1e-9))
            changed += not np.allclose(ratio, 1)
    # The norms before q, k, v and before the MLP; not those of q and k, behind a branch, or at the end.
    assert changed == 2 * 2


@pytest.mark.parametrize("channels", [8, 9])
def test_the_rotation_is_orthogonal_and_mixes_every_pair(channels: int) -> None:
    rotation = random_rotation(channels, torch.Generator().manual_seed(0))
    matrix = rotation.of_columns(torch.eye(channels))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (matrix != 0).sum() == 2 * (channels // 2) * 2 + channels % 2
    weight = torch.randn(5, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(rotation.of_columns(weight), weight @ matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotation.of_rows(weight.T), matrix.T @ weight.T, rtol=0, atol=1e-14)
    gain = weight[0]
    torch.testing.assert_close(rotation.mean_gain(gain), (matrix.T**2) @ gain.abs(), rtol=0, atol=1e-14)
