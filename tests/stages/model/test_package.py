"""Check which files of a base model's folder an output gets, and which stay behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import locate_model
from stages.model.load import load_graph
from stages.model.package import component_graphs, package_files
from tests.support.graphs import TinyGraph


def save(path: Path, data: str = "") -> None:
    """Save a graph of one MatMul, and its weight beside it in ``data``."""
    graph = TinyGraph()
    graph.input("x", TensorProto.FLOAT, ["t", 6])
    graph.linear("x", np.ones((6, 4), np.float32), "y")
    graph.output("y", TensorProto.FLOAT, ["t", 4])
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(graph.model(), path, external_data=data or f"{path.name}.data", size_threshold_bytes=0)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def configure(folder: Path, **components: str) -> None:
    parts = {name: {"filename": file, "config_filename": "odd.bin"} for name, file in components.items()}
    (folder / "genai_config.json").write_text(json.dumps({"model": parts}))


def files(path: Path) -> set[str]:
    directory = locate_model(path)
    found = package_files(directory, load_graph(directory), f"{directory.onnx_name}.data")
    return {file.as_posix() for file in found.copied}


def test_of_a_clone_only_what_the_output_needs(tmp_path: Path) -> None:
    save(tmp_path / "model.onnx")
    save(tmp_path / "model_q4.onnx", "q4-weights")
    kept = ("config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "adapters/a.onnx_adapter", "more/x.txt")
    left = (
        ".git/lfs/objects/12", ".cache/huggingface/x.metadata", ".gitattributes", "model.safetensors",
        "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-00001-of-2.bin", "model_fp16.onnx_data",
        "model_fp16.onnx_data_1", "original/consolidated.00.pth", "original/params.json", "openvino_model.xml",
        "model-Q4_K_M.gguf", "tf_model.h5", "runs/1/model.onnx", "int4.weights/recipe.json",
        "a.calibration/manifest.json",
    )  # fmt: skip
    touch(tmp_path, *kept, *left)
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "more/back").symlink_to(".")
    assert files(tmp_path) == set(kept)


@pytest.mark.parametrize("configured", [True, False])
def test_a_package_is_complete_whichever_component_is_quantized(tmp_path: Path, configured: bool) -> None:
    names = ("decoder", "embedding", "vision")
    for name in names:
        save(tmp_path / name / "model.onnx")
    touch(tmp_path, "tokenizer.json", "odd.bin" if configured else "config.json", "vision/preprocessor.json")
    save(tmp_path / "int4/decoder/model.onnx")  # an output
    if configured:
        configure(tmp_path, **{name: f"{name}/model.onnx" for name in names})
    for name in names:
        graphs = {f"{other}/model.onnx" for other in names if other != name}
        beside = {"tokenizer.json", "vision/preprocessor.json"}
        beside |= {"odd.bin", "genai_config.json"} if configured else {"config.json"}
        found = files(tmp_path / name)
        assert found == graphs | {f"{graph}.data" for graph in graphs} | beside
        assert component_graphs(locate_model(tmp_path / name / "model.onnx")) == tuple(
            map(tmp_path.joinpath, sorted(graphs))
        )


def test_components_that_are_files_keep_the_precision(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "tokenizer.json")
    for precision in ("", "_fp16", "_q4"):
        for stem in ("decoder_model_merged", "embed_tokens", "vision_encoder"):
            save(tmp_path / "onnx" / f"{stem}{precision}.onnx")
    for precision in ("", "_q4"):
        path = tmp_path / f"onnx/decoder_model_merged{precision}.onnx"
        parts = {f"onnx/{stem}{precision}.onnx" for stem in ("embed_tokens", "vision_encoder")}
        assert files(path) == {"config.json", "tokenizer.json"} | parts | {f"{part}.data" for part in parts}


def test_equal_files_that_a_hub_cache_keeps_once_count_as_two(tmp_path: Path) -> None:
    """The embedding is the same graph here: its links lead into the decoder's blobs."""
    save(tmp_path / "blobs/model.onnx")
    for name in ("decoder", "embedding"):
        for file in ("model.onnx", "model.onnx.data"):
            (tmp_path / "s" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "s" / name / file).symlink_to(tmp_path / "blobs" / file)
    configure(tmp_path / "s", decoder="decoder/model.onnx", embedding="embedding/model.onnx")
    directory = locate_model(tmp_path / "s")
    found = package_files(directory, load_graph(directory), "decoder/model.onnx.data")
    assert found.rewritten == (Path("embedding/model.onnx"),)


def test_another_graph_than_the_one_that_is_named_replaces_it(tmp_path: Path) -> None:
    for name in ("model.onnx", "model_fp16.onnx"):
        save(tmp_path / name)
    configure(tmp_path, decoder="model.onnx")
    assert files(tmp_path / "model_fp16.onnx") == {"genai_config.json"}


def test_a_damaged_component_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    save(tmp_path / "model.onnx")
    (tmp_path / "vision.onnx").write_bytes(b"not a model at all")
    configure(tmp_path, decoder="model.onnx", vision="vision.onnx")
    with pytest.raises(GraphError, match=r"vision\.onnx, another component of the model, is not a readable ONNX model"):
        component_graphs(locate_model(tmp_path))
