"""A tiny tokenizer and tiny random Llama, made from nothing but local code."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 300
BOS, EOS = "<s>", "</s>"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with exactly 300 tokens (256 bytes, two special ones, the commonest merges)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


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


def build_genai_model(
    source: Path, output: Path, precision: str = "fp32", execution_provider: str = "cpu", *extra: str
) -> None:
    """Run onnxruntime-genai's builder with ``extra`` options, without a new interpreter for each model."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = ("", str(source), str(output), precision, execution_provider, str(output / "cache"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        create_model(*place, **parse_extra_options(*place, list(extra)))
