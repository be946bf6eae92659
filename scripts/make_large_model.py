"""Write a large base model with random weights: ``python -m scripts.make_large_model --output models/llama-3-8b``.

For benchmarks of memory and time. Its words mean nothing; its graph, shapes and files are those of a real model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from export.save import save_model
from scripts.benchmarks.synthetic_llama import LlamaShape, random_llama
from scripts.options import LargeModelConfig, LargePrecision
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.model.genai_config import GENAI_CONFIG
from stages.system.atomic import atomic_directory

_LOGGER = logging.getLogger(__name__)
SHAPES = {
    "llama-3-70b": LlamaShape(
        layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_size=128, vocabulary=128256
    ),
    "llama-3-8b": LlamaShape(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_size=128, vocabulary=128256
    ),
    "llama-3.2-1b": LlamaShape(
        layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_size=64, vocabulary=128256
    ),
    "qwen2.5-1.5b": LlamaShape(
        layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_size=128, vocabulary=151936
    ),
    "gpt-oss-20b": LlamaShape(
        layers=24,
        hidden=2880,
        intermediate=2880,
        heads=64,
        kv_heads=8,
        head_size=64,
        vocabulary=201088,
        experts=32,
        chosen=4,
    ),
}
_DATA = "model.onnx.data"
_ALIGNMENT = 4096
_PRECISIONS = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}


def make_large_model(config: LargeModelConfig) -> Iterable[Section]:
    """Write the model folder, one tensor in memory at a time."""
    shape = SHAPES[config.shape]
    shape = shape if config.layers is None else replace(shape, layers=config.layers)
    with atomic_directory(config.output, overwrite=config.overwrite, option="--output") as folder:
        write_model(shape, folder, config.precision, config.seed, sparse=config.sparse)
    _LOGGER.info("base model: %s", config.output)
    return ()


def write_model(
    shape: LlamaShape,
    folder: Path,
    precision: LargePrecision,
    seed: int = 0,
    *,
    sparse: bool = False,
    provider: str | None = None,
) -> None:
    """Write graph, weights and genai_config.json into an empty folder.

    Args:
        shape: sizes.
        folder: where they go.
        precision: type of weights and activations.
        seed: of the weights.
        sparse: whether all weights are zero and take no room on the disk.
        provider: onnxruntime-genai's name of the provider that shall run it; None: the CPU's.
    """
    model = random_llama(shape, _PRECISIONS[precision], seed)
    if sparse:
        _reserve(model, folder)
    else:
        save_model(model, folder, "model.onnx")
    config = json.dumps(shape.genai_config(provider), indent=4)
    (folder / GENAI_CONFIG).write_text(f"{config}\n", encoding="utf-8")


def _reserve(model: ir.Model, folder: Path) -> None:
    """Save the graph, and a data file without contents: all weights are zero and take no room on the disk."""
    end = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _ALIGNMENT:
            value.const_value = ir.ExternalTensor(
                _DATA,
                end,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=folder,
            )
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    with (folder / _DATA).open("wb") as data:
        data.truncate(end)
    ir.save(model, folder / "model.onnx")


if __name__ == "__main__":
    run_command(LargeModelConfig, make_large_model, "python -m scripts.make_large_model")
