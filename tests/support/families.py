"""One tiny random model for each architecture that the support matrix names, with that family's real peculiarities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.support.tiny_models import VOCABULARY

# Tokens of the tiny tokenizer, and sizes that every family shares.
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, **_TOKENS}
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
    config: Callable[[], transformers.PretrainedConfig]
    peculiar: str
    """What sets it apart from a plain Llama, in words."""
    kinds: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Quantized sites of a layer, by their builder's name."""
    folds: Mapping[str, str]
    """How the input scale of each kind of activation leaves, by the first site that reads it."""
    int8_layers: tuple[int, ...] = (0, 3)
    """Layers whose qkv and down projections the reference's mixed rule stores as INT8: of four, every third."""
    int8_head: bool = False
    """Whether the mixed model is made with --lm_head 8."""
    width: float = 0.25
    """Standard deviation of embedding and head: by it, predictions are neither flat nor certain."""
    routers: int = 0
    """Routers of experts, which stay as they are."""

    @property
    def sites(self) -> int:
        """Quantized sites of all layers (the head stays as it is)."""
        return len(self.kinds) * int(self.config().num_hidden_layers)


def _llama(rope: dict[str, object] | None, *, tied: bool, layers: int = 4) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **(_SIZES | {"num_hidden_layers": layers}),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=_CONTEXT,
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )


def _phi3() -> transformers.Phi3Config:
    return transformers.Phi3Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_CONTEXT,
        # Shorter than the test's texts and longer than its prompts: both rotation tables are used.
        original_max_position_embeddings=32,
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


def _mistral(head_dim: int) -> transformers.MistralConfig:
    return transformers.MistralConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=_CONTEXT,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
    )


def _gemma() -> transformers.GemmaConfig:
    return transformers.GemmaConfig(
        **_SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=32, max_position_embeddings=_CONTEXT
    )


def _gemma2() -> transformers.Gemma2Config:
    return transformers.Gemma2Config(
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


def _gemma3() -> transformers.Gemma3TextConfig:
    return transformers.Gemma3TextConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=_CONTEXT,
        sliding_window=16,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            # Where onnxruntime-genai 0.18's builder looks for the same numbers: as transformers 4 wrote them.
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    )


def _nemotron() -> transformers.NemotronConfig:
    return transformers.NemotronConfig(
        **_SIZES,
        # Three query heads share a key/value head, as in Nemotron-Mini 4B.
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_CONTEXT,
        # The released models say 1e-5; onnxruntime-genai 0.18 writes 1e-6 whatever they say.
        norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )


def _qwen2() -> transformers.Qwen2Config:
    return transformers.Qwen2Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        use_sliding_window=False,
        tie_word_embeddings=False,
    )


def _qwen3() -> transformers.Qwen3Config:
    return transformers.Qwen3Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


def _gpt_oss() -> transformers.GptOssConfig:
    return transformers.GptOssConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=_CONTEXT,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    )


def lfm2_moe() -> transformers.Lfm2MoeConfig:
    """Return LFM2-MoE: short convolutions between attention layers, and experts in all layers but the first."""
    return transformers.Lfm2MoeConfig(
        **_SIZES,
        moe_intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"] * 2,
        max_position_embeddings=_CONTEXT,
    )


_PACKED = {"qkv_proj": "norm", "o_proj": "value", "gate_proj": "norm", "down_proj": "linear"}

