"""Write the output folder: the graph with one data file, and everything that lay beside the base model.

Also reads saved tensors back, and accounts for every byte of the data file.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from stages.commands.progress import progress_bar
from stages.errors import GraphError, UserError
from stages.model.directory import ModelDirectory
from stages.model.genai_config import GENAI_CONFIG, read_genai_config
from stages.model.load import external_files, external_tensors
from stages.records.results import DataFileUse
from stages.system.atomic import is_occupied, refuse_existing, require_creatable
from stages.system.paths import from_here

_LOGGER = logging.getLogger(__name__)
OUTPUT_OPTION = "--output_path"
_OTHER_PRODUCTS = frozenset({"recipe.json", "manifest.json"})
"""Files that mark a folder as quantized weights or a calibration cache."""
# Writers that align tensors do it to pages of at least the first and at most the second number of bytes.
_PAGE, _LARGEST_ALIGNMENT = 4096, 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the output goes: a folder of its own, and the name of the .onnx file in it."""

    folder: Path
    onnx_name: str
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
            onnx_name=path.name if is_file else base.onnx_file.name,
            overwrite=overwrite,
        )
        destination.require_apart_from(base.folder, "the base model")
        require_creatable(destination.folder, option=OUTPUT_OPTION)
        refuse_existing(destination.folder, overwrite=overwrite, option=OUTPUT_OPTION)
        destination._require_replaceable()
        destination._require_outside_weights()
        return destination

    def require_apart_from(self, other: Path, what: str) -> None:
        """Raise UserError when replacing the folder would replace ``other`` with it."""
        mine, theirs = self.folder.resolve(), other.resolve()
        if mine == theirs or mine in theirs.parents:
            raise UserError(f"{OUTPUT_OPTION} {self.folder} would replace {what} in {other}; choose another path.")

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


def save_model(model: ir.Model, folder: Path, onnx_name: str) -> None:
    """Write ``model`` and its data file into ``folder``, one tensor in memory at a time.

    Args:
        model: the graph to write; its tensors may be read only now.
        folder: where both files go.
        onnx_name: name of the graph's file.

    Raises:
        UserError: a tensor can't be read.
    """
    with progress_bar() as bar:
        task = bar.add_task("writing", total=None, unit="tensors")

        def advance(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            bar.update(task, total=info.total)
            bar.advance(task)

        try:
            ir.save(model, folder / onnx_name, external_data=data_name(onnx_name), callback=advance)
        except ir.serde.SerdeError as error:
            cause = _user_error_behind(error)
            if cause is None:
                raise
            raise cause from cause.__cause__


def _user_error_behind(error: BaseException) -> UserError | None:
    """Return the error of a tensor that is read while it is written, which onnx-ir wraps."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def copy_side_files(base: ModelDirectory, base_model: ir.Model, folder: Path, onnx_name: str) -> None:
    """Copy what lies beside the base model, but for the graph, its external data, and names that the output uses.

    Subfolders are copied too, except those that hold a model, a cache or weights of their own: outputs may lie inside
    the base folder.

    Args:
        base: the base model.
        base_model: its graph, which names its external data.
        folder: the output.
        onnx_name: name of the output's graph.

    Raises:
        UserError: another model of the base folder has the output's file name.
    """
    left_out = {base.onnx_file.resolve(), *external_files(base_model)}
    for source in _files_of_model(base.folder):
        relative = source.relative_to(base.folder)
        if source.resolve() in left_out or str(relative) == data_name(onnx_name):
            continue
        if str(relative) == onnx_name:
            raise UserError(
                f"{OUTPUT_OPTION}: the base folder holds another model called {onnx_name}; choose another name."
            )
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _files_of_model(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_file():
            yield entry
        elif not any(file.suffix == ".onnx" or file.name in _OTHER_PRODUCTS for file in entry.rglob("*")):
            yield from (file for file in sorted(entry.rglob("*")) if file.is_file())


def patch_genai_config(folder: Path, onnx_name: str, session_options: Mapping[str, str]) -> None:
    """Point genai_config.json at the output's graph, and add session options.

    Args:
        folder: holds genai_config.json.
        onnx_name: name of the output's graph.
        session_options: what onnxruntime-genai passes on to ONNX Runtime.
    """
    content = read_genai_config(folder)
    decoder = content.setdefault("model", {}).setdefault("decoder", {})
    decoder["filename"] = onnx_name
    if session_options:
        decoder.setdefault("session_options", {}).update(session_options)
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


def read_initializer(node: ir.Node, name: str) -> np.ndarray:
    """Return a copy of initializer ``name`` of the graph that holds ``node``; no mapping of the file stays open."""
    assert isinstance(node.graph, ir.Graph)
    tensor = node.graph.initializers[name].const_value
    assert tensor is not None
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array
