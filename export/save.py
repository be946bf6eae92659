"""Write the output folder: the graph with one data file, and what else of the base model it needs.

Also reads saved tensors back, and accounts for every byte of the data file.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from jaxtyping import UInt8

from stages.commands.progress import progress_bar
from stages.errors import GraphError, UserError
from stages.model.directory import DECODER, ModelDirectory
from stages.model.genai_config import GENAI_CONFIG, component_entries, read_genai_config
from stages.model.load import external_tensors, place_weights
from stages.model.package import component_graphs, package_files
from stages.records.results import DataFileUse
from stages.system.atomic import is_occupied, refuse_existing, require_creatable
from stages.system.paths import from_here

_LOGGER = logging.getLogger(__name__)
OUTPUT_OPTION = "--output_path"
_LARGEST_INSIDE = 256
"""Bytes of a tensor that is kept in the .onnx file."""
# Writers that align tensors do it to pages of at least the first and at most the second number of bytes.
_PAGE, _LARGEST_ALIGNMENT = 4096, 65536
_GENAI_COMPONENTS = frozenset({DECODER, "encoder", "draft", "vision", "embedding", "speech", "joiner", "vad", "mtp"})
"""Entries under model that onnxruntime-genai knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the output goes: a folder of its own, and the name of the .onnx file in it."""

    folder: Path
    onnx_name: str
    """With the subfolder that the base's graph lies in, unless the path names the file."""
    overwrite: bool

    @property
    def onnx_file(self) -> Path:
        """Return the .onnx file's path."""
        return self.folder / self.onnx_name

    @classmethod
    def from_path(cls, path: Path, base: ModelDirectory, *, overwrite: bool) -> Destination:
        """Return the destination that ``path`` names: a folder, or the .onnx file in it.

        Args:
            path: --output_path.
            base: gives the .onnx file its name where ``path`` doesn't.
            overwrite: replace an earlier output.

        Raises:
            UserError: the folder holds the base model, it is there and ``overwrite`` is off, or it is no earlier
                output, and only such a one may be replaced.
        """
        path = path.absolute()
        is_file = path.suffix == ".onnx"
        destination = cls(
            folder=path.parent if is_file else path,
            onnx_name=path.name if is_file else base.onnx_name,
            overwrite=overwrite,
        )
        others = component_graphs(base)
        for holds_the_base in {base.folder, *(file.parent for file in (base.onnx_file, *others))}:
            destination.require_apart_from(holds_the_base, "the base model")
        require_creatable(destination.folder, option=OUTPUT_OPTION)
        refuse_existing(destination.folder, overwrite=overwrite, option=OUTPUT_OPTION)
        destination._require_replaceable()
        destination._require_outside_weights()
        destination.require_free_name([file.relative_to(base.folder) for file in others])
        return destination

    def require_apart_from(self, other: Path, what: str) -> None:
        """Raise UserError when replacing the folder would replace ``other`` with it."""
        mine, theirs = self.folder.resolve(), other.resolve()
        if mine == theirs or mine in theirs.parents:
            raise UserError(f"{OUTPUT_OPTION} {self.folder} would replace {what} in {other}; choose another path.")

    def require_free_name(self, others: Collection[Path]) -> None:
        """Raise UserError where another component of the base has the name of the output's graph."""
        if self.onnx_name in {file.as_posix() for file in others}:
            raise UserError(
                f"{OUTPUT_OPTION}: the base folder holds another model called {self.onnx_name}; choose another name."
            )

    def warn_inside(self, base: Path) -> None:
        """Log a warning where the output would lie in the folder of its ``base``."""
        # Whoever works in the base's folder means it.
        if base.resolve() in self.folder.resolve().parents and base.resolve() != Path.cwd():
            beside = from_here(base.with_name(self.folder.name))
            _LOGGER.warning("the output will lie in the base model's own folder; beside it would be %s.", beside)

    def _require_outside_weights(self) -> None:
        for folder in (self.folder, *self.folder.parents):
            if (folder / "recipe.json").is_file() and any(folder.glob("[0-9]*.safetensors")):
                raise UserError(
                    f"{OUTPUT_OPTION} {self.folder} lies among the quantized weights in {folder}; choose another path."
                )

    def _require_replaceable(self) -> None:
        if is_occupied(self.folder) and not self.onnx_file.is_file():
            raise UserError(
                f"{OUTPUT_OPTION} {self.folder} holds no {self.onnx_name}, so it isn't an earlier output and "
                "--overwrite won't delete it; choose another path."
            )


def data_name(onnx_name: str) -> str:
    """Name the external data file beside ``onnx_name``."""
    return f"{onnx_name}.data"


def save_model(model: ir.Model, folder: Path, onnx_name: str, written: Callable[[str], None] | None = None) -> None:
    """Write ``model`` into ``folder``: the graph, then its data file, one tensor in memory at a time.

    Args:
        model: the graph to write; its tensors may be read only now. It stays as it is.
        folder: where both files go.
        onnx_name: name of the graph's file.
        written: is told the name of each tensor of the data file as soon as its bytes can be read there.

    Raises:
        UserError: a tensor can't be read.
    """
    file = folder / onnx_name
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = _save_graph(model, file)
    with progress_bar() as bar, file.with_name(data_name(file.name)).open("wb") as data:
        for tensor in bar.track(tensors, description="writing", unit="tensors"):
            _write(tensor, data)
            data.flush()
            if written is not None:
                written(str(tensor.name))


def _write(tensor: ir.TensorProtocol, data: BufferedWriter) -> None:
    if isinstance(tensor, ir.Tensor | ir.ExternalTensor | ir.LazyTensor | ir.PackedTensor):
        tensor.tofile(data)  # which lets the system copy what lies in a file
    else:
        data.write(tensor.tobytes())


