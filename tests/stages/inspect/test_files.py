"""Bytes of external data: those of tensors, of padding, of nothing, and those that are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from stages.inspect.files import FileReport, report_files
from tests.support.graphs import TinyGraph


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """A model of two matrices of 4,000 bytes each in model.onnx.data."""
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, [2, 10])
    graph.output("y", TensorProto.FLOAT, None)
    graph.linear(graph.linear("x", np.ones((10, 100), np.float32), "h"), np.ones((100, 10), np.float32), "y")
    return graph.save(tmp_path)


def report(onnx_file: Path) -> FileReport:
    return report_files(ir.load(onnx_file), onnx_file)


def test_every_byte_of_a_whole_file_is_accounted_for(onnx_file: Path) -> None:
    found = report(onnx_file)
    (data,) = found.data
    assert found.onnx_bytes == onnx_file.stat().st_size
    assert (data.path, data.referenced_bytes, data.orphan_bytes, data.beyond) == (
        onnx_file.with_name("model.onnx.data").resolve(), 8000, 0, "",
    )  # fmt: skip
    assert data.file_bytes == data.referenced_bytes + data.padding_bytes
    assert found.unread == ()


def test_bytes_after_the_last_tensor_belong_to_none(onnx_file: Path) -> None:
    with onnx_file.with_name("model.onnx.data").open("ab") as file:
        file.write(b"0" * 5000)
    (data,) = report(onnx_file).data
    assert (data.orphan_bytes, data.referenced_bytes) == (5000, 8000)


def test_a_truncated_file_names_the_first_tensor_that_does_not_fit(onnx_file: Path) -> None:
    path = onnx_file.with_name("model.onnx.data")
    path.write_bytes(path.read_bytes()[:6000])
    model = ir.load(onnx_file)
    (data,) = report_files(model, onnx_file).data
    second = max(model.graph.initializers.values(), key=lambda value: value.const_value.offset or 0)
    assert (data.file_bytes, data.beyond) == (6000, second.name)


def test_a_missing_file_is_told(onnx_file: Path) -> None:
    onnx_file.with_name("model.onnx.data").unlink()
    (data,) = report(onnx_file).data
    assert (data.file_bytes, data.referenced_bytes, data.orphan_bytes) == (None, 8000, 0)


def test_large_files_that_the_graph_does_not_refer_to_are_named(onnx_file: Path) -> None:
    onnx_file.with_name("old.onnx.data").write_bytes(b"0" * (1 << 20))
    onnx_file.with_name("small.bin").write_bytes(b"0")
    onnx_file.with_name("notes.txt").write_bytes(b"0" * (1 << 20))
    assert report(onnx_file).unread == (("old.onnx.data", 1 << 20),)
