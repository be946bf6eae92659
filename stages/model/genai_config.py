"""Read genai_config.json, which makes a folder one that onnxruntime-genai runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from stages.errors import GraphError, in_one_line

LOGITS = "logits"
"""The output that onnxruntime-genai reads."""
TOKEN_INPUTS = frozenset({"input_ids", "decoder_input_ids", "tokens"})
"""What exporters call the input that holds token ids."""
EMBEDDED = frozenset({"inputs_embeds", "per_layer_inputs"})
"""Inputs of a decoder that an embedding model makes of the tokens."""
GENAI_CONFIG = "genai_config.json"


class GenaiDecoder(BaseModel):
    """The decoder's entry."""

    model_config = ConfigDict(strict=True)
    filename: str | None = None
    num_key_value_heads: PositiveInt | None = None
    head_size: PositiveInt | None = None
    session_options: dict[str, Any] = Field(default_factory=dict)
    sliding_window: Any = None

    @property
    def window_size(self) -> int:
        """Return how many tokens the layers see that don't see the whole context; 0 where all do."""
        size = self.sliding_window.get("window_size") if isinstance(self.sliding_window, dict) else None
        return max(size, 0) if isinstance(size, int) else 0

    @property
    def provider(self) -> str | None:
        """Return the execution provider that the session options name first; None where they name none."""
        options = self.session_options.get("provider_options")
        first = options[0] if isinstance(options, list) and options else None
        return next(map(str, first), None) if isinstance(first, dict) else None


class GenaiModel(BaseModel):
    """The model's entry."""

    model_config = ConfigDict(strict=True)
    decoder: GenaiDecoder = Field(default_factory=GenaiDecoder)
    vocab_size: PositiveInt | None = None
    context_length: PositiveInt | None = None


class _GenaiConfig(BaseModel):
    """The entries of genai_config.json that are read; others are passed over."""

    model_config = ConfigDict(strict=True)
    model: GenaiModel = Field(default_factory=GenaiModel)


def read_genai_config(folder: Path) -> dict[str, Any]:
    """Return genai_config.json of ``folder`` as a dictionary.

    Raises:
        GraphError: the file isn't valid JSON, or has something else where sizes and names are expected.
    """
    path = folder / GENAI_CONFIG
    content = _json(path)
    _parsed(path, content)
    assert isinstance(content, dict), "it was checked"
    return content


def read_genai_model(folder: Path) -> GenaiModel:
    """Return what genai_config.json of ``folder`` says of the model.

    Raises:
        GraphError: see ``read_genai_config``.
    """
    path = folder / GENAI_CONFIG
    return _parsed(path, _json(path))


def component_files(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the .onnx files of a package by the names of its components: decoder, embedding, vision, speech, ...

    Args:
        content: what ``read_genai_config`` returned.
    """
    return {name: entry[key] for name, (entry, key) in component_entries(content).items()}


def component_entries(content: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return each component's entry, and its key that names the .onnx file; stages of a pipeline are components too.

    Args:
        content: what ``read_genai_config`` returned.
    """
    return dict(_component_entries(content.get("model", {})))


def _component_entries(model: Mapping[str, Any]) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    for name, entry in model.items():
        if not isinstance(entry, dict):
            continue
        for key, value in entry.items():
            if key == "filename" and isinstance(value, str):
                yield name, (entry, key)
            elif key.endswith("_filename") and isinstance(value, str) and value.endswith(".onnx"):
                yield f"{name}_{key.removesuffix('_filename')}", (entry, key)
        stages = entry.get("pipeline", [])
        for stage in stages if isinstance(stages, list) else [stages]:
            yield from _component_entries(stage if isinstance(stage, dict) else {})


def end_tokens_of(content: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens at which generation ends.

    Args:
        content: what ``read_genai_config`` returned.
    """
    tokens = content.get("model", {}).get("eos_token_id", [])
    return frozenset(tokens if isinstance(tokens, list) else [tokens])


def texts_in(content: object) -> Iterator[str]:
    """Yield every text that stands as a value in a JSON document, at any depth: names of files among them."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from texts_in(each)


def is_inside(filename: str) -> bool:
    """Return whether a relative path stays in the folder that it starts from."""
    path = Path(filename)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in filename


def _json(path: Path) -> object:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = in_one_line(error)
        raise GraphError(f"{path} can't be read as JSON ({reason}); rebuild or repair the model folder.") from error
    return content


def _parsed(path: Path, content: object) -> GenaiModel:
    try:
        model = _GenaiConfig.model_validate(content).model
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "the whole"
        raise GraphError(f"{path} has {place} wrong ({fault['msg']}); rebuild or repair the model folder.") from error
    assert isinstance(content, dict), "it was checked"
    for filename in component_files(content).values():
        if not is_inside(filename):
            raise GraphError(f"{path} has the filename '{filename}', which isn't in its folder; put the graph there.")
    return model
