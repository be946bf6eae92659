"""ONNX Runtime sessions: execution providers that really load, and inputs built from what the graph declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from stages.errors import GraphError, UserError

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Session key: 1 computes MatMulNBits in float32; the runtime's default 4 rounds activations to int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderChoice:
    """Providers to ask for, in order, and (short name, why) of those that were wished for but can't load."""

    names: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


def choose_providers(wanted: str, option: str = "--calibration_eps") -> ProviderChoice:
    """Parse a list such as ``cuda,cpu`` and keep what loads on this machine; the CPU is always last.

    Raises:
        UserError: a name isn't one of cpu, cuda, dml, NvTensorRtRtx.
    """
    names: list[str] = []
    missing: list[tuple[str, str]] = []
    available = ort.get_available_providers()
    for raw in wanted.strip("[]").replace(" ", ",").split(","):
        short = raw.strip().lower()
        if not short:
            continue
        if short not in _PROVIDERS:
            raise UserError(f"{option}: '{raw}' is not one of cuda, cpu, dml, NvTensorRtRtx.")
        provider = _PROVIDERS[short]
        if provider not in available:
            missing.append((raw, "this onnxruntime package was built without it"))
        elif short == "cuda" and not torch.cuda.is_available():
            missing.append((raw, "no CUDA device, or torch was installed without CUDA"))
        else:
            names.append(provider)
    if _PROVIDERS["cpu"] not in names:
        names.append(_PROVIDERS["cpu"])
    if _PROVIDERS["cuda"] in names:
        ort.preload_dlls()
    return ProviderChoice(names=tuple(names), missing=tuple(missing))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """Everything about a session that callers here vary.

    ``external_data_folder`` lets a graph given as bytes read its weights where they lie. ``map_weights`` keeps weights
    as mapped file pages instead of repacked copies. ``profile_prefix`` writes a profile whose kernel events name the
    nodes of the optimized graph.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    external_data_folder: Path | None = None
    map_weights: bool = False
    accuracy_level: int | None = None
    profile_prefix: Path | None = None


def open_session(model: Path | bytes, settings: SessionSettings) -> ort.InferenceSession:
    """Open a model file, or a serialized graph, with ``settings``.

    Raises:
        GraphError: ONNX Runtime refuses the model; its reason is repeated.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if settings.external_data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(settings.external_data_folder)
        )
    if settings.map_weights:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if settings.accuracy_level is not None:
        options.add_session_config_entry(ACCURACY_LEVEL, str(settings.accuracy_level))
    if settings.profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile_prefix)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=list(settings.providers))
    except Exception as error:  # onnxruntime raises classes without a common base
        where = "the tapped graph" if isinstance(model, bytes) else str(model)
        raise GraphError(f"ONNX Runtime can't open {where}: {str(error).splitlines()[0]}") from error


def _past_shape(node: ort.NodeArg, empty: tuple[int, int | None, int, int | None]) -> tuple[int, ...]:
    """Shape of an empty past: ``empty``, [batch, kv_heads, length, head_size]; fixed dimensions of the graph win."""
    declared = list(node.shape)
    if len(declared) == 3 and all(isinstance(dim, int) for dim in declared[1:]):
        # The state of a short convolution: always of this size, and zero before the first token.
        return empty[0], *declared[1:]
    if len(declared) != 4:
        raise GraphError(f"Graph input '{node.name}' has shape {declared}, which is not a key/value cache.")
    shape = [dim if isinstance(dim, int) else other for dim, other in zip(declared, empty, strict=True)]
    if any(dim is None for dim in shape):
        raise GraphError(
            f"Graph input '{node.name}' leaves its head count or size open and genai_config.json doesn't give "
            "num_key_value_heads and head_size; put that file beside the model."
        )
    return tuple(int(dim) for dim in shape if dim is not None)


@dataclass(frozen=True, slots=True)
class CausalFeeds:
    """Builds the inputs of a decoder graph for full windows of tokens and an empty past, by the graph's own names.

    Position ids are 0, 1, 2, ...; the attention mask is all ones: windows hold no padding. An empty past has length 0,
    or the length that ``windowed_caches`` gives for its input: then a buffer of zeros, of which nothing is valid yet.
    """

    session: ort.InferenceSession
    kv_heads: int | None
    head_size: int | None
    windowed_caches: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Feeds for ``tokens`` [batch, length] (any integer type).

        Raises:
            GraphError: an input of the graph is none of input_ids, attention_mask, position_ids, past key/values.
        """
        return {node.name: self._feed(node, tokens) for node in self.session.get_inputs()}

    def _feed(self, node: ort.NodeArg, tokens: np.ndarray) -> np.ndarray:
        batch, length = tokens.shape
        dtype = _NUMPY_TYPES.get(node.type)
        if dtype is None:
            raise GraphError(f"Graph input '{node.name}' has type {node.type}, which calibration can't feed.")
        if node.name == "input_ids":
            return tokens.astype(dtype)
        if node.name == "attention_mask":
            return np.ones((batch, length), dtype)
        if node.name == "position_ids":
            return np.broadcast_to(np.arange(length, dtype=dtype), (batch, length)).copy()
        if "past" in node.name:
            empty = (batch, self.kv_heads, self.windowed_caches.get(node.name, 0), self.head_size)
            return np.zeros(_past_shape(node, empty), dtype)
        raise GraphError(
            f"Graph input '{node.name}' is not one that a text decoder has "
            "(input_ids, attention_mask, position_ids, past key/values); pass the decoder's .onnx file."
        )
