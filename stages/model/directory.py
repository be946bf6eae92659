"""Find the files of an ORT-GenAI model: the graph, genai_config.json and the folder with everything else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from stages.errors import GraphError
from stages.model.genai_config import GENAI_CONFIG, LOGITS, GenaiModel, GenaiPart, read_genai_model
from stages.system.paths import reachable

_PAST_INPUTS = slice(3, 5)
_EMBEDDING = re.compile(r"embed(?:_tokens|dings?)?(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    """A model on disk.

    ``kv_heads``, ``head_size``, ``vocab_size``, ``context_length`` and ``provider``, the execution provider that it
    runs on, come from genai_config.json and are None without it; the graph's own input shapes win where they are fixed.
    ``windowed_caches`` gives the length of those key/value cache inputs that slide: their attention drops old tokens
    itself, in a buffer that holds a whole window from the start. ``input_names`` and ``output_names`` are the graph's
    own by those that onnxruntime-genai has for them. ``embedding`` makes what the graph takes in place of tokens.
    """

    folder: Path
    onnx_file: Path
    has_genai_config: bool
    kv_heads: int | None = None
    head_size: int | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    provider: str | None = None
    windowed_caches: dict[str, int] = field(default_factory=dict)
    input_names: dict[str, str] = field(default_factory=dict)
    output_names: dict[str, str] = field(default_factory=dict)
    embedding: ModelDirectory | None = None

    @property
    def genai_config_path(self) -> Path:
        """Return where genai_config.json lies, or would."""
        return self.folder / GENAI_CONFIG


def _onnx_in(folder: Path, filename: str | None) -> Path:
    if filename is not None and (folder / filename).is_file():
        return folder / filename
    candidates = sorted(folder.glob("*.onnx"))
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(path.name for path in candidates) or "no .onnx file"
    raise GraphError(f"{folder} holds {found}; pass the path of the model's .onnx file.")


def logits_among(outputs: Iterable[str], onnx_file: Path) -> str:
    """Return the output that holds the logits: ``logits``, else the only one whose name begins so.

    Olive's quantizers rename it to logits_Q4 or logits_Q8.

    Raises:
        GraphError: there is none.
    """
    found = [name for name in outputs if name.startswith(LOGITS)]
    if LOGITS not in found and len(found) != 1:
        raise GraphError(f"{onnx_file} has no output '{LOGITS}'; pass a text decoder.")
    return LOGITS if LOGITS in found else found[0]


def locate_model(path: Path) -> ModelDirectory:
    """Find the model that ``path`` means: an .onnx file, or the folder that holds one.

    Raises:
        GraphError: nothing is there, the folder holds no unambiguous .onnx file, or its genai_config.json is damaged.
    """
    path = reachable(path.absolute())
    try:
        path.stat()
    except FileNotFoundError as error:
        raise GraphError(f"{path} does not exist; pass a model's .onnx file or its folder.") from error
    except OSError as error:
        raise GraphError(f"{path} can't be read ({error.strerror}); pass another path to the model.") from error
    folder = path if path.is_dir() else path.parent
    has_config = (folder / GENAI_CONFIG).is_file()
    model = read_genai_model(folder) if has_config else GenaiModel()
    decoder = model.decoder
    onnx_file = path if path.is_file() else _onnx_in(folder, decoder.filename)
    return ModelDirectory(
        folder=folder,
        onnx_file=onnx_file,
        has_genai_config=has_config,
        kv_heads=decoder.num_key_value_heads,
        head_size=decoder.head_size,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        provider=decoder.provider,
        windowed_caches=_windowed_caches(onnx_file) if "sliding_window" in decoder.model_fields_set else {},
        input_names=_names(decoder.inputs),
        output_names=_names(decoder.outputs),
        embedding=_embedding(folder, onnx_file, model.embedding),
    )


def _names(entry: Mapping[str, Any]) -> dict[str, str]:
    return {key: name for key, name in entry.items() if isinstance(name, str) and name}


def _embedding(folder: Path, onnx_file: Path, entry: GenaiPart) -> ModelDirectory | None:
    """Return the embedding model that genai_config.json names, else the one beside the graph that is named like one."""
    file = _embedding_beside(onnx_file) if entry.filename is None else folder / entry.filename
    if file is None or file == onnx_file:
        return None
    return ModelDirectory(
        folder=file.parent,
        onnx_file=file,
        has_genai_config=False,
        input_names=_names(entry.inputs),
        output_names=_names(entry.outputs),
    )


def _embedding_beside(onnx_file: Path) -> Path | None:
    """Return embed_tokens_fp16.onnx for decoder_model_merged_fp16.onnx: the one with most of the name's end."""
    found = {file: _EMBEDDING.fullmatch(file.stem) for file in sorted(onnx_file.parent.glob("embed*.onnx"))}
    fitting = {file: match[1] for file, match in found.items() if match and onnx_file.stem.endswith(match[1])}
    return max(fitting, key=lambda file: len(fitting[file]), default=None)


def _windowed_caches(onnx_file: Path) -> dict[str, int]:
    """Return the window's length for each cache input of attention that drops old tokens itself."""
    return {
        name: node.attributes.get_int("local_window_size", 0)
        for name, node in _read_caches(onnx_file)
        if node.attributes.get_int("sliding_window_cache", 0) == 1
    }


def shared_caches(onnx_file: Path) -> frozenset[str]:
    """Return the cache inputs that GroupQueryAttention reads: it is told how much of a buffer is valid."""
    return frozenset(name for name, _ in _read_caches(onnx_file))


def _read_caches(onnx_file: Path) -> Iterator[tuple[str, ir.Node]]:
    try:
        nodes = tuple(ir.load(onnx_file).graph)
    except Exception:  # load_graph says what is wrong with the file
        return
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            yield from ((str(past.name), node) for past in node.inputs[_PAST_INPUTS] if past is not None)
