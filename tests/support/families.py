"""One tiny random model for each architecture that the support matrix names, with that family's real peculiarities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers

from scripts.architectures import configs
from scripts.architectures.random_models import draw_weights


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


_PACKED = {"qkv_proj": "norm", "o_proj": "value", "gate_proj": "norm", "down_proj": "linear"}

FAMILIES = (
    Family(
        name="llama-3.1",
        models=("Llama3.1-8B-Instruct", "DeepSeek-R1-Distill-Llama-8B"),
        config=lambda: configs.llama3(tied=False),
        peculiar="rope scaling llama3",
        folds=_PACKED,
    ),
    Family(
        name="llama-3.2",
        models=("Llama3.2-3B-Instruct (and 1B)",),
        config=lambda: configs.llama3(tied=True),
        peculiar="rope scaling llama3, head tied to the embedding",
        width=0.22,
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="phi-3.5",
        models=("Phi3.5-mini-Instruct",),
        config=configs.phi3,
        peculiar="longrope: two rotation tables behind an If; qkv and gate_up are packed in the checkpoint",
        folds=_PACKED,
    ),
    Family(
        name="mistral",
        models=("Mistral-7B-Instruct-v0.3",),
        config=lambda: configs.mistral(16),
        peculiar="grouped-query attention",
        folds=_PACKED,
    ),
    Family(
        name="gemma",
        models=("Gemma-2b-it",),
        config=configs.gemma,
        peculiar="one key/value head, head_dim * heads over the hidden size, gelu, gains 1 + w, scaled embedding",
        width=0.11,
        folds=_PACKED,
    ),
    Family(
        name="gemma-2",
        models=("Gemma-2-2b", "Gemma-2-9b"),
        config=configs.gemma2,
        peculiar="a norm behind each half of a layer too, soft-capped attention and logits, every other layer slides",
        width=0.2,
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="nemotron",
        models=("Nemotron Mini 4B Instruct (and Minitron 4B, 8B)",),
        config=configs.nemotron,
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
        config=configs.qwen2,
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
        config=lambda: configs.mistral(32),
        peculiar="head_dim is given, head_dim * heads may differ from the hidden size",
        folds=_PACKED,
    ),
    Family(
        name="qwen3",
        models=("Qwen3 (dense)",),
        config=configs.qwen3,
        peculiar="norms of q and k, head tied to the embedding",
        folds=_PACKED,
        int8_head=True,
    ),
    Family(
        name="gemma-3",
        models=("Gemma 3 270M, 1B (text)",),
        config=configs.gemma3,
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
        config=lambda: configs.llama(None, tied=True, layers=8),
        peculiar="head tied to the embedding",
        folds=_PACKED,
        # The first eighth, the last eighth, and every third of those between.
        int8_layers=(0, 1, 4, 7),
    ),
    Family(
        name="gpt-oss",
        models=("gpt-oss (mixture of experts)",),
        config=configs.gpt_oss,
        peculiar="experts inside MoE nodes, attention sinks, every other layer slides, bias behind each projection",
        kinds=("qkv_proj", "o_proj"),
        folds={"qkv_proj": "norm", "o_proj": "value"},
        routers=4,
    ),
)


def save_random_model(config: transformers.PretrainedConfig, width: float, folder: Path, tokenizer: Path) -> None:
    """Save the model that transformers makes of ``config``, with random weights and a tokenizer, as a folder.

    Args:
        config: its configuration.
        width: standard deviation of embedding and head.
        folder: where it goes.
        tokenizer: folder of the tokenizer.
    """
    model = transformers.AutoModelForCausalLM.from_config(config)
    draw_weights(model, width)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
