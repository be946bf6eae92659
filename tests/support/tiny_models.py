"""A tiny tokenizer and tiny random Llama, made from nothing but local code."""

from __future__ import annotations

from pathlib import Path

from scripts.architectures.builder import build_genai_model
from scripts.architectures.tokenizer import BOS, EOS, VOCABULARY, train_tokenizer

__all__ = ["BOS", "EOS", "VOCABULARY", "build_genai_model", "save_tiny_llama", "train_tokenizer"]


def save_tiny_llama(folder: Path, tokenizer: Path, *, tied: bool = False) -> None:
    """Save a random Llama with grouped-query attention (4 query heads, 2 key/value heads of 16); lm_head may be tied.

    Weights are drawn wide enough that tokens differ in their logits; norm gains differ, so that folding into them
    can be seen.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.1 * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
