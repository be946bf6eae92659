"""Describe one tiny model for each architecture that onnxruntime-genai's builder knows, with its real peculiarities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from scripts.architectures import stand_ins
from scripts.architectures.tokenizer import VOCABULARY

CONTEXT = 256
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, **_TOKENS}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]}
_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_VISION = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_IMAGE_TOKENS = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture of the builder and a tiny model of it."""

    name: str
    """As the builder and config.json's ``architectures`` spell it."""
    models: str
    """Released models that have it."""
    config: Callable[[], transformers.PretrainedConfig]
    peculiar: str
    """What sets it apart from a plain Llama, in words."""
    auto_class: str = "AutoModelForCausalLM"
    """The class of transformers, or of ``stand_ins``, that makes the model from its configuration."""
    width: float = 0.25
    """Standard deviation of embedding and head: by it, predictions are neither flat nor certain."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says beyond what transformers writes."""
    prefix: str = ""
    """Before the names of weights in the checkpoint."""

    @property
    def is_stand_in(self) -> bool:
        """Return whether transformers lacks the architecture, so that code of ours stands in for its repository's."""
        return hasattr(stand_ins, self.auto_class)


def llama(rope: dict[str, object] | None, *, tied: bool, layers: int = 4) -> transformers.LlamaConfig:
    """Return a Llama.

    Args:
        rope: rotation, as transformers writes it.
        tied: whether the head is the embedding.
        layers: number of layers.
    """
    return transformers.LlamaConfig(
        **(_SIZES | {"num_hidden_layers": layers}),
        **_HEADS,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )


def llama3(*, tied: bool) -> transformers.LlamaConfig:
    """Return a Llama with the rotation of Llama 3."""
    return llama(_LLAMA3_ROPE, tied=tied)


def phi3(*, long: bool = True) -> transformers.Phi3Config:
    """Return a Phi-3, by default with two rotation tables for short and long contexts."""
    longrope = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.02 * i for i in range(8)],
        "long_factor": [1.0 + 0.9 * i for i in range(8)],
    }
    return transformers.Phi3Config(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        # Shorter than the test's texts and longer than its prompts: both rotation tables are used.
        original_max_position_embeddings=32 if long else CONTEXT,
        # Wider than the context, as released: nothing slides.
        sliding_window=2 * CONTEXT,
        rope_parameters=longrope if long else _ROPE,
    )


def mistral(head_dim: int) -> transformers.MistralConfig:
    """Return a Mistral."""
    return transformers.MistralConfig(
        **_SIZES,
        **_HEADS,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
    )


def gemma() -> transformers.GemmaConfig:
    """Return a Gemma."""
    return transformers.GemmaConfig(
        **_SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=32, max_position_embeddings=CONTEXT
    )


