"""Tell NvTensorRtRtx which input shapes to prepare for: the smallest, usual and largest of every graph input.

The provider builds its engine for a range of shapes (options nv_profile_min_shapes, nv_profile_opt_shapes and
nv_profile_max_shapes, each "name:1x512,other:1x8x0x64"). Sizes that the graph leaves open come from genai_config.json,
and else from the Hugging Face config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from stages.calibration.text.tokenizer import why_unreachable
from stages.errors import GraphError, UserError
from stages.model.directory import ModelDirectory
from stages.model.genai_config import GENAI_CONFIG

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


@dataclass(frozen=True, slots=True)
class _Range:
    """Smallest, usual and largest value of one dimension."""

    least: int
    usual: int
    most: int

    @classmethod
    def fixed(cls, size: int) -> _Range:
        """Return a range of one size."""
        return cls(size, size, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeProfile:
    """Ranges of all graph inputs for one run.

    Args:
        batch_size: windows in the largest batch that will be fed.
        seq_len: tokens of the longest window.
        sizes: what the model's configuration says.
        windowed_caches: the length of those key/value caches whose length never changes.
    """

    batch_size: int
    seq_len: int
    sizes: DecoderSizes
    windowed_caches: Mapping[str, int] = field(default_factory=dict)

    def provider_options(self, inputs: Sequence[ir.Value]) -> dict[str, str]:
        """Return the three provider options for the graph inputs ``inputs``.

        Raises:
            GraphError: an input isn't one of a text decoder, or has a size that neither graph nor configuration gives.
        """
        ranges = {str(value.name): self._ranges(value) for value in inputs}
        return {
            "nv_profile_min_shapes": _written(ranges, lambda size: size.least),
            "nv_profile_opt_shapes": _written(ranges, lambda size: size.usual),
            "nv_profile_max_shapes": _written(ranges, lambda size: size.most),
        }

    def _ranges(self, value: ir.Value) -> list[_Range]:
        name = str(value.name)
        declared = [] if value.shape is None else list(value.shape)
        open_sizes = self._cache(name) if "past" in name else self._tokens(name)
        if len(declared) != len(open_sizes):
            raise GraphError(
                f"Graph input '{name}' has {len(declared)} dimensions and a text decoder's has {len(open_sizes)}, so "
                "no shapes can be prepared for NvTensorRtRtx; leave it out of --calibration_eps."
            )
        return [
            _Range.fixed(dim) if isinstance(dim, int) else _known(size, name, axis)
            for axis, (dim, size) in enumerate(zip(declared, open_sizes, strict=True))
        ]

    def _tokens(self, name: str) -> list[_Range | None]:
        batch, length, past = self._batch(), self._length(), self._past()
        match name:
            case "input_ids" | "position_ids":
                return [batch, length]
            case "attention_mask":
                return [batch, _Range(length.least + past.least, length.usual + past.usual, length.most + past.most)]
        raise GraphError(
            f"Graph input '{name}' is not one that a text decoder has, so no shapes can be prepared for NvTensorRtRtx; "
            "leave it out of --calibration_eps."
        )

    def _cache(self, name: str) -> list[_Range | None]:
        heads = None if self.sizes.kv_heads is None else _Range.fixed(self.sizes.kv_heads)
        head_size = None if self.sizes.head_size is None else _Range.fixed(self.sizes.head_size)
        window = self.windowed_caches.get(name)
        return [self._batch(), heads, self._past() if window is None else _Range.fixed(window), head_size]

    def _batch(self) -> _Range:
        return _Range(1, self.batch_size, self.batch_size)

    def _length(self) -> _Range:
        return _Range(1, self.seq_len, self.seq_len)

    def _past(self) -> _Range:
        """Return past lengths: none, as calibration starts with empty caches, and up to a window within the context."""
        left = self.seq_len
        if self.sizes.context_length is not None:
            left = min(left, max(1, self.sizes.context_length - self.seq_len))
        return _Range(0, 0, left)


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


def _known(size: _Range | None, name: str, axis: int) -> _Range:
    if size is None:
        what, keys = (
            ("number of key/value heads", "num_key_value_heads")
            if axis == 1
            else ("head size", "head_size or head_dim")
        )
        raise GraphError(
            f"Graph input '{name}' leaves its {what} open, and neither {GENAI_CONFIG} nor {HF_CONFIG} gives {keys}: "
            f"NvTensorRtRtx must know it beforehand; put the model's {HF_CONFIG} into its folder or pass --model_name."
        )
    return size


def _written(ranges: Mapping[str, Sequence[_Range]], pick: Callable[[_Range], int]) -> str:
    return ",".join(f"{name}:{'x'.join(str(pick(size)) for size in sizes)}" for name, sizes in ranges.items())


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
        reason = str(error).splitlines()[0]
        raise UserError(f"--model_name {model_name} has no configuration that can be read ({reason}).") from error
    content: dict[str, Any] = config.to_dict()
    return content