FAMILIES = (
    Family(
        name="llama-3.1",
        models=("Llama3.1-8B-Instruct", "DeepSeek-R1-Distill-Llama-8B"),
        config=lambda: _llama(_LLAMA3_ROPE, tied=False),
        peculiar="rope scaling llama3",
        folds=_PACKED,
    ),
    Family(
        name="llama-3.2",
        models=("Llama3.2-3B-Instruct (and 1B)",),
        config=lambda: _llama(_LLAMA3_ROPE, tied=True),
        peculiar="rope scaling llama3, head tied to the embedding",
        width=0.22,
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="phi-3.5",
        models=("Phi3.5-mini-Instruct",),
        config=_phi3,
        peculiar="longrope: two rotation tables behind an If; qkv and gate_up are packed in the checkpoint",
        folds=_PACKED,
    ),
    Family(
        name="mistral",
        models=("Mistral-7B-Instruct-v0.3",),
        config=lambda: _mistral(16),
        peculiar="grouped-query attention",
        folds=_PACKED,
    ),
    Family(
        name="gemma",
        models=("Gemma-2b-it",),
        config=_gemma,
        peculiar="one key/value head, head_dim * heads over the hidden size, gelu, gains 1 + w, scaled embedding",
        width=0.11,
        folds=_PACKED,
    ),
    Family(
        name="gemma-2",
        models=("Gemma-2-2b", "Gemma-2-9b"),
        config=_gemma2,
        peculiar="a norm behind each half of a layer too, soft-capped attention and logits, every other layer slides",
        width=0.2,
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="nemotron",
        models=("Nemotron Mini 4B Instruct (and Minitron 4B, 8B)",),
        config=_nemotron,
        peculiar="LayerNorm with gain 1 + w and bias, partial rotation, MLP without a gate: relu(up)^2",
        kinds=("qkv_proj", "o_proj", "up_proj", "down_proj"),
        width=0.13,
        folds={"qkv_proj": "norm", "o_proj": "value", "up_proj": "norm", "down_proj": "linear"},
    ),
    Family(
        name="qwen2.5",
        models=(
            "Qwen2.5-7B-Instruct",
            "DeepSeek-R1-Distil-Qwen-1.5B",
            "DeepSeek-R1-Distil-Qwen-7B",
            "DeepSeek-R1-Distill-Qwen-14B",
        ),
        config=_qwen2,
        peculiar="bias behind q, k and v",
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="mistral-nemo",
        models=(
            # The 8B one's configuration is MistralForCausalLM. The smaller ones' were not seen (NVIDIA's download page
            # alone has them): they are pruned Mistral-NeMo too by their name, and Nemotron stands above if not.
            "Mistral-NeMo-Minitron-2B-128k-Instruct",
            "Mistral-NeMo-Minitron-4B-128k-Instruct",
            "Mistral-NeMo-Minitron-8B-128k-Instruct",
        ),
        config=lambda: _mistral(32),
        peculiar="head_dim is given, head_dim * heads may differ from the hidden size",
        folds=_PACKED,
    ),
    Family(
        name="qwen3",
        models=("Qwen3 (dense)",),
        config=_qwen3,
        peculiar="norms of q and k, head tied to the embedding",
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="gemma-3",
        models=("Gemma 3 270M, 1B (text)",),
        config=_gemma3,
        peculiar=(
            "as Gemma 2 without soft caps, with norms of q and k and two rotation tables (onnxruntime-genai 0.18 reads "
            "its configuration as genai-quant base-model writes it)"
        ),
        width=0.2,
        folds=_PACKED,
    ),
    Family(
        name="smollm",
        models=("SmolLM, SmolLM2",),
        config=lambda: _llama(None, tied=True, layers=8),
        peculiar="head tied to the embedding",
        folds=_PACKED,
        # The first eighth, the last eighth, and every third of those between.
        int8_layers=(0, 1, 4, 7),
    ),
    Family(
        name="gpt-oss",
        models=("gpt-oss (mixture of experts)",),
        config=_gpt_oss,
        peculiar="experts inside MoE nodes, attention sinks, every other layer slides, bias behind each projection",
        kinds=("qkv_proj", "o_proj"),
        folds={"qkv_proj": "norm", "o_proj": "value"},
        routers=4,
    ),
)


def save_random_model(config: transformers.PretrainedConfig, width: float, folder: Path, tokenizer: Path) -> None:
    """Return the Hugging Face folder of a random model whose predictions are neither flat nor certain.

    The embedding and head are wide enough for an entropy of some nats less than uniform: a KL divergence then means
    something. Gains are drawn around one whichever way the family stores them (Gemma and Nemotron keep gain - 1). Each
    layer's outputs have unlike sizes, so that every activation has channels that matter more and an input scale pays.
    """
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # Fresh models hold gains of one, or of zero where one is added; biases are zero.
                parameter.copy_(parameter.mean().round() + 0.3 * noise)
            else:
                # Layers add less than the embedding holds, so that all of them don't drown the logits in rounding.
                parameter.copy_((0.05 if "proj" in name else width) * noise)
            if name.endswith("proj.weight"):
                parameter.mul_(torch.exp(0.7 * torch.randn(len(parameter), 1, generator=generator)))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
