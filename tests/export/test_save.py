"""Every byte of a data file belongs to one tensor or is padding that alignment explains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.save import Destination, account_for_bytes, patch_genai_config, read_initializer
from stages.errors import GraphError, UserError
from stages.model.directory import ModelDirectory, locate_model


def model_of(folder: Path, places: list[tuple[int, int]], size: int) -> tuple[ir.Model, Path]:
    """Save a model of float32 vectors at (offset, bytes) in a file of ``size`` bytes."""
    path = folder / "m.onnx.data"
    path.write_bytes(bytes(size))
    initializers = []
    for index, (offset, length) in enumerate(places):
        name = f"t{index}"
        shape = ir.Shape((length // 4,))
        tensor = ir.ExternalTensor(
            path.name, offset, length, ir.DataType.FLOAT, shape=shape, name=name, base_dir=str(folder)
        )
        initializers.append(ir.Value(name=name, shape=shape, const_value=tensor))
    return ir.Model(ir.Graph([], [], nodes=[], initializers=initializers, opset_imports={"": 21}), ir_version=10), path


@pytest.mark.parametrize(
    ("places", "size", "padding"),
    [
        ([(0, 8), (8, 4)], 12, 0),
        ([(8, 4), (0, 8)], 12, 0),
        ([(0, 8), (4096, 8)], 4104, 4088),
        ([(0, 8), (65536, 8)], 65544, 65528),
        ([], 0, 0),
    ],
)
def test_tiled_files_are_accounted_for(tmp_path: Path, places: list[tuple[int, int]], size: int, padding: int) -> None:
    use = account_for_bytes(*model_of(tmp_path, places, size))
    assert (use.file_bytes, use.padding_bytes) == (size, padding)
    assert use.referenced_bytes == sum(length for _, length in places)


@pytest.mark.parametrize(
    ("places", "size", "message"),
    [
        ([(0, 8), (8, 8)], 12, "not whole: 't1'"),
        ([(0, 8), (4, 8)], 12, "overlapping or unused bytes before 't1'"),
        ([(0, 8), (16, 8)], 24, "unused bytes before 't1'"),
        ([(0, 8), (131072, 8)], 131080, "unused bytes before 't1'"),
        ([(0, 8)], 12, "4 bytes behind"),
    ],
)
def test_holes_overlaps_and_leftovers_are_named(
    tmp_path: Path, places: list[tuple[int, int]], size: int, message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        account_for_bytes(*model_of(tmp_path, places, size))


def test_a_tensor_in_another_file_is_refused(tmp_path: Path) -> None:
    model, path = model_of(tmp_path, [(0, 8)], 8)
    with pytest.raises(GraphError, match="not whole"):
        account_for_bytes(model, path.with_name("other.data"))


def test_reading_leaves_no_mapping_open(tmp_path: Path) -> None:
    model, _ = model_of(tmp_path, [(0, 8)], 8)
    x = ir.Value(name="x")
    node = ir.node("Add", [x, model.graph.initializers["t0"]])
    model.graph.append(node)
    np.testing.assert_array_equal(read_initializer(node, "t0"), np.zeros(2, np.float32))
    tensor = model.graph.initializers["t0"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


def test_no_output_goes_among_quantized_weights(tmp_path: Path) -> None:
    (tmp_path / "w" / "sub").mkdir(parents=True)
    (tmp_path / "w" / "recipe.json").touch()
    base = ModelDirectory(folder=tmp_path / "base", onnx_file=tmp_path / "base" / "model.onnx", has_genai_config=False)
    output = tmp_path / "w" / "sub" / "int4"
    assert Destination.from_path(output, base, overwrite=False).folder == output, "any tool may write a recipe.json"
    (tmp_path / "w" / "0000.layers.0.safetensors").touch()
    with pytest.raises(
        UserError, match=f"--output_path {output} lies among the quantized weights in {tmp_path / 'w'};"
    ):
        Destination.from_path(output, base, overwrite=False)


def test_a_component_without_session_options_keeps_those_of_the_decoder(tmp_path: Path) -> None:
    decoder = {"filename": "d/model.onnx", "session_options": {"provider_options": [{"cuda": {}}]}}
    config = tmp_path / "genai_config.json"
    config.write_text(json.dumps({"model": {"decoder": decoder, "vision": {"filename": "v/model.onnx"}}}))
    patch_genai_config(tmp_path, "v/int4.onnx", {"level": "4"}, "vision")
    model = json.loads(config.read_text())["model"]
    assert model["decoder"] == decoder
    assert model["vision"] == {
        "filename": "v/int4.onnx",
        "session_options": {"provider_options": [{"cuda": {}}], "level": "4"},
    }


def test_a_part_within_another_entry_gets_no_entry_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "genai_config.json"
    stages = [{"context": {"filename": "context.onnx"}, "iterator": {"filename": "iterator.onnx"}}]
    model = {"decoder": {"pipeline": stages}, "speech": {"adapter_filename": "adapter.onnx"}}
    config.write_text(json.dumps({"model": model}))
    patch_genai_config(tmp_path, "int4.onnx", {}, "context")
    patch_genai_config(tmp_path, "adapter_int4.onnx", {}, "speech_adapter")
    stages[0]["context"]["filename"] = "int4.onnx"
    model["speech"]["adapter_filename"] = "adapter_int4.onnx"
    assert json.loads(config.read_text())["model"] == model


@pytest.mark.parametrize(("component", "entries"), [("embedding", {"decoder", "embedding"}), ("lm_head", {"decoder"})])
def test_only_what_the_runtime_knows_becomes_an_entry(component: str, entries: set[str], tmp_path: Path) -> None:
    config = tmp_path / "genai_config.json"
    config.write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}))
    patch_genai_config(tmp_path, "part.onnx", {"level": "4"}, component)
    assert set(json.loads(config.read_text())["model"]) == entries


def test_no_output_goes_over_a_component_of_the_base(tmp_path: Path) -> None:
    for name in ("decoder", "vision"):
        (tmp_path / name).mkdir()
        ir.save(model_of(tmp_path / name, [], 0)[0], tmp_path / name / "model.onnx")
    for output in (tmp_path, tmp_path / "decoder", tmp_path / "vision/model.onnx"):
        with pytest.raises(UserError, match="would replace the base model"):
            Destination.from_path(output, locate_model(tmp_path / "decoder"), overwrite=True)
