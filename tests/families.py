"""One tiny random model for each architecture that the support matrix names, with that family's real peculiarities."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny_models import VOCABULARY

# Tokens of the tiny tokenizer, and sizes that every family shares.
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **_TOKENS}
_CONTEXT = 256
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture, the models that have it, and what quantization must do with it."""

    name: str
    models: tuple[str, ...]
    """Released models of this architecture: the rows of the support matrix."""
    config: Callable[[], PretrainedConfig]
    peculiar: str
    """What sets it apart from a plain Llama, in words."""
    sites: int
    """Quantized sites of two layers (the head stays as it is)."""
    folds: Mapping[str, str]
    """How the input scale of each kind of activation leaves, by the first site that reads it."""
    reason: str = ""
    """Why a Mul remains where ``folds`` says so."""


def _llama(rope: dict[str, object] | None, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=_CONTEXT,
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )


def _phi3() -> Phi3Config:
    return Phi3Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_CONTEXT,
        original_max_position_embeddings=64,
        # Wider than the context, as released: nothing slides.
        sliding_window=2 * _CONTEXT,
        rope_parameters={
            "rope_type": "longrope",
            "type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0 + 0.02 * i for i in range(8)],
            "long_factor": [1.0 + 0.9 * i for i in range(8)],
        },
    )


def _mistral(head_dim: int) -> MistralConfig:
    return MistralConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=_CONTEXT,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
    )


def _gemma() -> GemmaConfig:
    return GemmaConfig(
        **_SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=32, max_position_embeddings=_CONTEXT
    )


def _gemma2() -> Gemma2Config:
    return Gemma2Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=_CONTEXT,
        sliding_window=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def _gemma3() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=_CONTEXT,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            # Where onnxruntime-genai 0.18's builder looks for the same numbers: as transformers 4 wrote them.
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    )


def _nemotron() -> NemotronConfig:
    return NemotronConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_CONTEXT,
        # The released models say 1e-5; onnxruntime-genai 0.18 writes 1e-6 whatever they say.
        norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )


def _qwen2() -> Qwen2Config:
    return Qwen2Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        use_sliding_window=False,
        tie_word_embeddings=False,
    )


def _qwen3() -> Qwen3Config:
    return Qwen3Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


_PACKED = {"qkv_proj": "norm", "o_proj": "value", "gate_proj": "norm", "down_proj": "linear"}

FAMILIES = (
    Family(
        name="llama-3.1",
        models=("Llama 3.1 8B", "DeepSeek-R1-Distill-Llama 8B"),
        config=lambda: _llama(_LLAMA3_ROPE, tied=False),
        peculiar="rope scaling llama3",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="llama-3.2",
        models=("Llama 3.2 1B, 3B",),
        config=lambda: _llama(_LLAMA3_ROPE, tied=True),
        peculiar="rope scaling llama3, head tied to the embedding",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="smollm",
        models=("SmolLM, SmolLM2",),
        config=lambda: _llama(None, tied=True),
        peculiar="head tied to the embedding",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="phi-3.5",
        models=("Phi-3.5 mini",),
        config=_phi3,
        peculiar="longrope: two rotation tables behind an If; qkv and gate_up are packed in the checkpoint",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="mistral",
        models=("Mistral 7B v0.3",),
        config=lambda: _mistral(16),
        peculiar="grouped-query attention",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="mistral-nemo",
        models=("Mistral-NeMo-Minitron 2B, 4B, 8B",),
        config=lambda: _mistral(32),
        peculiar="head_dim * heads may differ from the hidden size",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="gemma",
        models=("Gemma 2B",),
        config=_gemma,
        peculiar="one key/value head, head_dim * heads over the hidden size, gelu, gains 1 + w, scaled embedding",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="gemma-2",
        models=("Gemma 2 2B, 9B",),
        config=_gemma2,
        peculiar="a norm behind each half of a layer too, soft-capped attention and logits, every other layer slides",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="gemma-3",
        models=("Gemma 3 1B (text)",),
        config=_gemma3,
        peculiar=(
            "as Gemma 2 without soft caps, with norms of q and k and two rotation tables (onnxruntime-genai 0.18 reads "
            "its configuration as scripts.build_base_model writes it)"
        ),
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="nemotron",
        models=("Nemotron-Mini 4B", "Minitron 4B, 8B"),
        config=_nemotron,
        peculiar="LayerNorm with gain 1 + w and bias, partial rotation, MLP without a gate: relu(up)^2",
        sites=8,
        folds={"qkv_proj": "norm", "o_proj": "value", "up_proj": "norm", "down_proj": "mul"},
        reason="it comes from Pow",
    ),
    Family(
        name="qwen2.5",
        models=("Qwen2.5 7B", "DeepSeek-R1-Distill-Qwen 1.5B, 7B, 14B"),
        config=_qwen2,
        peculiar="bias behind q, k and v",
        sites=10,
        folds=_PACKED,
    ),
    Family(
        name="qwen3",
        models=("Qwen3 (dense)",),
        config=_qwen3,
        peculiar="norms of q and k, head tied to the embedding",
        sites=10,
        folds=_PACKED,
    ),
)


def save_random_model(config: PretrainedConfig, folder: Path, tokenizer: Path) -> None:
    """Hugging Face folder of a random model: weights wide enough that tokens differ in their logits.

    Gains are drawn around one whichever way the family stores them (Gemma and Nemotron keep gain - 1). Each layer's
    outputs have unlike sizes, so that every activation has channels that matter more and an input scale pays.
    """
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # Fresh models hold gains of one, or of zero where one is added; biases are zero.
                parameter.copy_(parameter.mean().round() + 0.3 * noise)
            else:
                sizes = torch.exp(0.7 * torch.randn(len(parameter), 1, generator=generator))
                # Layers add less than the embedding holds, so that two of them don't drown the logits in rounding.
                parameter.copy_(0.05 * noise * sizes if name.endswith("proj.weight") else 0.1 * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def build_in_process(source: Path, output: Path, precision: str = "fp32", execution_provider: str = "cpu") -> None:
    """onnxruntime-genai's builder, without a new interpreter for each of a dozen models."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = ("", str(source), str(output), precision, execution_provider, str(output / "cache"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        create_model(*place, **parse_extra_options(*place, []))
