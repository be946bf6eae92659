"""Hold the weights of models whose own code lies in their repositories on the hub, under the names of that code.

The builder reads weights by name and runs nothing, so nothing here computes. This file is copied beside the weights,
where transformers finds it as the repository's code: it must not import anything of ours.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "tie_word_embeddings": False, **_TOKENS}
_CONTEXT, _SHORT = 256, 32
_WIDE, _HEADS, _KV_HEADS, _EXPERTS, _RANK = 96, 4, 2, 4, 16


class StandInConfig(PretrainedConfig):
    """Hold whatever it is given."""

    model_type = "stand_in"


class _StandIn(PreTrainedModel):
    config_class = StandInConfig

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what torch drew."""


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def _qkv_size(config: PretrainedConfig, kv_heads: int) -> int:
    head: int = config.hidden_size // config.num_attention_heads
    heads: int = config.num_attention_heads + 2 * kv_heads
    return head * heads


class _Part(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


# --------------------------------------------------------------------------- ChatGLM


def chatglm() -> StandInConfig:
    """Return a ChatGLM3."""
    return StandInConfig(
        **_SIZES,
        num_layers=4,
        ffn_hidden_size=_WIDE,
        # The half of each head that is rotated must hold 16 channels at least.
        num_attention_heads=2,
        multi_query_group_num=1,
        seq_length=_CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
    )


class GLMBlock(_Part):
    """One layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        width = config.hidden_size
        super().__init__(
            input_layernorm=nn.RMSNorm(width),
            self_attention=_Part(
                query_key_value=_linear(width, _qkv_size(config, config.multi_query_group_num), bias=True),
                dense=_linear(width, width),
            ),
            post_attention_layernorm=nn.RMSNorm(width),
            mlp=_Part(
                dense_h_to_4h=_linear(width, 2 * config.ffn_hidden_size),
                dense_4h_to_h=_linear(config.ffn_hidden_size, width),
            ),
        )


class ChatGLMForConditionalGeneration(_StandIn):
    """ChatGLM3."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.transformer = _Part(
            embedding=_Part(word_embeddings=nn.Embedding(config.vocab_size, config.hidden_size)),
            encoder=_Part(layers=layers, final_layernorm=nn.RMSNorm(config.hidden_size)),
            output_layer=_linear(config.hidden_size, config.vocab_size),
        )
        self.post_init()


# --------------------------------------------------------------------------- InternLM2


def internlm2() -> StandInConfig:
    """Return an InternLM2."""
    return StandInConfig(
        **_SIZES,
        intermediate_size=_WIDE,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
        hidden_act="silu",
        bias=False,
    )


class InternLM2DecoderLayer(_Part):
    """One layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        width, wide = config.hidden_size, config.intermediate_size
        super().__init__(
            attention=_Part(
                wqkv=_linear(width, _qkv_size(config, config.num_key_value_heads)), wo=_linear(width, width)
            ),
            feed_forward=_Part(w1=_linear(width, wide), w3=_linear(width, wide), w2=_linear(wide, width)),
            attention_norm=nn.RMSNorm(width),
            ffn_norm=nn.RMSNorm(width),
        )


class InternLM2ForCausalLM(_StandIn):
    """InternLM2."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = _Part(
            tok_embeddings=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList([InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)]),
            norm=nn.RMSNorm(config.hidden_size),
        )
        self.output = _linear(config.hidden_size, config.vocab_size)
        self.post_init()


# --------------------------------------------------------------------------- Phi-3 small


def _longrope(context: int) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.02 * i for i in range(8)],
        "long_factor": [1.0 + 0.9 * i for i in range(8)],
        "short_mscale": 1.1,
        "long_mscale": 1.2,
        "original_max_position_embeddings": context,
    }


def phi3_small(*, long: bool) -> StandInConfig:
    """Return a Phi-3 small."""
    rotation = {"rope_parameters": _longrope(_SHORT)} if long else {}
    return StandInConfig(
        **_SIZES,
        **rotation,
        ff_intermediate_size=_WIDE,
        intermediate_size=_WIDE,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=_CONTEXT,
        original_max_position_embeddings=_SHORT if long else _CONTEXT,
        rope_embedding_base=1_000_000.0,
        rope_position_scale=1.0,
        hidden_act="gegelu",
        gegelu_limit=20.0,
        mup_embedding_multiplier=2.0,
        mup_width_multiplier=2.0,
        mup_use_scaling=True,
        mup_attn_multiplier=1.0,
        dense_attention_every_n_layers=2,
        blocksparse_block_size=16,
        blocksparse_triton_kernel_block_size=16,
        blocksparse_num_local_blocks=4,
        blocksparse_vert_stride=4,
        blocksparse_homo_head_pattern=False,
        # Bytes that no text holds: their logits are the lowest number.
        dummy_token_indices=[188, 189],
    )