def _save_graph(model: ir.Model, file: Path) -> list[ir.TensorProtocol]:
    """Write the .onnx file, and return what its data file has to hold, one behind the other: all but small tensors."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    kept = [(value, value.const_value) for value in values if value.const_value is not None]
    tensors, end = list[ir.TensorProtocol](), 0
    try:
        for value, tensor in kept:
            if tensor.nbytes > _LARGEST_INSIDE:
                value.const_value = ir.ExternalTensor(
                    data_name(file.name),
                    end,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=str(tensor.name),
                    base_dir=file.parent,
                )
                tensors.append(tensor)
                end += tensor.nbytes
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(np.array(tensor.numpy()), name=tensor.name)
        ir.save(model, file)
    except ir.serde.SerdeError as error:
        cause = _user_error_behind(error)
        if cause is None:
            raise
        raise cause from cause.__cause__
    finally:
        for value, tensor in kept:
            value.const_value = tensor
    return tensors


def _user_error_behind(error: BaseException) -> UserError | None:
    """Return the error of a tensor that is read while it is written, which onnx-ir wraps."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def copy_side_files(base: ModelDirectory, base_model: ir.Model, folder: Path, onnx_name: str) -> None:
    """Copy what the output needs besides its own graph: see ``package_files``.

    Components that share files of weights with the base's graph get files of their own: the output's graph has other
    weights. Then nothing is left for the runtime to share.

    Args:
        base: the base model.
        base_model: its graph, which names its external data.
        folder: the unfinished output.
        onnx_name: name of the output's graph.

    Raises:
        GraphError: another component can't be read.
    """
    files = package_files(base, base_model, data_name(onnx_name))
    for missing in files.missing:
        _LOGGER.warning("%s lacks %s, which a part of the model needs: the output lacks it too.", base.folder, missing)
    for file in files.copied:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / file, folder / file)
    for file in files.rewritten:
        model = ir.load(base.folder / file)
        place_weights(model, base.folder / file)
        save_model(model, folder, file.as_posix())
    if files.rewritten and base.has_genai_config:
        content = read_genai_config(folder)
        for entry in content["model"].values():
            if isinstance(entry, dict):
                entry.pop("shared_initializers", None)
        _write_genai_config(folder, content)


def patch_genai_config(folder: Path, onnx_name: str, session_options: Mapping[str, str], component: str) -> None:
    """Point genai_config.json at the output's graph, and add session options.

    Args:
        folder: holds genai_config.json.
        onnx_name: name of the output's graph.
        session_options: what onnxruntime-genai passes on to ONNX Runtime.
        component: the part of the package that the graph is.
    """
    content = read_genai_config(folder)
    model: dict[str, Any] = content.setdefault("model", {})
    found = component_entries(content).get(component)
    if found is None and component not in _GENAI_COMPONENTS:
        return  # onnxruntime-genai refuses a file with an entry that it doesn't know
    entry, key = found or (model.setdefault(component, {}), "filename")
    entry[key] = onnx_name
    if session_options:
        # A component without options of its own takes the decoder's.
        inherited = copy.deepcopy(model.get(DECODER, {}).get("session_options", {}))
        entry.setdefault("session_options", inherited).update(session_options)
    _write_genai_config(folder, content)


def _write_genai_config(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / GENAI_CONFIG).write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def account_for_bytes(model: ir.Model, path: Path) -> DataFileUse:
    """Check that the tensors of ``model`` tile the data file ``path``.

    Raises:
        GraphError: a reference leaves the file, overlaps another, has the wrong length, or bytes belong to no tensor.
    """
    size = path.stat().st_size if path.is_file() else 0
    end = padding = referenced = 0
    for tensor in sorted(external_tensors(model), key=lambda tensor: tensor.offset or 0):
        offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
        if Path(tensor.path).resolve() != path.resolve() or length != tensor.nbytes or offset + length > size:
            raise GraphError(f"{path.name} is not whole: '{tensor.name}' doesn't fit in it; export again.")
        if not is_padding(end, offset):
            raise GraphError(f"{path.name} has overlapping or unused bytes before '{tensor.name}'; export again.")
        padding += offset - end
        referenced += length
        end = offset + length
    if end != size:
        raise GraphError(f"{path.name} has {size - end} bytes behind its last tensor; export again.")
    return DataFileUse(file_bytes=size, referenced_bytes=referenced, padding_bytes=padding)


def is_padding(end: int, offset: int) -> bool:
    """Say whether the bytes from ``end`` to ``offset`` only align what lies at ``offset``."""
    gap = offset - end
    return gap == 0 or (0 < gap < _LARGEST_ALIGNMENT and offset % _PAGE == 0)


def saved_tensor(node: ir.Node, name: str) -> ir.TensorProtocol:
    """Return the initializer ``name`` of the graph that holds ``node``."""
    assert isinstance(node.graph, ir.Graph)
    tensor = node.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def saved_bytes(tensor: ir.TensorProtocol) -> UInt8[np.ndarray, " bytes"]:
    """Return a tensor's bytes as they are stored; those in a data file are read when they are looked at."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.frombuffer(tensor.tobytes(), np.uint8)
    mapped = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.length or tensor.nbytes,))
    return mapped.view(np.ndarray)


def read_initializer(node: ir.Node, name: str) -> np.ndarray:
    """Return a copy of initializer ``name`` of the graph that holds ``node``; no mapping of the file stays open."""
    tensor = saved_tensor(node, name)
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array
