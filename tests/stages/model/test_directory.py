"""Check which folders hold a model, and which of its key/value caches slide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import TensorProto

from stages.errors import GraphError
from stages.model.directory import ModelDirectory, locate_model, logits_among
from tests.support.graphs import MICROSOFT, TinyGraph


def attention_model(folder: Path, attributes: dict[str, int], *, configured: bool) -> None:
    """One GroupQueryAttention with a window of 8."""
    graph = TinyGraph()
    names = ["qkv", "past_key", "past_value", "lengths", "total"]
    for name in names:
        graph.input(name, TensorProto.FLOAT, ["b", "n"])
    graph.node(
        "GroupQueryAttention",
        ["qkv", "", "", *names[1:]],
        ["y"],
        {"num_heads": 2, "kv_num_heads": 1, "local_window_size": 8} | attributes,
        MICROSOFT,
    )
    graph.output("y", TensorProto.FLOAT, ["b", "n"])
    graph.save(folder)
    decoder = {"filename": "model.onnx"} | ({"sliding_window": {"window_size": 8}} if configured else {})
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))


@pytest.mark.parametrize(
    ("attributes", "configured", "expected"),
    [
        ({"sliding_window_cache": 1}, True, {"past_key": 8, "past_value": 8}),
        # A window without a sliding cache: the past starts empty, whatever genai_config.json tells the runtime.
        ({"sliding_window_cache": 0}, True, {}),
        ({}, True, {}),
        ({"sliding_window_cache": 1}, False, {}),
    ],
)
def test_caches_that_slide(
    tmp_path: Path, attributes: dict[str, int], configured: bool, expected: dict[str, int]
) -> None:
    attention_model(tmp_path, attributes, configured=configured)
    assert locate_model(tmp_path).windowed_caches == expected


def test_a_file_that_is_no_model_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    attention_model(tmp_path, {}, configured=True)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    assert locate_model(tmp_path).windowed_caches == {}


def test_missing_paths_and_ambiguous_folders(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="does not exist"):
        locate_model(tmp_path / "nothing")
    with pytest.raises(GraphError, match=r"no \.onnx file"):
        locate_model(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(GraphError, match=r"a\.onnx, b\.onnx"):
        locate_model(tmp_path)
    assert locate_model(tmp_path / "b.onnx").onnx_file.name == "b.onnx"


def layout(folder: Path, *names: str) -> None:
    """Make empty files, and a genai_config.json that names the components whose graphs are called model.onnx."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    parts = {name.split("/")[0]: {"filename": name} for name in names if name.endswith("/model.onnx")}
    if "genai_config.json" in names:
        (folder / "genai_config.json").write_text(json.dumps({"model": parts}))


PACKAGE = ("genai_config.json", "tokenizer.json", "decoder/model.onnx", "vision/model.onnx", "embedding/model.onnx")
BARE_PACKAGE = ("decoder/model.onnx", "vision_encoder/model.onnx")
REPOSITORY = (
    "config.json",
    "onnx/model.onnx",
    "onnx/model_fp16.onnx",
    "onnx/model_q4f16.onnx",
    "onnx/model_quantized.onnx",
)
PARTS = (
    "config.json",
    *(f"onnx/{stem}{suffix}.onnx" for suffix in ("", "_q4") for stem in ("embed_tokens", "vision_encoder")),
)
OPTIMUM = (
    "config.json",
    "decoder_model.onnx",
    "decoder_model_merged.onnx",
    "decoder_with_past_model.onnx",
    "encoder_model.onnx",
)


