"""The shapes that the GPU check runs, and their base models with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from scripts.architectures.tokenizer import train_tokenizer
from scripts.benchmarks.synthetic_llama import LlamaShape
from scripts.make_large_model import SHAPES, write_model
from scripts.options import LargePrecision

_HEAD_PARTS = 8
_TEXT = "the quick brown fox jumps over the lazy dog"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is run, and of what whole model it is a part."""

    layers_of: LlamaShape
    """A few layers of the larger model, with a part of its lm_head."""
    layers: int
    """Of the larger model."""
    head_parts: int
    """Its lm_head is so many times wider."""
    few_windows: int
    windows: int
    """Of the calibration whose time is compared with the aim; the few tell what it takes to begin."""
    whole: LlamaShape
    """A model that is run from its first layer to its last."""
    whole_windows: int
    seq_len: int
    prompt: int
    new_tokens: int
    rounds: int
    statistics_aim: float | None = None
    """Seconds for the larger model's statistics and, below, for its search by awq_gptq; None: nothing is aimed at."""
    search_aim: float | None = None


TINY_SHAPE = LlamaShape(
    layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocabulary=512, context=512
)
"""Of models whose formats are looked at, and of all models where there is no GPU."""
_LARGE = SHAPES["llama-3-8b"]
FULL = Sizes(
    layers_of=replace(_LARGE, layers=2, vocabulary=_LARGE.vocabulary // _HEAD_PARTS),
    layers=_LARGE.layers,
    head_parts=_HEAD_PARTS,
    few_windows=8,
    windows=128,
    whole=SHAPES["qwen2.5-1.5b"],
    whole_windows=16,
    seq_len=512,
    prompt=128,
    new_tokens=64,
    rounds=3,
    statistics_aim=30.0,
    search_aim=90.0,
)
TINY = Sizes(
    layers_of=TINY_SHAPE,
    layers=4,
    head_parts=2,
    few_windows=3,
    windows=6,
    whole=TINY_SHAPE,
    whole_windows=4,
    seq_len=32,
    prompt=8,
    new_tokens=4,
    rounds=1,
)


def make_base(shape: LlamaShape, folder: Path, precision: LargePrecision, provider: str | None = None) -> Path:
    """Write a base model with a tokenizer into a new folder, and return the folder.

    Args:
        shape: sizes.
        folder: where it goes.
        precision: type of weights and activations.
        provider: what onnxruntime-genai shall run it on; None: the CPU.
    """
    folder.mkdir(parents=True)
    write_model(shape, folder, precision, provider=provider)
    train_tokenizer(_TEXT).save_pretrained(folder)
    return folder
