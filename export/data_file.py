"""What lies in a saved data file: its tensors, and an account of every byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from stages.errors import GraphError
from stages.external_data import external_tensors
from stages.records import DataFileUse

# Writers that align tensors do it to pages of at least the first and at most the second number of bytes.
_PAGE, _LARGEST_ALIGNMENT = 4096, 65536


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
    """Whether the bytes from ``end`` to ``offset`` do nothing but align what lies at ``offset``."""
    gap = offset - end
    return gap == 0 or (0 < gap < _LARGEST_ALIGNMENT and offset % _PAGE == 0)


def read_initializer(node: ir.Node, name: str) -> np.ndarray:
    """A copy of initializer ``name`` of the graph that holds ``node``; no mapping of the file stays open."""
    assert isinstance(node.graph, ir.Graph)
    tensor = node.graph.initializers[name].const_value
    assert tensor is not None
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array
