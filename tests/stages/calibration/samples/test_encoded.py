"""What a decoder reads of sounds: its encoder's outputs, and the tokens of a transcript or of its own writing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stages.calibration.samples.encoded import PackageEncoder, encoded_samples, find_encoder
from stages.calibration.samples.samples import ComputedSample, sample_digest
from stages.commands.calibrate_options import TextOptions
from stages.errors import UserError
from stages.model.directory import ModelDirectory, locate_model
from stages.model.load import load_graph
from stages.runtime.graph_inputs import fed_values
from tests.support.graphs import TinyGraph

MELS, HIDDEN, VOCABULARY = 4, 8, 20
CONTEXT = 6


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Save an encoder of sounds [b, 4, frames], and a decoder that adds its mean to each token's embedding."""
    generator = np.random.default_rng(0)
    encoder = TinyGraph()
    sound = encoder.input("mel", TensorProto.FLOAT, ["b", MELS, "frames"])
    turned = encoder.node("Transpose", [sound], ["turned"], {"perm": [0, 2, 1]})
    encoder.linear(turned, generator.standard_normal((MELS, HIDDEN)).astype(np.float32), "hidden_1")
    encoder.output("hidden_1", TensorProto.FLOAT, ["b", "frames", HIDDEN])
    encoder.save(tmp_path / "encoder")
    decoder = TinyGraph()
    tokens = decoder.input("input_ids", TensorProto.INT64, ["b", "s"])
    heard = decoder.input("cross_1", TensorProto.FLOAT, ["b", "frames", HIDDEN])
    table = decoder.constant("table", generator.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    mean = decoder.node("ReduceMean", [heard, decoder.constant("axis", np.array([1]))], ["mean"], {"keepdims": 1})
    summed = decoder.node("Add", [decoder.node("Gather", [table, tokens], ["embedded"]), mean], ["summed"])
    decoder.linear(summed, generator.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32), "logits")
    decoder.output("logits", TensorProto.FLOAT, ["b", "s", VOCABULARY])
    decoder.save(tmp_path / "decoder")
    model = {
        "decoder_start_token_id": 3, "eos_token_id": [VOCABULARY + 1], "context_length": CONTEXT,
        "encoder": {"filename": "encoder/model.onnx", "outputs": {"cross_present_key_names": "hidden_%d"}},
        "decoder": {"filename": "decoder/model.onnx", "inputs": {"cross_past_key_names": "cross_%d"}},
    }  # fmt: skip
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    return tmp_path


@pytest.fixture
def directory(package: Path) -> ModelDirectory:
    return locate_model(package)


@pytest.fixture
def encoder(directory: ModelDirectory) -> PackageEncoder:
    found = find_encoder(load_graph(directory), directory)
    assert found is not None
    return found


def made(
    sounds: list[Path], features: list[np.ndarray], encoder: PackageEncoder, directory: ModelDirectory
) -> list[ComputedSample]:
    own = iter([{"mel": each} for each in features])
    found = list(encoded_samples(sounds, own, encoder, TextOptions(), load_graph(directory), directory))
    assert all(isinstance(each, ComputedSample) for each in found)
    return found  # type: ignore[return-value]


def test_outputs_go_to_inputs_by_the_names_in_the_packages_description(
    package: Path, encoder: PackageEncoder, directory: ModelDirectory
) -> None:
    assert encoder.outputs == {"cross_1": "hidden_1"}
    assert list(fed_values(encoder.graph)) == ["mel"]
    inner = locate_model(package, "encoder")
    assert find_encoder(load_graph(inner), inner) is None
    content = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    del content["model"]["encoder"]
    (package / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert find_encoder(load_graph(directory), directory) is None


def test_a_sample_holds_what_the_encoder_makes_and_what_the_decoder_writes(
    package: Path, encoder: PackageEncoder, directory: ModelDirectory
) -> None:
    """The oracle runs both graphs by hand, token by token."""
    features = [np.random.default_rng(seed).standard_normal((1, MELS, 5)).astype(np.float32) for seed in (1, 2)]
    samples = made([package / "a.wav", package / "b.wav"], features, encoder, directory)
    hear = ort.InferenceSession(package / "encoder" / "model.onnx", providers=["CPUExecutionProvider"])
    write = ort.InferenceSession(package / "decoder" / "model.onnx", providers=["CPUExecutionProvider"])
    for feature, sample in zip(features, samples, strict=True):
        (hidden,) = hear.run(None, {"mel": feature})
        tokens = [3]
        while len(tokens) < CONTEXT:
            (logits,) = write.run(None, {"input_ids": np.array([tokens]), "cross_1": hidden})
            tokens.append(int(logits[0, -1].argmax()))
        assert set(sample) == {"input_ids", "cross_1"}
        np.testing.assert_array_equal(sample["input_ids"], [tokens])
        np.testing.assert_array_equal(sample["cross_1"], hidden)
    assert len({sample_digest(sample) for sample in samples}) == 2


def test_writing_ends_with_the_token_that_ends_texts(
    package: Path, encoder: PackageEncoder, directory: ModelDirectory
) -> None:
    feature = np.random.default_rng(1).standard_normal((1, MELS, 5)).astype(np.float32)
    (sample,) = made([package / "a.wav"], [feature], encoder, directory)
    second = int(sample["input_ids"][0, 1])
    content = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    content["model"]["eos_token_id"] = second
    (package / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    (shorter,) = made([package / "a.wav"], [feature], encoder, directory)
    np.testing.assert_array_equal(shorter["input_ids"], [[3, second]])
    assert sample_digest(shorter) == sample_digest(sample), "a sample is told by its sound"


def test_a_transcript_beside_the_sound_is_taken(
    package: Path, encoder: PackageEncoder, directory: ModelDirectory, tiny_tokenizer: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.save_pretrained(package)
    (package / "a.txt").write_text(" a b\n", encoding="utf-8")
    feature = np.zeros((1, MELS, 5), np.float32)
    (sample,) = made([package / "a.wav"], [feature], encoder, directory)
    np.testing.assert_array_equal(sample["input_ids"], [[3, *tokenizer("a b")["input_ids"]][:CONTEXT]])
    (package / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"a\.txt can't be read .*; save it as UTF-8"):
        made([package / "a.wav"], [feature], encoder, directory)


def test_without_a_first_token_nothing_is_guessed(
    package: Path, encoder: PackageEncoder, directory: ModelDirectory
) -> None:
    content = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    del content["model"]["decoder_start_token_id"]
    (package / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"write it into genai_config\.json as model\.decoder_start_token_id"):
        made([package / "a.wav"], [np.zeros((1, MELS, 5), np.float32)], encoder, directory)
