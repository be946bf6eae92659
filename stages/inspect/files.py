"""Look at a model's files: which bytes of its external data belong to a tensor, and which to none."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.save import is_padding
from stages.model.load import external_tensors

_DATA_SUFFIXES = (".data", ".onnx_data", ".bin", ".weight", ".weights")
_WORTH_NAMING = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of external data."""

    path: Path
    file_bytes: int | None
    """None where the file is missing."""
    referenced_bytes: int
    """Bytes that tensors of the graph refer to, each once."""
    padding_bytes: int
    """Gaps that align the tensor after them."""
    orphan_bytes: int
    """Bytes that belong to no tensor."""
    beyond: str
    """The first tensor that ends after the file's end; empty where all fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """All files of a model."""

    onnx_bytes: int
    data: tuple[DataFile, ...]
    unread: tuple[tuple[str, int], ...]
    """(name, bytes) of files that look like external data but that the graph doesn't refer to."""


def report_files(model: ir.Model, onnx_file: Path) -> FileReport:
    """Return the sizes of ``onnx_file`` and the files around it; no weight is read."""
    tensors: dict[Path, list[ir.ExternalTensor]] = {}
    for tensor in external_tensors(model):
        tensors.setdefault(Path(tensor.path).resolve(), []).append(tensor)
    return FileReport(
        onnx_bytes=onnx_file.stat().st_size,
        data=tuple(_data_file(path, members) for path, members in tensors.items()),
        unread=tuple(_unread(onnx_file.parent, tensors.keys())),
    )


def _data_file(path: Path, tensors: list[ir.ExternalTensor]) -> DataFile:
    size = path.stat().st_size if path.is_file() else None
    end = padding = referenced = orphans = 0
    beyond = ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset or 0):
        start = tensor.offset or 0
        stop = start + (tensor.length or tensor.nbytes)
        if start > end:
            gap = start - end
            padding, orphans = (padding + gap, orphans) if is_padding(end, start) else (padding, orphans + gap)
        referenced += max(0, stop - max(start, end))
        end = max(end, stop)
        if size is not None and stop > size and not beyond:
            beyond = str(tensor.name)
    return DataFile(
        path=path,
        file_bytes=size,
        referenced_bytes=referenced,
        padding_bytes=padding,
        orphan_bytes=orphans + max(0, (size or end) - end),
        beyond=beyond,
    )


def _unread(folder: Path, referenced: Collection[Path]) -> list[tuple[str, int]]:
    found = [
        (path.name, path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.endswith(_DATA_SUFFIXES) and path.resolve() not in referenced
    ]
    return [(name, size) for name, size in found if size >= _WORTH_NAMING]
