"""Check that a base model that can't be read is refused when it is opened, and what its fingerprint follows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.model.load import external_files, fingerprint_model, load_graph, parse_graph, weights_folder
from stages.runtime.session import SessionSettings, open_session
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


def hub_cache(folder: Path, inner: str = ".") -> Path:
    """Move the files of ``folder`` into blobs/, as the Hugging Face hub's cache has them, and link them from there."""
    snapshot, blobs = folder.parent / "snapshots/1/" / inner, folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"sha{index}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"sha{index}", snapshot))
    return snapshot / "model.onnx"


def chained(folder: Path) -> Path:
    snapshot, other = hub_cache(folder).parent, folder.parent / "other"
    other.mkdir()
    for file in snapshot.iterdir():
        (other / file.name).symlink_to(file)
    return other / "model.onnx"


def hard_link(folder: Path) -> Path:
    (folder.parent / "second").hardlink_to(folder / "model.onnx.data")
    return folder / "model.onnx"


def linked_folder(folder: Path) -> Path:
    (folder.parent / "link").symlink_to(folder.name)
    return folder.parent / "link" / "model.onnx"


def model_linked_elsewhere(folder: Path) -> Path:
    """Only the .onnx file is a link; its weights lie beside the link."""
    (folder / "model.onnx").rename(folder.parent / "graph")
    (folder / "model.onnx").symlink_to("../graph")
    return folder / "model.onnx"


def weights_in_a_subfolder(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "model.onnx.data").rename(folder / "in/weights")
    return relocated(folder, "in/../in/weights")


def relocated(folder: Path, location: str) -> Path:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = location if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


def weights_linked_elsewhere(folder: Path) -> Path:
    (folder / "model.onnx.data").rename(folder.parent / "stray")
    (folder / "model.onnx.data").symlink_to("../stray")
    return folder / "model.onnx"


def two_stores(folder: Path) -> Path:
    weights_linked_elsewhere(folder)
    (folder.parent / "graphs").mkdir()
    (folder / "model.onnx").rename(folder.parent / "graphs/graph")
    (folder / "model.onnx").symlink_to("../graphs/graph")
    return folder / "model.onnx"


def weights_beside_the_target(folder: Path) -> Path:
    (folder.parent / "linked").mkdir()
    (folder.parent / "linked/model.onnx").symlink_to(folder / "model.onnx")
    return folder.parent / "linked/model.onnx"


def weights_above(folder: Path) -> Path:
    (folder / "model.onnx.data").rename(folder.parent / "stray")
    return relocated(folder, "../stray")


def absolute_path(folder: Path) -> Path:
    return relocated(folder, str(folder / "model.onnx.data"))


@pytest.mark.parametrize(
    ("layout", "refusal"),
    [
        (hub_cache, ""),
        (lambda folder: hub_cache(folder, "onnx"), ""),
        (chained, ""),
        (hard_link, ""),
        (linked_folder, ""),
        (model_linked_elsewhere, ""),
        (weights_in_a_subfolder, ""),
        (weights_linked_elsewhere, r"or a link leads there; pass a copy .* \(cp -rL\)"),
        (two_stores, "or a link leads there"),
        (weights_above, "lies outside of .* build the base again with its data beside it"),
        (absolute_path, "by an absolute path"),
        (weights_beside_the_target, r"link model\.onnx leads to; pass .*/base/model\.onnx\.$"),
    ],
)
def test_links_lead_where_onnx_runtime_follows_them(folder: Path, layout: Callable[[Path], Path], refusal: str) -> None:
    """ONNX Runtime, which opens the file itself, is the oracle; parts of the graph are opened from memory."""
    path = layout(folder)
    directory = locate_model(path)
    if refusal:
        with pytest.raises(GraphError, match=refusal):
            load_graph(directory)
        with pytest.raises(GraphError, match="External data path"):
            open_session(path, SessionSettings())
        return
    open_session(path, SessionSettings())
    model = load_graph(directory)
    np.testing.assert_array_equal(model.graph.initializers["y.weight"].const_value.numpy(), np.ones((6, 4)))
    settings = SessionSettings(external_data_folder=weights_folder(model, directory.onnx_file))
    session = open_session(ir.to_proto(model).SerializeToString(), settings)
    np.testing.assert_array_equal(session.run(None, {"x": np.ones((1, 6), np.float32)})[0], np.full((1, 4), 6))


def test_an_opset_that_is_not_known_yet_asks_for_newer_packages(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    proto.opset_import[0].version = 999
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(
        GraphError, match=r"has opset 999, .*\(pip install -U onnx onnxruntime\), or build the base again"
    ):
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
