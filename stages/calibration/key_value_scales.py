"""Scales of a quantized key/value cache: the largest keys and values of the calibration text, by channel.

onnxruntime-genai's builder takes them as JSON (``kv_cache_scale_file``): for each layer the scale of each channel of
each key/value head, or one, where scale = largest / qmax. It turns them to the width that it writes by qmax, so one
file serves int8, int4 and fp8.

Keys are cached after their rotation. Channels that turn slowly hardly turn within a calibration window, and at later
positions hold what their partner holds now. So a key's channel counts as sqrt(x1^2 + x2^2) of the pair that is turned
together, which no position exceeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from stages.commands.calibrate_options import KeyValueScales
from stages.errors import GraphError
from stages.model.patterns import input_of
from stages.system.json_file import explained, write_whole

SCALES = "kv_scales.json"
_QMAX = 128.0
"""The builder's divisor for int8."""
_SMALLEST = 1e-6
"""Largest value of a channel that is never used, as the builder's own calibration has it."""
_LAYER = re.compile(r"\.(\d+)\.")
_COSINES = 7
"""Input of GroupQueryAttention."""
_KEYS = 1
_SHAPED = frozenset({"Reshape", "Cast", "Identity", "Transpose"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Which channels of a head are turned together: the first half with the second, or each with its neighbour."""

    size: int | None
    """Channels that are turned; None: all of a head."""
    interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValueCache:
    """What an attention node hands to its next run."""

    layer: int
    keys: str
    """Value [batch, heads, tokens, size], keys after their rotation."""
    values: str
    rotation: Rotation | None
    """None: positions don't change keys."""


def find_key_value_caches(model: ir.Model) -> tuple[KeyValueCache, ...]:
    """Return the caches of a model, by layer.

    Raises:
        GraphError: it has none, or another attention than the one whose cache the builder quantizes.
    """
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    found = [cache for node in nodes if (cache := _as_cache(node)) is not None]
    if not found or len(found) < len(nodes):
        raise GraphError(
            "--kv_scales: onnxruntime-genai quantizes the cache of GroupQueryAttention nodes, of which the model has "
            f"{len(nodes)}, {len(found)} with outputs called present.N.key and present.N.value; leave the option out."
        )
    return tuple(sorted(found, key=lambda cache: cache.layer))


def _as_cache(node: ir.Node) -> KeyValueCache | None:
    keys, values = (str(value.name) for value in node.outputs[1:3]) if len(node.outputs) > 2 else ("", "")
    layer = _LAYER.search(keys)
    if layer is None:
        return None
    return KeyValueCache(layer=int(layer[1]), keys=keys, values=values, rotation=_rotation(node))


def _rotation(node: ir.Node) -> Rotation | None:
    if node.attributes.get_int("do_rotary", 0) == 1:
        cosines = input_of(node, _COSINES)
        width = None if cosines is None or cosines.shape is None else cosines.shape[-1]
        return Rotation(
            size=2 * width if isinstance(width, int) else None,
            interleaved=node.attributes.get_int("rotary_interleaved", 0) == 1,
        )
    turned = _before_shaping(node.inputs[_KEYS])
    if turned is None or turned.op_type != "RotaryEmbedding":
        return None
    size = turned.attributes.get_int("rotary_embedding_dim", 0)
    return Rotation(size=size or None, interleaved=turned.attributes.get_int("interleaved", 0) == 1)


def _before_shaping(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _SHAPED:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node


def envelope(keys: Float[Tensor, "*tokens size"], rotation: Rotation) -> Float32[Tensor, "*tokens size"]:
    """Return for each channel of a head the most that it can hold at any position: the length of its pair."""
    found, size = keys.float().abs(), rotation.size or keys.shape[-1]
    turned = found[..., :size]
    if rotation.interleaved:
        lengths = torch.hypot(turned[..., 0::2], turned[..., 1::2]).repeat_interleave(2, dim=-1)
    else:
        half = torch.hypot(turned[..., : size // 2], turned[..., size // 2 :])
        lengths = torch.cat([half, half], dim=-1)
    return torch.cat([lengths, found[..., size:]], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValueMaxima:
    """The largest numbers that the caches of a model held so far."""

    caches: tuple[KeyValueCache, ...]
    found: dict[str, Tensor] = field(default_factory=dict)
    """[heads * size] float32, by the name of the value."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all values that are looked at."""
        return tuple(name for cache in self.caches for name in (cache.keys, cache.values))

    def largest(self, name: str, value: Float[Tensor, "batch heads tokens size"]) -> Float32[Tensor, " channels"]:
        """Return the largest of one batch, on the CPU.

        Args:
            name: which value it is.
            value: in the graph's type.
        """
        rotation = next((cache.rotation for cache in self.caches if cache.keys == name), None)
        numbers = value.float().abs() if rotation is None else envelope(value, rotation)
        return numbers.amax(dim=(0, 2)).reshape(-1).cpu()

    def add(self, name: str, largest: Float32[Tensor, " channels"]) -> None:
        """Take what ``largest`` returned into account."""
        self.found[name] = torch.maximum(self.found.get(name, largest), largest)


def scales_text(caches: Sequence[KeyValueCache], maxima: dict[str, Tensor], granularity: KeyValueScales) -> str:
    """Return the builder's JSON.

    Args:
        caches: of the model, by layer.
        maxima: [heads * size] by the name of the value.
        granularity: a scale for each channel of each head, or one for each layer.

    Raises:
        GraphError: the model computes numbers that are not finite.
    """

    def scales(name: str) -> list[float]:
        largest = maxima[name]
        if not bool(largest.isfinite().all()):
            raise GraphError(f"--kv_scales: '{name}' holds NaN or infinite values; build the base model again.")
        kept = largest if granularity == "per_channel" else largest.max().reshape(1)
        return [float(each) for each in kept.clamp_min(_SMALLEST) / _QMAX]

    content = {
        "scales": {
            "k_scales": [scales(cache.keys) for cache in caches],
            "v_scales": [scales(cache.values) for cache in caches],
        },
        "qmax": _QMAX,
        "layer_ids": [cache.layer for cache in caches],
    }
    return json.dumps(content, allow_nan=False)


def write_scales(folder: Path, text: str) -> Path:
    """Write the JSON into the cache's folder; return its path.

    Raises:
        UserError: it can't be written.
    """
    path = folder / SCALES
    with explained(f"{path} can't be written", "free space there, or choose another --cache_dir"):
        write_whole(path, text.encode())
    return path
