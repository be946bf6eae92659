"""What processors make of files goes to the graph's inputs by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from stages.calibration.samples.processors import Processor, find_processor, named_for_graph, read_media
from stages.errors import UserError
from stages.model.directory import ModelDirectory, locate_model
from tests.support.encoders import save_image_processor, save_images, save_multimodal, save_sounds, save_vision
from tests.support.tiny_models import VOCABULARY


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def directory(folder: Path, **names: str) -> ModelDirectory:
    return ModelDirectory(folder=folder, onnx_file=folder / "x.onnx", has_genai_config=False, input_names=names)


@pytest.mark.parametrize(
    ("made", "names", "graph"),
    [
        ("pixel_values", {}, "pixel_values"),
        ("pixel_values", {"pixel_values": "images"}, "images"),
        ("input_features", {"audio_features": "mel"}, "mel"),
        ("input_features", {}, "audio_features"),
        ("input_features", {}, "anything"),
    ],
)
def test_an_array_finds_its_input(made: str, names: dict[str, str], graph: str, tmp_path: Path) -> None:
    array = np.zeros((1, 3, 4))
    found = named_for_graph({made: array, "mask": np.zeros((1, 4))}, directory(tmp_path, **names), {
        graph: value(graph, "b", 3, "t")
    })  # fmt: skip
    assert {name: each is array for name, each in found.items()} == {graph: True}


def test_two_arrays_for_one_input_are_not_guessed(tmp_path: Path) -> None:
    made = {"one": np.zeros((1, 4)), "two": np.zeros((1, 4))}
    assert named_for_graph(made, directory(tmp_path), {"x": value("x", "b", "t")}) == {}
    processor = Processor(title="P", read=lambda _: made)
    with pytest.raises(UserError, match=r"P makes one, two of f\.png, and the graph takes x"):
        list(read_media([Path("f.png")], processor, directory(tmp_path), {"x": value("x", "b", "t")}))


def test_an_image_goes_through_the_processor_in_the_models_folder(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers import AutoImageProcessor

    save_vision(tmp_path / "model")
    save_image_processor(tmp_path / "model")
    files = sorted(save_images(tmp_path / "images", 2).iterdir())
    base = locate_model(tmp_path / "model")
    processor = find_processor(base, "images", None, trust_remote_code=False)
    inputs = {"pixel_values": value("pixel_values", "batch", 3, 16, 16)}
    found = list(read_media(files, processor, base, inputs))
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "model")
    for file, sample in zip(files, found, strict=True):
        expected = theirs(images=[Image.open(file)], return_tensors="pt")["pixel_values"].numpy()
        np.testing.assert_array_equal(sample["pixel_values"], expected)
        assert expected.shape == (1, 3, 16, 16)


def test_an_image_goes_through_onnxruntime_genai_where_the_package_describes_its_processor(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    """The oracle is the arithmetic that processor_config.json describes, on an image of one colour."""
    pytest.importorskip("onnxruntime_genai")
    image = pytest.importorskip("PIL.Image")
    package = save_multimodal(tmp_path / "package", tiny_tokenizer, VOCABULARY)
    image.new("RGB", (24, 20), (255, 51, 0)).save(tmp_path / "x.png")
    base = locate_model(package, "vision")
    processor = find_processor(base, "images", None, trust_remote_code=False)
    assert processor.title == "onnxruntime-genai's"
    inputs = {"pixel_values": value("pixel_values", "batch", 3, 16, 16)}
    (sample,) = read_media([tmp_path / "x.png"], processor, base, inputs)
    expected = np.broadcast_to(np.array([1, -0.6, -1]).reshape(1, 3, 1, 1), (1, 3, 16, 16))
    np.testing.assert_allclose(sample["pixel_values"], expected, atol=1e-6)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png can't be read as an image"):
        processor.read(tmp_path / "broken.png")


def test_sounds_go_through_a_feature_extractor_at_its_rate(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
    (file,) = save_sounds(tmp_path / "sounds", 1, rate=32000).iterdir()
    processor = find_processor(directory(tmp_path), "sounds", None, trust_remote_code=False)
    inputs = {"audio_features": value("audio_features", "b", 8, 100)}
    (sample,) = read_media([file], processor, directory(tmp_path), inputs)
    assert sample["audio_features"].shape == (1, 8, 100)


def test_a_missing_or_damaged_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"describes no processor of images .*--model_name, or pass \.npz"):
        find_processor(directory(tmp_path), "images", None, trust_remote_code=False)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="No processor of images can be loaded"):
        find_processor(directory(tmp_path), "images", None, trust_remote_code=False)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    save_image_processor(tmp_path)
    (tmp_path / "x.png").write_bytes(b"no image")
    processor = find_processor(directory(tmp_path), "images", None, trust_remote_code=False)
    with pytest.raises(UserError, match=r"x\.png can't be read"):
        processor.read(tmp_path / "x.png")
