"""Fingerprint of a base model, by which caches and quantized weights know what they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from stages.base_graph import load_graph
from stages.external_data import external_tensors
from stages.model_directory import ModelDirectory

_SAMPLE = 4096


def fingerprint_model(directory: ModelDirectory, model: ir.Model | None = None) -> str:
    """Return the hex digest over the graph and a sample of every external tensor.

    The .onnx file is hashed whole; of each external tensor its place and its first and last 4 KiB: training changes
    every matrix everywhere, and reading 16 GB to notice it would take longer than rounding them.

    Args:
        directory: where the model lies.
        model: what ``load_graph`` gave for it; None parses the file here.

    Raises:
        GraphError: the model can't be read, or isn't whole.
    """
    tensors = tuple(external_tensors(load_graph(directory) if model is None else model))
    digest = hashlib.sha256(directory.onnx_file.read_bytes())
    for tensor in tensors:
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: ir.ExternalTensor) -> bytes:
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    with Path(tensor.path).open("rb") as file:
        file.seek(offset)
        head = file.read(min(_SAMPLE, length))
        file.seek(offset + max(length - _SAMPLE, 0))
        tail = file.read(min(_SAMPLE, length))
    return head + tail
