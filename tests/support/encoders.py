"""Tiny encoders, built node by node: of images, of texts; and files to run them on."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
from onnx import TensorProto

from tests.support.graphs import TinyGraph

HIDDEN, SIDE, PATCH, CHANNELS = 32, 16, 4, 3
PATCHES = (SIDE // PATCH) ** 2


def random_weight(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return a weight [rows, columns] that keeps the size of what it multiplies."""
    return (generator.standard_normal((rows, columns)) * rows**-0.5).astype(np.float32)


def _mlp(graph: TinyGraph, x: str, name: str, generator: np.random.Generator) -> str:
    gains = np.exp(generator.standard_normal(HIDDEN)).astype(np.float32)
    zeros = np.zeros(HIDDEN, np.float32)
    normed = graph.node(
        "LayerNormalization", [x, graph.constant(f"{name}.g", gains), graph.constant(f"{name}.b", zeros)],
        [f"{name}/normed"],
    )  # fmt: skip
    up = graph.linear(normed, random_weight(generator, HIDDEN, 2 * HIDDEN), f"{name}/up")
    hidden = graph.node("Relu", [up], [f"{name}/hidden"])
    down = graph.linear(hidden, random_weight(generator, 2 * HIDDEN, HIDDEN), f"{name}/down")
    return graph.node("Add", [x, down], [f"{name}/out"])


def save_vision(folder: Path, *, file: str = "model.onnx", dtype: int = TensorProto.FLOAT) -> Path:
    """Save an encoder of images [batch, 3, 16, 16] as 4 x 4 patches: a Conv, two MLPs, a projector."""
    generator = np.random.default_rng(0)
    graph = TinyGraph()
    pixels = graph.input("pixel_values", dtype, ["batch", CHANNELS, SIDE, SIDE])
    images = pixels if dtype == TensorProto.FLOAT else graph.node("Cast", [pixels], ["wide"], {"to": TensorProto.FLOAT})
    kernel = random_weight(generator, HIDDEN, CHANNELS * PATCH * PATCH).reshape(HIDDEN, CHANNELS, PATCH, PATCH)
    conv = graph.node(
        "Conv", [images, graph.constant("patch.weight", kernel)], ["patches"],
        {"kernel_shape": [PATCH, PATCH], "strides": [PATCH, PATCH]},
    )  # fmt: skip
    flat = graph.node("Reshape", [conv, graph.constant("shape", np.array([0, HIDDEN, PATCHES]))], ["flat"])
    x = graph.node("Transpose", [flat], ["tokens"], {"perm": [0, 2, 1]})
    for layer in range(2):
        x = _mlp(graph, x, f"layers.{layer}", generator)
    graph.linear(x, random_weight(generator, HIDDEN, HIDDEN), "image_features")
    graph.output("image_features", TensorProto.FLOAT, ["batch", PATCHES, HIDDEN])
    return _saved(graph, folder, file)


def save_text_encoder(folder: Path, vocabulary: int, *, length: int | str = "length") -> Path:
    """Save an encoder of texts: embeddings, attention that a mask restricts, an MLP, hidden states of each token."""
    generator = np.random.default_rng(1)
    graph = TinyGraph()
    tokens = graph.input("input_ids", TensorProto.INT64, ["batch", length])
    mask = graph.input("attention_mask", TensorProto.INT64, ["batch", length])
    table = generator.standard_normal((vocabulary, HIDDEN)).astype(np.float32)
    x = graph.node("Gather", [graph.constant("embed", table), tokens], ["embedded"])
    query, key, value = (graph.linear(x, random_weight(generator, HIDDEN, HIDDEN), f"attn/{name}") for name in "qkv")
    turned = graph.node("Transpose", [key], ["key/turned"], {"perm": [0, 2, 1]})
    products = graph.node("MatMul", [query, turned], ["products"])
    scores = graph.node("Mul", [products, graph.constant("scale", np.full(1, HIDDEN**-0.5, np.float32))], ["scores"])
    wide = graph.node("Cast", [mask], ["mask/float"], {"to": TensorProto.FLOAT})
    off = graph.node("Sub", [wide, graph.constant("one", np.ones(1, np.float32))], ["mask/off"])
    far = graph.node("Mul", [off, graph.constant("far", np.full(1, 1e4, np.float32))], ["mask/far"])
    added = graph.node("Unsqueeze", [far, graph.constant("axis", np.array([1]))], ["mask/added"])
    shares = graph.node("Softmax", [graph.node("Add", [scores, added], ["masked"])], ["shares"], {"axis": -1})
    mixed = graph.node("Add", [x, graph.node("MatMul", [shares, value], ["mixed"])], ["summed"])
    out = _mlp(graph, mixed, "layers.0", generator)
    graph.node("Identity", [out], ["last_hidden_state"])
    graph.output("last_hidden_state", TensorProto.FLOAT, ["batch", length, HIDDEN])
    return _saved(graph, folder, "model.onnx")


