"""List the files of a base model that its output needs besides the graph that is written anew.

People bring clones with their history, checkpoints and graphs in other precisions beside the one that is meant: none of
that is copied. What genai_config.json names is needed, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from stages.errors import GraphError, in_one_line
from stages.model.directory import ModelDirectory, other_parts
from stages.model.genai_config import is_inside, read_genai_config, texts_in
from stages.model.load import external_files, external_tensors

_GRAPH = ".onnx"
_OTHER_PRODUCTS = frozenset({"recipe.json", "manifest.json"})
"""Files that mark a folder as quantized weights or a calibration cache."""
_WEIGHTS = re.compile(
    r"\.(safetensors|pt|pth|ckpt|gguf|ggml|h5|keras|msgpack|ot|tflite|nemo|npz|ort|pte|mlmodel|lock|incomplete)$|"
    r"[._]data(-?_?\d.*)?$|_model[^/]*\.(bin|xml)$|^(training_args|optimizer|scheduler)\.bin$|\.index\.json$",
    re.IGNORECASE,
)
"""Names of weights in the files of any framework, and of what belongs to them."""
_LARGEST_PARSED = 1 << 26
"""Bytes of a graph of another precision that is parsed for the names of its weights' files."""
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFiles:
    """What an output needs besides its own graph, each by its path in the base's folder."""

    copied: tuple[Path, ...]
    rewritten: tuple[Path, ...]
    """Graphs of other components that share files of weights with the graph that is replaced."""
    missing: tuple[Path, ...]
    """What genai_config.json or a component names, and the base doesn't have."""


def package_files(base: ModelDirectory, graph: ir.Model, data_file: str) -> PackageFiles:
    """Return which files an output made from ``base`` needs besides its own graph.

    Subfolders count, except those that hold a model, a cache or weights of their own: outputs may lie inside the base's
    folder. Hidden files and folders don't.

    Args:
        base: the base model.
        graph: its graph as ``load_graph`` returns it.
        data_file: what the output calls its own file of weights.

    Raises:
        GraphError: another component can't be read.
    """
    parts = component_graphs(base)
    data = {part: frozenset(_data_of(part)) for part in parts}
    replaced = {*external_files(graph), (base.folder / data_file).resolve()}
    shared = {part for part in parts if any(file.resolve() in replaced for file in data[part])}
    wanted = {file for part in parts if part not in shared for file in (part, *data[part])}
    needed = {file for file in wanted if file.is_file()} | {*_named(base)}
    own_folders = {parent for file in (base.onnx_file, *needed, *shared) for parent in file.parents}
    files = list(_files_below(base.folder, own_folders))
    others = [file for file in files if file.suffix == _GRAPH and file not in {*needed, base.onnx_file}]
    left_out = {base.onnx_file.resolve(), *replaced, *_data_of_others(others)}
    plain = (file for file in files if file not in others and file.resolve() not in left_out)
    copied = needed | {file for file in plain if not _WEIGHTS.search(file.name)}
    missing = {*(part for part in other_parts(base) if part not in parts), *(wanted - needed)}
    return PackageFiles(copied=_inside(base, copied), rewritten=_inside(base, shared), missing=_inside(base, missing))


def _inside(base: ModelDirectory, files: Collection[Path]) -> tuple[Path, ...]:
    return tuple(sorted(file.relative_to(base.folder) for file in files))


def component_graphs(base: ModelDirectory) -> tuple[Path, ...]:
    """Return the graphs of the other components of ``base``'s package that are there.

    Raises:
        GraphError: one can't be read.
    """
    parts = tuple(part for part in other_parts(base) if part.is_file())
    for part in parts:
        _data_of(part)
    return parts


def _named(base: ModelDirectory) -> Iterator[Path]:
    """Yield the files that genai_config.json names besides graphs: processors, adapters, libraries of operators."""
    content = read_genai_config(base.folder) if base.has_genai_config else {}
    for text in texts_in(content):
        if 0 < len(text) <= _LONGEST_NAME and is_inside(text) and not text.endswith(_GRAPH):
            file = base.folder / text
            if file.is_file():
                yield file


def _data_of(graph: Path) -> tuple[Path, ...]:
    """Return the files of a graph's external data, by the names that the graph gives them."""
    try:
        return tuple(Path(name) for name in sorted({tensor.path for tensor in external_tensors(ir.load(graph))}))
    except Exception as error:  # protobuf and onnx-ir raise their own classes for damaged files
        raise GraphError(
            f"{graph}, another component of the model, is not a readable ONNX model ({in_one_line(error)}); put a "
            "whole copy there."
        ) from error


def _data_of_others(graphs: Collection[Path]) -> Iterator[Path]:
    for graph in graphs:
        with suppress(GraphError):
            if graph.stat().st_size <= _LARGEST_PARSED:
                yield from (file.resolve() for file in _data_of(graph))


def _files_below(folder: Path, own_folders: Collection[Path]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not _leads_back(entry) and (entry in own_folders or not _holds_a_model(entry)):
            yield from _files_below(entry, own_folders)


def _leads_back(folder: Path) -> bool:
    """Return whether a linked folder is one of those that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _holds_a_model(folder: Path) -> bool:
    return any(
        file.suffix == _GRAPH or file.name in _OTHER_PRODUCTS or _WEIGHTS.search(file.name)
        for file in folder.rglob("*")
    )
