"""Tell NvTensorRtRtx which input shapes to prepare for: the smallest, usual and largest of every graph input.

The provider builds its engine for a range of shapes (options nv_profile_min_shapes, nv_profile_opt_shapes and
nv_profile_max_shapes, each "name:1x512,other:1x8x0x64"). Sizes that the graph leaves open come from genai_config.json,
and else from the Hugging Face config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.calibration.text.tokenizer import why_unreachable
from stages.errors import UserError, with_class_name
from stages.model.directory import ModelDirectory
from stages.runtime.graph_inputs import GraphInput, InputShapes, TokenShape

HF_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """What a model's configuration says about its inputs; None where it doesn't."""

    kv_heads: int | None = None
    head_size: int | None = None
    context_length: int | None = None

    def or_else(self, other: DecoderSizes) -> DecoderSizes:
        """Return these sizes, and ``other``'s where they are None."""
        return DecoderSizes(
            kv_heads=self.kv_heads or other.kv_heads,
            head_size=self.head_size or other.head_size,
            context_length=self.context_length or other.context_length,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeProfile:
    """Ranges of all graph inputs for one run.

    Args:
        batch_size: windows in the largest batch that will be fed.
        seq_len: tokens of the longest window.
        context_length: tokens that the model can hold; None: unknown.
        shapes: what else decides about them.
    """

    batch_size: int
    seq_len: int
    context_length: int | None
    shapes: InputShapes

    def provider_options(self, inputs: Sequence[GraphInput]) -> dict[str, str]:
        """Return the three provider options for the graph inputs ``inputs``.

        Raises:
            GraphError: an input isn't one of a text decoder, or has a size that neither graph nor configuration gives.
        """
        # Calibration starts with empty caches.
        fed = TokenShape(self.batch_size, self.seq_len)
        return {
            "nv_profile_min_shapes": self._written(inputs, TokenShape(1, 1)),
            "nv_profile_opt_shapes": self._written(inputs, fed),
            "nv_profile_max_shapes": self._written(inputs, replace(fed, past=self._longest_past())),
        }

    def _longest_past(self) -> int:
        """Return the length of a window within the context."""
        if self.context_length is None:
            return self.seq_len
        return min(self.seq_len, max(1, self.context_length - self.seq_len))

    def _written(self, inputs: Sequence[GraphInput], tokens: TokenShape) -> str:
        shapes = {given.name: self.shapes.shape(given, tokens) for given in inputs}
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape)


def decoder_sizes(directory: ModelDirectory, model_name: str | None, *, trust_remote_code: bool) -> DecoderSizes:
    """Return sizes by genai_config.json, and what it lacks by the config.json of ``model_name`` or the model's folder.

    Args:
        directory: the model.
        model_name: a folder or hub name; its config.json goes before the model's.
        trust_remote_code: whether Python code of the hub may run.

    Raises:
        UserError: a configuration that is needed is there and can't be read.
    """
    sizes = DecoderSizes(
        kv_heads=directory.kv_heads, head_size=directory.head_size, context_length=directory.context_length
    )
    if sizes.kv_heads and sizes.head_size and sizes.context_length:
        return sizes
    for folder in ([] if model_name is None else [Path(model_name)]) + [directory.folder]:
        if (folder / HF_CONFIG).is_file():
            return sizes.or_else(sizes_of_config(_read_json(folder / HF_CONFIG)))
    if model_name is None or Path(model_name).is_dir():
        return sizes
    return sizes.or_else(sizes_of_config(_hub_config(model_name, trust_remote_code=trust_remote_code)))


def sizes_of_config(config: Mapping[str, Any]) -> DecoderSizes:
    """Return sizes by a Hugging Face configuration; of several parts the text part counts."""
    text = config.get("text_config", config)
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    return DecoderSizes(
        kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or (hidden // heads if hidden and heads else None),
        context_length=text.get("max_position_embeddings"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}); repair or remove it.") from error
    return content


def _hub_config(model_name: str, *, trust_remote_code: bool) -> dict[str, Any]:
    from transformers import AutoConfig  # here, because it takes a second

    unreachable = why_unreachable(model_name, "model")
    if unreachable is not None:
        raise UserError(
            f"--model_name {model_name} has no configuration that can be read ({unreachable}); check the network, or "
            f"put the model's {HF_CONFIG} into its folder."
        )
    try:
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and its hub client raise classes without a common base
        raise UserError(
            f"--model_name {model_name} has no configuration that can be read ({with_class_name(error)}); put the "
            f"model's {HF_CONFIG} into its folder, or leave NvTensorRtRtx out of --calibration_eps."
        ) from error
    content: dict[str, Any] = config.to_dict()
    return content