def _saved(graph: TinyGraph, folder: Path, file: str) -> Path:
    made = graph.save(folder)
    target = folder / file
    if made != target:
        made.rename(target)
    return target


def save_images(folder: Path, count: int) -> Path:
    """Save smooth colour images, each another."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(2)
    for number in range(count):
        pixels = generator.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def save_sounds(folder: Path, count: int, rate: int = 16000) -> Path:
    """Save half a second of tones each, as 16-bit PCM."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(3)
    seconds = np.arange(rate // 2) / rate
    for number in range(count):
        tones = sum(np.sin(2 * np.pi * each * seconds) for each in generator.integers(100, 4000, 5)) / 5
        save_sound(folder / f"{number}.wav", (tones * 20000).astype("<i2"), rate)
    return folder


def save_sound(file: Path, numbers: np.ndarray, rate: int) -> None:
    """Save PCM numbers [T] or [T, channels]."""
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1 if numbers.ndim == 1 else numbers.shape[1])
        sound.setsampwidth(numbers.dtype.itemsize)
        sound.setframerate(rate)
        sound.writeframes(numbers.tobytes())


def save_image_processor(folder: Path) -> None:
    """Save the description of transformers' CLIP processor for 16 x 16 images."""
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")


def add_vision(package: Path) -> None:
    """Add the encoder of images, with its processor, to an ORT-GenAI folder, as a component of its own."""
    save_vision(package / "vision", file="vision.onnx")
    save_image_processor(package)
    path = package / "genai_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vision"] = {
        "filename": "vision/vision.onnx",
        "inputs": {"pixel_values": "pixel_values"},
        "outputs": {"image_features": "image_features"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def save_multimodal(folder: Path, tokenizer: Path, vocabulary: int) -> Path:
    """Save a package of type gemma3 whose images onnxruntime-genai's processor reads; its decoder is a projection."""
    generator = np.random.default_rng(9)
    save_vision(folder / "vision", file="vision.onnx")
    embedding = TinyGraph()
    tokens = embedding.input("input_ids", TensorProto.INT64, ["batch", "length"])
    embedding.input("image_features", TensorProto.FLOAT, ["rows", HIDDEN])
    table = embedding.constant("table", generator.standard_normal((vocabulary, HIDDEN)).astype(np.float32))
    embedding.node("Gather", [table, tokens], ["inputs_embeds"])
    embedding.output("inputs_embeds", TensorProto.FLOAT, ["batch", "length", HIDDEN])
    embedding.save(folder / "embedding")
    decoder = TinyGraph()
    embedded = decoder.input("inputs_embeds", TensorProto.FLOAT, ["batch", "length", HIDDEN])
    decoder.linear(embedded, random_weight(generator, HIDDEN, vocabulary), "logits")
    decoder.output("logits", TensorProto.FLOAT, ["batch", "length", vocabulary])
    decoder.save(folder / "decoder")
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    steps = {
        "DecodeImage": {"color_space": "RGB"},
        "Resize": {"interpolation": "CUBIC", "width": SIDE, "height": SIDE, "keep_aspect_ratio": 0},
        "Rescale": {},
        "Normalize": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "Permute3D": {"dims": [2, 0, 1]},
    }
    transforms = [{"operation": {"name": kind, "type": kind, "attrs": attrs}} for kind, attrs in steps.items()]
    processor = {"processor": {"name": "image_processing", "transforms": transforms}}
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    sizes = {"head_size": 16, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {"filename": "vision/vision.onnx", "config_filename": "processor_config.json"}
    model = {
        "type": "gemma3", "vocab_size": vocabulary, "context_length": 64,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        "decoder": {"filename": "decoder/model.onnx", "num_key_value_heads": 2, **sizes},
        "embedding": {"filename": "embedding/model.onnx"},
        "vision": {**vision, "inputs": {"pixel_values": "pixel_values"}},
    }  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}), "utf-8")
    return folder