@pytest.mark.parametrize(
    ("names", "path", "component", "found"),
    [
        (PACKAGE, "", None, "decoder/model.onnx"),
        (PACKAGE, "", "vision", "vision/model.onnx"),
        (PACKAGE, "vision", None, "vision/model.onnx"),
        (PACKAGE, "vision", "vision", "vision/model.onnx"),
        (PACKAGE, "embedding/model.onnx", None, "embedding/model.onnx"),
        (PACKAGE, "decoder/../vision", None, "vision/model.onnx"),
        (BARE_PACKAGE, "", None, "decoder/model.onnx"),
        (BARE_PACKAGE, "decoder", None, "decoder/model.onnx"),
        (BARE_PACKAGE, "", "vision_encoder", "vision_encoder/model.onnx"),
        (REPOSITORY, "", None, "onnx/model.onnx"),
        (REPOSITORY, "onnx", None, "onnx/model.onnx"),
        (REPOSITORY, "onnx/model_fp16.onnx", None, "onnx/model_fp16.onnx"),
        ((*PARTS, "onnx/decoder_model_merged.onnx"), "", None, "onnx/decoder_model_merged.onnx"),
        ((*PARTS, "onnx/decoder_model_merged.onnx"), "", "vision_encoder", "onnx/vision_encoder.onnx"),
        ((*PARTS, "onnx/decoder_model_merged.onnx"), "", "embed", "onnx/embed_tokens.onnx"),
        (OPTIMUM, "", None, "decoder_model_merged.onnx"),
        (("model.onnx", "model_fp16.onnx", "model_q4.onnx"), "", None, "model.onnx"),
        (("phi.onnx", "phi-int4-cpu.onnx"), "", None, "phi.onnx"),
    ],
)
def test_the_root_of_a_package_and_the_graph_that_is_meant(
    tmp_path: Path, names: tuple[str, ...], path: str, component: str | None, found: str
) -> None:
    layout(tmp_path, *names)
    directory = locate_model(tmp_path / path, component)
    assert (directory.folder, directory.onnx_name) == (tmp_path, found)
    of_file = locate_model(directory.onnx_file)
    assert (of_file.folder, of_file.component) == (tmp_path, directory.component)


@pytest.mark.parametrize(
    ("names", "path", "component", "words"),
    [
        (PACKAGE, "", "speech", r"has no component speech; pass another --component \(decoder, vision, embedding\)"),
        (PACKAGE, "vision", "decoder", r"is the component vision and not decoder; pass .*, or --component vision"),
        (PARTS, "", "speech", "no component speech that a name tells; pass its .onnx file"),
        (
            ("genai_config.json", "context/model.onnx"),
            "",
            None,
            r"names no decoder; pass a --component of it \(context\)",
        ),
        (("model.onnx", "other.onnx"), "", None, r"holds model\.onnx, other\.onnx; pass the path"),
    ],
)
def test_a_component_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, names: tuple[str, ...], path: str, component: str | None, words: str
) -> None:
    layout(tmp_path, *names)
    with pytest.raises(GraphError, match=words):
        locate_model(tmp_path / path, component)


def test_a_folder_of_models_is_no_package(tmp_path: Path) -> None:
    layout(tmp_path, "base/model.onnx", "other/model.onnx", "tokenizer.json")
    assert locate_model(tmp_path / "base").folder == tmp_path / "base"


@pytest.mark.parametrize(
    ("outputs", "configured", "logits"),
    [
        (["present.0.key", "logits"], {}, "logits"),
        (["logits_Q8", "present.0.key"], {}, "logits_Q8"),
        (["logits_mask", "logits"], {}, "logits"),
        (["logits", "lm_logits"], {"logits": "lm_logits"}, "lm_logits"),
        (["logits_Q4"], {"logits": "logits"}, "logits_Q4"),
        (["logits_a", "logits_b"], {}, None),
        (["last_hidden_state"], {}, None),
    ],
)
def test_the_output_that_holds_the_logits(outputs: list[str], configured: dict[str, str], logits: str | None) -> None:
    directory = ModelDirectory(
        folder=Path(), onnx_file=Path("model.onnx"), has_genai_config=True, output_names=configured
    )
    if logits is None:
        with pytest.raises(GraphError, match=r"model\.onnx has no output 'logits'; pass a text decoder"):
            logits_among(outputs, directory)
    else:
        assert logits_among(outputs, directory) == logits