def gemma2() -> transformers.Gemma2Config:
    """Return a Gemma 2."""
    return transformers.Gemma2Config(
        **_SIZES,
        **_HEADS,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def gemma3() -> transformers.Gemma3TextConfig:
    """Return the text part of a Gemma 3."""
    return transformers.Gemma3TextConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=CONTEXT,
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


def nemotron() -> transformers.NemotronConfig:
    """Return a Nemotron."""
    return transformers.NemotronConfig(
        **_SIZES,
        # Three query heads share a key/value head, as in Nemotron-Mini 4B.
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        # The released models say 1e-5; onnxruntime-genai 0.18 writes 1e-6 whatever they say.
        norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )


def qwen2() -> transformers.Qwen2Config:
    """Return a Qwen2."""
    return transformers.Qwen2Config(
        **_SIZES,
        **_HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        use_sliding_window=False,
        tie_word_embeddings=False,
    )


def qwen3() -> transformers.Qwen3Config:
    """Return a dense Qwen3."""
    return transformers.Qwen3Config(
        **_SIZES,
        **_HEADS,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


def gpt_oss() -> transformers.GptOssConfig:
    """Return a gpt-oss, whose experts are as wide as its residual stream."""
    return transformers.GptOssConfig(
        **_SIZES | {"intermediate_size": 64},
        **_HEADS,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
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


def lfm2() -> transformers.Lfm2Config:
    """Return an LFM2: short convolutions between attention layers."""
    return transformers.Lfm2Config(
        **_SIZES, **_HEADS, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2
    )


def lfm2_moe() -> transformers.Lfm2MoeConfig:
    """Return an LFM2-MoE: an LFM2 with experts in all layers but the first."""
    return transformers.Lfm2MoeConfig(
        **_SIZES,
        **_HEADS,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"] * 2,
    )


def qwen3_5(layer_types: tuple[str, ...] | None = None) -> transformers.Qwen3_5Config:
    """Return a Qwen3.5: gated linear attention in three of four layers, or as ``layer_types`` says."""
    types = {} if layer_types is None else {"layer_types": list(layer_types), "num_hidden_layers": len(layer_types)}
    return transformers.Qwen3_5Config(
        text_config=_SIZES | _HEADS | _linear_attention() | types,
        vision_config=_QWEN_VISION | {"num_position_embeddings": 16},
        **_IMAGE_TOKENS,
    )


def _linear_attention() -> dict[str, Any]:
    return {
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    }


def _qwen3_5_moe() -> transformers.Qwen3_5MoeConfig:
    experts = {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    sizes = {name: value for name, value in _SIZES.items() if name != "intermediate_size"}
    return transformers.Qwen3_5MoeConfig(
        text_config=sizes | _HEADS | _linear_attention() | experts,
        vision_config=_QWEN_VISION | {"num_position_embeddings": 16},
        **_IMAGE_TOKENS,
    )


def qwen2_5_vl() -> transformers.Qwen2_5_VLConfig:
    """Return a Qwen2.5-VL: positions of three axes."""
    return transformers.Qwen2_5_VLConfig(
        text_config=_SIZES | _HEADS | {"rope_parameters": _MROPE},
        vision_config=_QWEN_VISION | {"fullatt_block_indexes": [0]},
        **_IMAGE_TOKENS,
    )


def _qwen3_vl() -> transformers.Qwen3VLConfig:
    return transformers.Qwen3VLConfig(
        text_config=_SIZES | _HEADS | {"head_dim": 16, "rope_parameters": _MROPE | {"mrope_interleaved": True}},
        vision_config=_QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **_IMAGE_TOKENS,
    )


def _gemma3_vl() -> transformers.Gemma3Config:
    vision = _VISION | {"image_size": 28, "patch_size": 14}
    text = gemma3().to_dict() | {"rope_local_base_freq": 10_000.0}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=2,
        eoi_token_index=3,
        image_token_index=4,
        rope_local_base_freq=10_000.0,
    )


def _gemma4_text(*, experts: bool) -> dict[str, Any]:
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    return {
        **_SIZES,
        **_HEADS,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        **(moe if experts else {}),
    }


def _gemma4() -> transformers.Gemma4Config:
    tokens = {"image_token_id": 4, "boi_token_id": 2, "eoi_token_id": 3, "audio_token_id": 5, "boa_token_id": 6}
    return transformers.Gemma4Config(text_config=_gemma4_text(experts=True), **tokens)


def _gemma4_unified() -> transformers.Gemma4UnifiedConfig:
    tokens = {"image_token_id": 4, "boi_token_id": 2, "eoi_token_id": 3, "audio_token_id": 5, "boa_token_id": 6}
    return transformers.Gemma4UnifiedConfig(text_config=_gemma4_text(experts=False), **tokens)


def _mistral3() -> transformers.Mistral3Config:
    text = mistral(16).to_dict()
    vision = {"model_type": "pixtral", **_VISION, "head_dim": 8, "image_size": 32, "patch_size": 16}
    return transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=2, tie_word_embeddings=False
    )


def _lfm2_vl() -> transformers.Lfm2VlConfig:
    vision = {"model_type": "siglip2_vision_model", **_VISION, "num_patches": 16, "patch_size": 16}
    return transformers.Lfm2VlConfig(
        text_config=lfm2().to_dict(), vision_config=vision, image_token_id=2, projector_hidden_size=32
    )


def _granite() -> transformers.GraniteConfig:
    return transformers.GraniteConfig(
        **_SIZES,
        **_HEADS,
        rope_parameters=_ROPE,
        embedding_multiplier=2.0,
        logits_scaling=0.5,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    )


def _granite_hybrid() -> transformers.GraniteMoeHybridConfig:
    return transformers.GraniteMoeHybridConfig(
        **_SIZES,
        **_HEADS,
        rope_parameters=_ROPE,
        position_embedding_type="rope",
        # The builder writes attention only: layers of Mamba have no self_attn that it could read.
        layer_types=["attention"] * 4,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=96,
        embedding_multiplier=2.0,
        logits_scaling=0.5,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        mamba_n_heads=8,
        mamba_d_head=16,
    )


def _whisper() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=80,
        max_target_positions=64,
        decoder_start_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        begin_suppress_tokens=None,
    )


ARCHITECTURES = (
    Architecture(
        name="ChatGLMModel",
        models="ChatGLM3, GLM-4 9B (2024)",
        config=stand_ins.chatglm,
        auto_class="ChatGLMForConditionalGeneration",
        peculiar="qkv and gate_up are packed in the checkpoint, half of each head is rotated, interleaved",
    ),
    Architecture(
        name="Ernie4_5ForCausalLM",
        models="Ernie 4.5 0.3B",
        config=lambda: transformers.Ernie4_5Config(**_SIZES, **_HEADS, head_dim=16, rope_parameters=_ROPE),
        peculiar="interleaved rotation, tied head",
    ),
    Architecture(
        name="GemmaForCausalLM",
        models="Gemma 2B, 7B",
        config=gemma,
        peculiar="one key/value head, head_dim * heads over the hidden size, gains 1 + w, scaled embedding",
        width=0.11,
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        models="Gemma 2 2B, 9B, 27B",
        config=gemma2,
        peculiar="a norm behind each half of a layer too, soft-capped attention and logits, every other layer slides",
        width=0.2,
    ),
    Architecture(
        name="Gemma3ForCausalLM",
        models="Gemma 3 270M, 1B",
        config=gemma3,
        peculiar="as Gemma 2 without soft caps, with norms of q and k and two rotation tables",
        width=0.2,
    ),
    Architecture(
        name="Gemma3ForConditionalGeneration",
        models="Gemma 3 4B, 12B, 27B (text)",
        config=_gemma3_vl,
        auto_class="Gemma3ForConditionalGeneration",
        peculiar="the text part of a model that also reads images",
        width=0.2,
    ),
    Architecture(
        name="Gemma4ForConditionalGeneration",
        models="Gemma 4 26B-A4B (text)",
        config=_gemma4,
        auto_class="Gemma4ForConditionalGeneration",
        peculiar="experts beside a dense MLP, head sizes differ by layer, norms of q, k and v",
        width=0.2,
    ),
    Architecture(
        name="Gemma4UnifiedForConditionalGeneration",
        models="Gemma 4 12B (text)",
        config=_gemma4_unified,
        auto_class="Gemma4UnifiedForConditionalGeneration",
        peculiar="head sizes differ by layer, norms of q, k and v, k is v in full layers",
        width=0.2,
    ),
    Architecture(
        name="GptOssForCausalLM",
        models="gpt-oss 20B, 120B",
        config=gpt_oss,
        peculiar="experts inside MoE nodes, attention sinks, every other layer slides, bias behind each projection",
    ),
    Architecture(
        name="GraniteForCausalLM",
        models="Granite 3",
        config=_granite,
        peculiar="factors at embedding, attention, residual stream and logits",
    ),
    Architecture(
        name="GraniteMoeHybridForCausalLM",
        models="Granite 4 without Mamba layers (350M, 1B, 3B micro)",
        config=_granite_hybrid,
        peculiar="as Granite, gate_up packed in the checkpoint",
    ),
    Architecture(
        name="HunYuanDenseV1ForCausalLM",
        models="HunYuan 0.5B to 7B, HY-MT",
        config=lambda: transformers.HunYuanDenseV1Config(
            **_SIZES,
            **_HEADS,
            head_dim=16,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 1000.0, "factor": 1.0},
            tie_word_embeddings=True,
        ),
        peculiar="norms of q and k behind their rotation",
    ),
    Architecture(
        name="InternLM2ForCausalLM",
        models="InternLM2, InternLM2.5",
        config=stand_ins.internlm2,
        auto_class="InternLM2ForCausalLM",
        peculiar="q, k and v interleaved in one matrix of the checkpoint",
    ),
    Architecture(
        name="Lfm2ForCausalLM",
        models="LFM2 350M to 2.6B",
        config=lfm2,
        peculiar="short convolutions between attention layers, norms of q and k",
    ),
    Architecture(
        name="Lfm2MoeForCausalLM",
        models="LFM2 8B-A1B, 24B-A2B",
        config=lfm2_moe,
        peculiar="as LFM2, with experts in MoE nodes",
    ),
    Architecture(
        name="Lfm2VlForConditionalGeneration",
        models="LFM2-VL (text)",
        config=_lfm2_vl,
        auto_class="Lfm2VlForConditionalGeneration",
        peculiar="the text part of a model that also reads images",
    ),
    Architecture(
        name="Lfm2AudioForConditionalGeneration",
        models="LFM2-Audio (text)",
        config=lfm2,
        peculiar="the text part of a model that also hears and speaks",
        prefix="lfm.",
    ),
    Architecture(
        name="LlamaForCausalLM",
        models="Llama 2, 3, SmolLM, SmolLM2, TinyLlama",
        config=lambda: llama3(tied=False),
        peculiar="rope scaling llama3",
    ),
    Architecture(
        name="MistralForCausalLM",
        models="Mistral 7B, Mistral-NeMo, Minitron",
        config=lambda: mistral(32),
        peculiar="head_dim * heads may differ from the hidden size",
    ),
    Architecture(
        name="Mistral3ForConditionalGeneration",
        models="Mistral Small 3.1, Ministral 3 (text)",
        config=_mistral3,
        auto_class="Mistral3ForConditionalGeneration",
        peculiar="the text part of a model that also reads images",
    ),
    Architecture(
        name="NemotronForCausalLM",
        models="Nemotron Mini 4B, Minitron 4B, 8B",
        config=nemotron,
        peculiar="LayerNorm with gain 1 + w and bias, partial rotation, MLP without a gate: relu(up)^2",
        width=0.13,
    ),
    Architecture(
        name="OlmoForCausalLM",
        models="OLMo 1B, 7B",
        config=lambda: transformers.OlmoConfig(**_SIZES, **_HEADS, rope_parameters=_ROPE),
        peculiar="LayerNorm without gains",
    ),
    Architecture(
        name="PhiForCausalLM",
        models="Phi-1.5, Phi-2",
        config=lambda: transformers.PhiConfig(
            **_SIZES,
            # The half of each head that is rotated must hold 16 channels at least.
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            rope_parameters=_ROPE | {"partial_rotary_factor": 0.5},
        ),
        peculiar="attention and MLP read one LayerNorm, MLP without a gate, biases, partial rotation",
    ),
    Architecture(
        name="Phi3ForCausalLM",
        models="Phi-3 mini 4K, Phi-3 medium 4K, Phi-4",
        config=lambda: phi3(long=False),
        peculiar="qkv and gate_up are packed in the checkpoint",
    ),
    Architecture(
        name="Phi3ForCausalLM (long context)",
        models="Phi-3 mini 128K, Phi-3.5 mini, Phi-4 mini",
        config=phi3,
        peculiar="longrope: two rotation tables behind an If",
    ),
    Architecture(
        name="Phi3SmallForCausalLM",
        models="Phi-3 small 8K",
        config=lambda: stand_ins.phi3_small(long=False),
        auto_class="Phi3SmallForCausalLM",
        peculiar="block-sparse attention in every other layer, LayerNorm, gegelu",
    ),
    Architecture(
        name="Phi3SmallForCausalLM (long context)",
        models="Phi-3 small 128K",
        config=lambda: stand_ins.phi3_small(long=True),
        auto_class="Phi3SmallForCausalLM",
        peculiar="as Phi-3 small, longrope",
    ),
    Architecture(
        name="Phi3VForCausalLM",
        models="Phi-3 vision, Phi-3.5 vision (text)",
        config=phi3,
        peculiar="the text part of a model that also reads images",
    ),
    Architecture(
        name="Phi4MMForCausalLM",
        models="Phi-4 multimodal (text with its vision LoRA)",
        config=stand_ins.phi4mm,
        auto_class="Phi4MMForCausalLM",
        peculiar="a LoRA beside each projection",
    ),
    Architecture(
        name="PhiMoEForCausalLM",
        models="Phi-3.5 MoE",
        config=stand_ins.phi_moe,
        auto_class="PhiMoEForCausalLM",
        peculiar="experts that the builder quantizes itself, LayerNorm, longrope",
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        models="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
        config=qwen2,
        peculiar="bias behind q, k and v",
    ),
    Architecture(
        name="Qwen2_5_VLForConditionalGeneration",
        models="Qwen2.5-VL (text)",
        config=qwen2_5_vl,
        auto_class="Qwen2_5_VLForConditionalGeneration",
        peculiar="positions of three axes",
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        models="Qwen3 (dense)",
        config=qwen3,
        peculiar="norms of q and k, tied head",
    ),
    Architecture(
        name="Qwen3VLForConditionalGeneration",
        models="Qwen3-VL (text)",
        config=_qwen3_vl,
        auto_class="Qwen3VLForConditionalGeneration",
        peculiar="positions of three axes, norms of q and k",
    ),
    Architecture(
        name="Qwen3_5ForConditionalGeneration",
        models="Qwen3.5 (dense, text)",
        config=qwen3_5,
        auto_class="Qwen3_5ForConditionalGeneration",
        peculiar="three layers of gated linear attention before each layer of attention, positions of three axes",
    ),
    Architecture(
        name="Qwen3_5MoeForConditionalGeneration",
        models="Qwen3.5 35B-A3B and larger (text)",
        config=_qwen3_5_moe,
        auto_class="Qwen3_5MoeForConditionalGeneration",
        peculiar="as Qwen3.5, with experts in MoE nodes and one that all tokens share",
    ),
    Architecture(
        name="SmolLM3ForCausalLM",
        models="SmolLM3 3B",
        config=lambda: transformers.SmolLM3Config(
            **_SIZES, **_HEADS, no_rope_layers=[1, 1, 1, 0], rope_parameters=_ROPE, tie_word_embeddings=True
        ),
        peculiar="no rotation in every fourth layer, tied head",
    ),
    Architecture(
        name="VideoChatFlashQwenForCausalLM",
        models="VideoChat-Flash (text)",
        config=qwen2,
        peculiar="the text part of a model that also watches videos: a Qwen2",
    ),
    Architecture(
        name="WhisperForConditionalGeneration",
        models="Whisper",
        config=_whisper,
        auto_class="WhisperForConditionalGeneration",
        peculiar="encoder and decoder, in two graphs",
    ),
)
