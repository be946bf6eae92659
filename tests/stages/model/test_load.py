"""Check that a base model that can't be read is refused when it is opened, and what its fingerprint follows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.model.load import external_files, fingerprint_model, load_graph, parse_graph
from tests.support.graphs import TinyGraph


def saved(folder: Path, weight: np.ndarray) -> Path:
    """Save a model of one MatMul, whose weight lies in model.onnx.data."""
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", weight.shape[0]])
    graph.linear("x", weight, "y")
    graph.output("y", TensorProto.FLOAT, ["t", weight.shape[1]])
    folder.mkdir()
    ir.save(graph.model(), folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", np.ones((6, 4), np.float32))


def test_weights_stay_in_their_file(folder: Path) -> None:
    model = load_graph(locate_model(folder))
    assert isinstance(model.graph.initializers["y.weight"].const_value, ir.ExternalTensor)
    assert list(external_files(model)) == [folder / "model.onnx.data"]


def test_truncated_and_missing_data(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(GraphError, match=r"truncated: 'y\.weight' ends at byte 96, the file has 88"):
        load_graph(locate_model(folder))
    data.unlink()
    with pytest.raises(GraphError, match="is missing"):
        load_graph(locate_model(folder))
    assert [node.op_type for node in parse_graph(locate_model(folder)).graph] == ["MatMul"]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_linked_data(folder: Path, tmp_path: Path, link: str) -> None:
    data = folder / "model.onnx.data"
    target = data.rename(tmp_path / "blob")
    getattr(data, link)(target)
    with pytest.raises(GraphError, match=r"is a link|a link leads there"):
        load_graph(locate_model(folder))


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_data_that_may_not_be_read(folder: Path) -> None:
    (folder / "model.onnx.data").chmod(0)
    with pytest.raises(GraphError, match="can't be read"):
        load_graph(locate_model(folder))


def test_a_file_of_another_kind_is_not_to_be_built_again(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"not a model at all")
    with pytest.raises(GraphError) as refused:
        load_graph(locate_model(tmp_path / "notes.txt"))
    fix = "is not a readable ONNX model; pass an .onnx file, or the folder that holds one."
    assert str(refused.value) == f"{tmp_path / 'notes.txt'} {fix}"


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model at all")
    with pytest.raises(GraphError, match="not a readable ONNX model"):
        load_graph(locate_model(tmp_path))


def test_an_output_that_nobody_makes(folder: Path) -> None:
    """What onnxruntime-genai 0.18's builder writes for fp32 on cuda: caches that no Attention node gives out."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    proto.graph.output.append(helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["b", 2, "t", 16]))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=r"no node makes its output 'present\.0\.key'"):
        load_graph(locate_model(folder))


def test_a_fault_of_the_graph_is_told_with_its_file(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    proto.graph.node[0].input[0] = "z"
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=r"model\.onnx is not a valid model: .* reads 'z', which nothing makes; build"):
        load_graph(locate_model(folder))


def test_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    weight = np.ones((200, 40), np.float32)
    first = saved(tmp_path / "a", weight)
    shutil.copytree(first, tmp_path / "b")
    same = fingerprint_model(locate_model(tmp_path / "b"))
    assert fingerprint_model(locate_model(first)) == same
    weight[-1, -1] = 2
    assert fingerprint_model(locate_model(saved(tmp_path / "c", weight))) != same
