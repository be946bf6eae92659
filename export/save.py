"""Write the output folder's files: the graph with one data file, and everything that lay beside the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from stages.atomic import is_occupied, refuse_existing, require_creatable
from stages.base_graph import external_files
from stages.errors import UserError
from stages.genai_config import GENAI_CONFIG, read_genai_config
from stages.model_directory import ModelDirectory
from stages.progress import progress_bar

_OPTION = "--output_path"
_OTHER_PRODUCTS = frozenset({"recipe.json", "manifest.json"})
"""Files that mark a folder as quantized weights or a calibration cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the output goes: a folder of its own, and the name of the .onnx file in it."""

    folder: Path
    onnx_name: str
    overwrite: bool

    @property
    def onnx_file(self) -> Path:
        return self.folder / self.onnx_name

    @property
    def option(self) -> str:
        """The command-line option that names the folder, for messages."""
        return _OPTION

    @classmethod
    def from_path(cls, path: Path, base: ModelDirectory, *, overwrite: bool) -> Destination:
        """The destination that ``path`` means: a folder, or the .onnx file in it.

        Raises:
            UserError: the folder holds the base model; it is there and ``overwrite`` is off; or it is no
                earlier output, which alone may be replaced.
        """
        path = path.absolute()
        is_file = path.suffix == ".onnx"
        destination = cls(
            folder=path.parent if is_file else path,
            onnx_name=path.name if is_file else base.onnx_file.name,
            overwrite=overwrite,
        )
        destination.require_apart_from(base.folder, "the base model")
        require_creatable(destination.folder, option=_OPTION)
        refuse_existing(destination.folder, overwrite=overwrite, option=_OPTION)
        destination._require_replaceable()
        return destination

    def require_apart_from(self, other: Path, what: str) -> None:
        """Raise UserError when replacing the folder would replace ``other`` with it."""
        mine, theirs = self.folder.resolve(), other.resolve()
        if mine == theirs or mine in theirs.parents:
            raise UserError(f"{_OPTION} {self.folder} would replace {what} in {other}; choose another path.")

    def _require_replaceable(self) -> None:
        if is_occupied(self.folder) and not self.onnx_file.is_file():
            raise UserError(
                f"{_OPTION} {self.folder} holds no {self.onnx_name}, so it isn't an earlier output and --overwrite "
                "won't delete it; choose another path."
            )


def data_name(onnx_name: str) -> str:
    """Name of the external data file beside ``onnx_name``."""
    return f"{onnx_name}.data"


def save_model(model: ir.Model, folder: Path, onnx_name: str) -> None:
    """Write ``model`` and its data file into ``folder``, one tensor in memory at a time."""
    with progress_bar() as bar:
        task = bar.add_task("writing", total=None, unit="tensors")

        def advance(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            bar.update(task, total=info.total)
            bar.advance(task)

        ir.save(model, folder / onnx_name, external_data=data_name(onnx_name), callback=advance)


def copy_side_files(base: ModelDirectory, base_model: ir.Model, folder: Path, onnx_name: str) -> None:
    """Copy what lies beside the base model, but for the graph, its external data, and names that the output uses.

    Subfolders are copied too, except those that hold a model, a cache or weights of their own: outputs are often put
    inside the base folder.

    Raises:
        UserError: another model of the base folder has the output's file name.
    """
    left_out = {base.onnx_file.resolve(), *external_files(base_model)}
    for source in _files_of_model(base.folder):
        relative = source.relative_to(base.folder)
        if source.resolve() in left_out or str(relative) == data_name(onnx_name):
            continue
        if str(relative) == onnx_name:
            raise UserError(f"{_OPTION}: the base folder holds another model called {onnx_name}; choose another name.")
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
    """Point genai_config.json at the output's graph and add ``session_options``, which onnxruntime-genai passes on."""
    content = read_genai_config(folder)
    decoder = content.setdefault("model", {}).setdefault("decoder", {})
    decoder["filename"] = onnx_name
    if session_options:
        decoder.setdefault("session_options", {}).update(session_options)
    (folder / GENAI_CONFIG).write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