class Phi3SmallDecoderLayer(_Part):
    """One layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        width, wide = config.hidden_size, config.ff_intermediate_size
        super().__init__(
            input_layernorm=nn.LayerNorm(width),
            self_attn=_Part(
                query_key_value=_linear(width, _qkv_size(config, config.num_key_value_heads), bias=True),
                dense=_linear(width, width, bias=True),
            ),
            post_attention_layernorm=nn.LayerNorm(width),
            mlp=_Part(up_proj=_linear(width, 2 * wide, bias=True), down_proj=_linear(wide, width, bias=True)),
        )


class Phi3SmallForCausalLM(_StandIn):
    """Phi-3 small."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = _Part(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList([Phi3SmallDecoderLayer(config) for _ in range(config.num_hidden_layers)]),
            final_layernorm=nn.LayerNorm(config.hidden_size),
        )
        self.lm_head = _linear(config.hidden_size, config.vocab_size)
        self.post_init()


# --------------------------------------------------------------------------- Phi-3.5 MoE


def phi_moe() -> StandInConfig:
    """Return a Phi-3.5 MoE."""
    return StandInConfig(
        **_SIZES,
        rope_parameters=_longrope(_SHORT),
        intermediate_size=_WIDE,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=_CONTEXT,
        original_max_position_embeddings=_SHORT,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        hidden_act="silu",
        num_local_experts=_EXPERTS,
        num_experts_per_tok=2,
        sliding_window=2 * _CONTEXT,
    )


class PhiMoEDecoderLayer(_Part):
    """One layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        width, wide = config.hidden_size, config.intermediate_size
        kv_width = width // config.num_attention_heads * config.num_key_value_heads
        experts = [
            _Part(w1=_linear(width, wide), w2=_linear(wide, width), w3=_linear(width, wide))
            for _ in range(config.num_local_experts)
        ]
        super().__init__(
            input_layernorm=nn.LayerNorm(width),
            self_attn=_Part(
                q_proj=_linear(width, width, bias=True),
                k_proj=_linear(width, kv_width, bias=True),
                v_proj=_linear(width, kv_width, bias=True),
                o_proj=_linear(width, width, bias=True),
            ),
            post_attention_layernorm=nn.LayerNorm(width),
            block_sparse_moe=_Part(gate=_linear(width, config.num_local_experts), experts=nn.ModuleList(experts)),
        )


class PhiMoEForCausalLM(_StandIn):
    """Phi-3.5 MoE."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = _Part(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList([PhiMoEDecoderLayer(config) for _ in range(config.num_hidden_layers)]),
            norm=nn.LayerNorm(config.hidden_size),
        )
        self.lm_head = _linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()


# --------------------------------------------------------------------------- Phi-4 multimodal


def phi4mm() -> StandInConfig:
    """Return a Phi-4 multimodal."""
    return StandInConfig(
        **_SIZES,
        rope_parameters=_longrope(_SHORT),
        intermediate_size=_WIDE,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=_CONTEXT,
        original_max_position_embeddings=_SHORT,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        hidden_act="silu",
    )


class _LoraLinear(_Part):
    """A linear layer with a LoRA for images and one for speech."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            base_layer=_linear(inputs, outputs),
            lora_A=nn.ModuleDict({name: _linear(inputs, _RANK) for name in ("vision", "speech")}),
            lora_B=nn.ModuleDict({name: _linear(_RANK, outputs) for name in ("vision", "speech")}),
        )
        self.scaling = {"vision": 2.0, "speech": 1.0}

    @property
    def weight(self) -> nn.Parameter:
        """Return the layer's own weight."""
        return self.get_submodule("base_layer").get_parameter("weight")

    @property
    def bias(self) -> None:
        """Return nothing: the layers have no bias."""
        return


class Phi4MMDecoderLayer(_Part):
    """One layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        width, wide = config.hidden_size, config.intermediate_size
        qkv = _qkv_size(config, config.num_key_value_heads)
        super().__init__(
            input_layernorm=nn.RMSNorm(width),
            self_attn=_Part(qkv_proj=_LoraLinear(width, qkv), o_proj=_LoraLinear(width, width)),
            post_attention_layernorm=nn.RMSNorm(width),
            mlp=_Part(gate_up_proj=_LoraLinear(width, 2 * wide), down_proj=_LoraLinear(wide, width)),
        )


class Phi4MMForCausalLM(_StandIn):
    """Phi-4 multimodal."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = _Part(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList([Phi4MMDecoderLayer(config) for _ in range(config.num_hidden_layers)]),
            norm=nn.RMSNorm(config.hidden_size),
        )
        self.lm_head = _linear(config.hidden_size, config.vocab_size)
        self.post_init()
