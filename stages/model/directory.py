"""Find the files of a model: the graph, genai_config.json and the folder with everything else.

A model may be a package of several graphs, its components, in one folder or in a subfolder each, with one
genai_config.json at the root; or a repository of the Hugging Face hub, with its graphs in ``onnx/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

from stages.errors import GraphError
from stages.model.genai_config import (
    GENAI_CONFIG,
    LOGITS,
    GenaiDecoder,
    GenaiModel,
    component_entries,
    component_files,
    read_genai_config,
    read_genai_model,
)
from stages.system.paths import reachable

DECODER = "decoder"
"""The component that is meant where none is named."""
_ONNX_FOLDER = "onnx"
_DEEPEST = 3
"""Folders between a package's root and a graph."""
_SETUP = (GENAI_CONFIG, "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""Files of which a folder that is a model's own has one."""
_PRECISION = re.compile(
    r"[_.-](fp16|bf16|q2|q4|q8|q4f16|q8f16|int4|int8|uint8|bnb4|quantized)(?=[_.-]|$)", re.IGNORECASE
)
_DECODERS = ("model", "decoder_model_merged", "decoder_model", "decoder", "decoder_with_past_model")
"""What exporters call the graph that writes text, the best to quantize first."""
_PARTS = re.compile("embed|vision|image|audio|speech|encoder|projector|joiner", re.IGNORECASE)
_PAST_INPUTS = slice(3, 5)
_EMBEDDING = "embed"
"""What names of embedding models begin with."""


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
    """The root: genai_config.json and the tokenizer lie here."""
    onnx_file: Path
    """In ``folder``, or deeper."""
    has_genai_config: bool
    component: str = DECODER
    """Which part of the package the .onnx file is."""
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

    @property
    def onnx_name(self) -> str:
        """Return the .onnx file's path in ``folder``, as genai_config.json writes it."""
        return self.onnx_file.relative_to(self.folder).as_posix()


def logits_among(outputs: Iterable[str], directory: ModelDirectory) -> str:
    """Return the output that holds the logits: as genai_config.json names it, ``logits``, or alone begins so.

    Olive's quantizers rename it to logits_Q4 or logits_Q8.

    Raises:
        GraphError: there is none.
    """
    names = list(outputs)
    named = [name for name in (directory.output_names.get(LOGITS), LOGITS) if name in names]
    found = named or [name for name in names if name.startswith(LOGITS)]
    if not named and len(found) != 1:
        raise GraphError(
            f"{directory.onnx_file} has no output '{LOGITS}'; pass a text decoder, or name the output as "
            f"model.decoder.outputs.logits in {GENAI_CONFIG}."
        )
    return found[0]


def has_logits(outputs: Iterable[str], directory: ModelDirectory) -> bool:
    """Return whether one of the outputs holds logits."""
    try:
        logits_among(outputs, directory)
    except GraphError:
        return False
    return True


def locate_model(path: Path, component: str | None = None) -> ModelDirectory:
    """Find the model that ``path`` means.

    Args:
        path: an .onnx file, the folder that holds it, or the root of a package.
        component: the part of the package that is wanted; None: what ``path`` names, else the decoder.

    Raises:
        GraphError: nothing is there, the folder holds no unambiguous .onnx file, it has no such component, or its
            genai_config.json is damaged.
    """
    path = reachable(_without_dots(path))
    try:
        path.stat()
    except FileNotFoundError as error:
        raise GraphError(f"{path} does not exist; pass a model's .onnx file or its folder.") from error
    except OSError as error:
        raise GraphError(f"{path} can't be read ({error.strerror}); pass another path to the model.") from error
    onnx_file = path if path.is_file() else _graph_of(path, component)
    is_root = (path / GENAI_CONFIG).is_file() or path not in (onnx_file, onnx_file.parent)
    folder = path if is_root else _root_of(onnx_file)
    has_config = (folder / GENAI_CONFIG).is_file()
    model = read_genai_model(folder) if has_config else GenaiModel()
    content = read_genai_config(folder) if has_config else {}
    named = _component_of(onnx_file, folder, component_files(content))
    if component is not None and named is not None and component != named:
        raise GraphError(
            f"{onnx_file} is the component {named} and not {component}; pass {folder}, or --component {named}."
        )
    part = named or _part_by_name(onnx_file, folder) or component or DECODER
    decoder = model.decoder
    entry = _entry_of(content, part)
    own = entry.get("session_options", {})
    directory = ModelDirectory(
        folder=folder,
        onnx_file=onnx_file,
        has_genai_config=has_config,
        component=part,
        kv_heads=decoder.num_key_value_heads,
        head_size=decoder.head_size,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        provider=(GenaiDecoder(session_options=own).provider if isinstance(own, dict) else None) or decoder.provider,
        windowed_caches=_windowed_caches(onnx_file) if "sliding_window" in decoder.model_fields_set else {},
        input_names=_names(entry, "inputs"),
        output_names=_names(entry, "outputs"),
    )
    return replace(directory, embedding=_embedding(directory, content))


def _entry_of(content: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    entry = component_entries(content).get(part, ({}, ""))[0] or content.get("model", {}).get(part)
    return entry if isinstance(entry, dict) else {}


def _names(entry: Mapping[str, Any], key: str) -> dict[str, str]:
    names = entry.get(key)
    return {role: name for role, name in names.items() if isinstance(name, str)} if isinstance(names, dict) else {}


def _embedding(base: ModelDirectory, content: Mapping[str, Any]) -> ModelDirectory | None:
    """Return the embedding model that genai_config.json names, else the one that a name tells."""
    if base.component.startswith(_EMBEDDING):
        return None
    entries = component_entries(content).items()
    named = {name: (entry, entry[key]) for name, (entry, key) in entries if name.startswith(_EMBEDDING)}
    by_name: Iterator[tuple[Path, Mapping[str, Any]]] = (
        (path, {}) for path in _parts_by_name(base) if is_embedding(path)
    )
    configured = ((base.folder / filename, entry) for entry, filename in named.values())
    file, entry = next(chain(configured, by_name), (None, {}))
    if file is None:
        return None
    return ModelDirectory(
        folder=base.folder,
        onnx_file=file,
        has_genai_config=base.has_genai_config,
        component="embedding",
        input_names=_names(entry, "inputs"),
        output_names=_names(entry, "outputs"),
    )


def is_embedding(onnx_file: Path) -> bool:
    """Return whether a graph's name, or its folder's, tells that it embeds tokens."""
    return onnx_file.stem.startswith(_EMBEDDING) or onnx_file.parent.name.startswith(_EMBEDDING)


def _without_dots(path: Path) -> Path:
    """Return ``path`` absolute; its parents are only what they seem where no ``..`` stands in it."""
    return path.resolve() if ".." in path.parts else path.absolute()


def _graph_of(folder: Path, component: str | None) -> Path:
    """Return the .onnx file of a component (None: of the decoder) in a folder or the root of a package."""
    wanted = component or DECODER
    if (folder / GENAI_CONFIG).is_file():
        files = component_files(read_genai_config(folder))
        if wanted in files and (folder / files[wanted]).is_file():
            return folder / files[wanted]
        if files and wanted != DECODER:
            missing = f"names {files[wanted]}, which isn't there" if wanted in files else f"has no component {wanted}"
            there = ", ".join(name for name, file in files.items() if (folder / file).is_file()) or "none"
            raise GraphError(f"{folder / GENAI_CONFIG} {missing}; pass another --component ({there}).")
        if files and DECODER not in files and component is None:
            raise GraphError(
                f"{folder / GENAI_CONFIG} names no decoder; pass a --component of it ({', '.join(files)}), "
                "or its .onnx file."
            )
    places = (folder, folder / wanted, folder / _ONNX_FOLDER)
    graphs = next(filter(None, (sorted(place.glob("*.onnx")) for place in places)), [])
    chosen = _chosen(graphs, wanted)
    if chosen is not None:
        return chosen
    found = ", ".join(path.relative_to(folder).as_posix() for path in graphs) or "no .onnx file"
    if component is not None:
        raise GraphError(
            f"{folder} holds {found}, and no component {component} that a name tells; pass its .onnx file."
        )
    raise GraphError(f"{folder} holds {found}; pass the path of the model's .onnx file.")


def _chosen(graphs: Sequence[Path], component: str) -> Path | None:
    """Return the graph that is ``component``, by its name; other precisions of one that is there don't count."""
    if component != DECODER and graphs and graphs[0].parent.name != component:
        plain = [path for path in graphs if precision_of(path.stem) == ""]
        named = [path for path in plain if path.stem == component] or [path for path in plain if component in path.stem]
        return named[0] if len(named) == 1 else None
    if len(graphs) == 1:
        return graphs[0]
    plain = [path for path in graphs if precision_of(path.stem) == "" and not is_part(path.stem)]
    if len(plain) > 1 and all(path.stem in _DECODERS for path in plain):
        plain.sort(key=lambda path: _DECODERS.index(path.stem))
        return plain[0]
    return plain[0] if len(plain) == 1 else None


def precision_of(stem: str) -> str:
    """Return how the name of a graph ends that exists in several precisions: _fp16 of model_fp16; else nothing."""
    found = _PRECISION.search(stem)
    return stem[found.start() :] if found else ""


def is_part(stem: str) -> bool:
    """Return whether a graph's name tells of a part of a package beside the decoder."""
    return stem not in _DECODERS and _PARTS.search(stem) is not None


def _root_of(onnx_file: Path) -> Path:
    """Return the root of the package that a graph belongs to: its own folder, or one above that says so."""
    here = onnx_file.parent
    if (here / GENAI_CONFIG).is_file():
        return here
    for above in here.parents[:_DEEPEST]:
        with suppress(GraphError):  # a damaged file above is none of this model's
            if (above / GENAI_CONFIG).is_file():
                files = component_files(read_genai_config(above)).values()
                if any(above / file == onnx_file for file in files):
                    return above
    is_bare = not any((here / name).is_file() for name in _SETUP)
    in_repository = (here.parent / "config.json").is_file() or (_is_component(here) and _has_other_component(here))
    return here.parent if is_bare and in_repository else here


def _is_component(folder: Path) -> bool:
    return folder.name == DECODER or is_part(folder.name)


def _has_other_component(folder: Path) -> bool:
    others = (other for other in folder.parent.iterdir() if other != folder and other.is_dir())
    return any(_is_component(other) and any(other.glob("*.onnx")) for other in others)


def _component_of(onnx_file: Path, folder: Path, files: dict[str, str]) -> str | None:
    return next((name for name, file in files.items() if folder / file == onnx_file), None)


def _part_by_name(onnx_file: Path, folder: Path) -> str | None:
    """Return the component that a graph is by its name, or by that of its folder; None where neither tells."""
    names = (onnx_file.stem, *(() if onnx_file.parent == folder else (onnx_file.parent.name,)))
    return next(filter(is_part, names), None)


def other_parts(base: ModelDirectory) -> Iterator[Path]:
    """Yield the graphs of the other components of ``base``'s package, missing ones too.

    genai_config.json names them. Without one, names tell: a graph called embed_tokens or vision_encoder, in the same
    precision, in the same folder or in one beside it.
    """
    if base.has_genai_config:
        files = dict.fromkeys(component_files(read_genai_config(base.folder)).values())
        # Whoever passes another graph than the one that is named means it in place of that.
        replaced = (
            () if base.onnx_name in files else (component_files(read_genai_config(base.folder)).get(base.component),)
        )
        others = [base.folder / file for file in files if file not in (base.onnx_name, *replaced)]
        unnamed = [base.embedding.onnx_file] if base.embedding is not None else []
        yield from dict.fromkeys([*others, *unnamed])
        return
    yield from _parts_by_name(base)


def _parts_by_name(base: ModelDirectory) -> Iterator[Path]:
    here, precision = base.onnx_file.parent, precision_of(base.onnx_file.stem)
    for graph in sorted(here.glob("*.onnx")):
        is_other = is_part(graph.stem) or (is_part(base.onnx_file.stem) and graph.stem.startswith(_DECODERS))
        if graph != base.onnx_file and is_other and precision_of(graph.stem) == precision:
            yield graph
    if here != base.folder and here.name != _ONNX_FOLDER:
        for folder in sorted(base.folder.iterdir()):
            if folder.is_dir() and folder != here and _is_component(folder):
                yield from sorted(folder.glob("*.onnx"))


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
