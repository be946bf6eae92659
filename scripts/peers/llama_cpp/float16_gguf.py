"""Write a checkpoint as a float16 GGUF file, which llama.cpp's own quantizer starts from.

Metadata and tokenizer are those of the GGUF file that the checkpoint was made from; what transformers changed in the
weights when it read that file is undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, get_tensor_name_map
from safetensors import safe_open

from stages.system.atomic import atomic_file

_SUFFIXES = (".weight", ".bias")
_OWN_KEYS = frozenset({"general.architecture", "general.file_type", "general.quantization_version"})
_SHIFTED_NORMS = ("gemma2", "gemma3")
"""Architectures whose norms multiply with 1 + gain: GGUF holds the sum."""


def write_float16_gguf(source: Path, checkpoint: Path, file: Path) -> None:
    """Write the weights of ``checkpoint``, matrices as float16.

    Args:
        source: the GGUF file with the metadata.
        checkpoint: folder of safetensors.
        file: what is written.
    """
    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(None, architecture)
    _copy_metadata(reader, writer)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for name, array in _tensors(reader, architecture, checkpoint):
        writer.add_tensor(name, array)
    with atomic_file(file) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if key not in _OWN_KEYS and not key.startswith("GGUF."):
            kind, *inner = field.types
            is_array = kind is GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), kind, sub_type=inner[-1] if is_array else None)


def _tensors(reader: GGUFReader, architecture: str, checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, _number(reader, f"{architecture}.block_count"))
    # Factors of the rotation, which a checkpoint has in its configuration.
    yield from ((tensor.name, tensor.data) for tensor in reader.tensors if tensor.name.startswith("rope_"))
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "np") as shard:
            for name in sorted(shard.keys()):
                written = names.get_name(name, try_suffixes=_SUFFIXES)
                assert written is not None, f"GGUF of the architecture {architecture} has no place for {name}"
                yield written, _as_stored(shard.get_tensor(name), name, reader, architecture)


def _as_stored(array: np.ndarray, name: str, reader: GGUFReader, architecture: str) -> np.ndarray:
    """Return a tensor as GGUF holds it: rotated halves interleaved for Llama, gains with their 1, matrices float16."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        key = "head_count" if "q_proj" in name else "head_count_kv"
        heads = _number(reader, f"llama.attention.{key}")
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if architecture in _SHIFTED_NORMS and name.endswith("norm.weight"):
        array = array + 1
    return np.ascontiguousarray(array, np.float32 if array.ndim == 1 else np.float16)


def _number(reader: GGUFReader, key: str) -> int:
    value: Any = reader.fields[key].contents()
    return int(value)
