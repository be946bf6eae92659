"""The rotation leaves the function as it is, and takes the weights off a grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from genai_quant.base_models.off_grid import move_off_grid
from stages.errors import UserError

TOKENS = torch.arange(24)[None] * 5 % 300


def load(folder: Path) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model


def on_grid(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Round every projection to sixteen values a block of 32, as a 4-bit file stores them."""
    for name, parameter in model.named_parameters():
        if "_proj" in name and name.endswith("weight"):
            blocks = parameter.data.view(parameter.shape[0], -1, 32)
            scale = blocks.abs().amax(-1, keepdim=True) / 7
            parameter.data = ((blocks / scale).round() * scale).view_as(parameter)
    return model


def most_values_in_a_block(weight: torch.Tensor) -> int:
    return max(len(block.unique()) for block in weight.detach().reshape(-1, 32))


def llama_with_biases() -> transformers.LlamaForCausalLM:
    """Odd hidden size: one channel has no partner. Tied: the head must come loose from the embedding."""
    config = transformers.LlamaConfig(
        hidden_size=35,
        head_dim=8,
        intermediate_size=50,
        num_attention_heads=5,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=300,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("biases", [False, True])
def test_the_logits_stay_in_float64(biases: bool, tiny_hf: Path) -> None:
    model = llama_with_biases() if biases else load(tiny_hf)
    with torch.no_grad():
        before = model(TOKENS).logits
        move_off_grid(model)
        after = model(TOKENS).logits
    # RMSNorm's epsilon is untouched by a rotation; what is left is float64 rounding, and float32 inside RMSNorm.
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_weights_leave_their_grid(tiny_hf: Path) -> None:
    model = on_grid(load(tiny_hf))
    assert most_values_in_a_block(model.model.layers[0].mlp.up_proj.weight) <= 15
    move_off_grid(model)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            assert most_values_in_a_block(linear.weight) > 28


def test_the_same_seed_gives_the_same_weights_without_touching_the_global_generator(tiny_hf: Path) -> None:
    first, second, other = load(tiny_hf), load(tiny_hf), load(tiny_hf)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    move_off_grid(first)
    assert torch.rand(1) == expected
    move_off_grid(second)
    move_off_grid(other, seed=1)
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_an_unknown_architecture_is_named_with_the_mend() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(UserError, match=r"architecture 'gpt2'.*pass --keep_grid"):
        move_off_grid(model)
