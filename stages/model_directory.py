"""Where the pieces of an ORT-GenAI model lie: the graph, genai_config.json, the tokenizer, everything beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import GraphError

GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    """A model on disk.

    ``kv_heads``, ``head_size`` and ``vocab_size`` come from genai_config.json and are None without it; the graph's own
    input shapes win where they are fixed.
    """

    folder: Path
    onnx_file: Path
    has_genai_config: bool
    kv_heads: int | None = None
    head_size: int | None = None
    vocab_size: int | None = None

    @property
    def genai_config_path(self) -> Path:
        return self.folder / GENAI_CONFIG


def read_genai_config(folder: Path) -> dict[str, Any]:
    """genai_config.json as a dictionary.

    Raises:
        GraphError: the file isn't valid JSON.
    """
    path = folder / GENAI_CONFIG
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise GraphError(f"{path} can't be read as JSON ({error}); rebuild or repair the model folder.") from error
    return content


def _onnx_in(folder: Path, filename: str | None) -> Path:
    if filename is not None and (folder / filename).is_file():
        return folder / filename
    candidates = sorted(folder.glob("*.onnx"))
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(path.name for path in candidates) or "no .onnx file"
    raise GraphError(f"{folder} holds {found}; pass the path of the model's .onnx file.")


def locate_model(path: Path) -> ModelDirectory:
    """Find the model that ``path`` means: an .onnx file, or the folder that holds one.

    Raises:
        GraphError: nothing is there, or the folder holds no unambiguous .onnx file.
    """
    path = path.absolute()
    if not path.exists():
        raise GraphError(f"{path} does not exist; pass the base model's .onnx file or its folder.")
    folder = path if path.is_dir() else path.parent
    has_config = (folder / GENAI_CONFIG).is_file()
    model = read_genai_config(folder).get("model", {}) if has_config else {}
    decoder = model.get("decoder", {})
    return ModelDirectory(
        folder=folder,
        onnx_file=path if path.is_file() else _onnx_in(folder, decoder.get("filename")),
        has_genai_config=has_config,
        kv_heads=decoder.get("num_key_value_heads"),
        head_size=decoder.get("head_size"),
        vocab_size=model.get("vocab_size"),
    )
