"""Write a large base model with random weights: ``python -m scripts.make_large_model --output models/llama-3-8b``.

For benchmarks of memory and time. Its words mean nothing; its graph, shapes and files are those of a real model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from export.save import save_model
from scripts.benchmarks.synthetic_llama import LlamaShape, random_llama
from scripts.options import LargeModelConfig
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.model.genai_config import GENAI_CONFIG
from stages.system.atomic import atomic_directory

_LOGGER = logging.getLogger(__name__)
SHAPES = {
    "llama-3-8b": LlamaShape(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_size=128, vocabulary=128256
    ),
    "llama-3.2-1b": LlamaShape(
        layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_size=64, vocabulary=128256
    ),
    "qwen2.5-1.5b": LlamaShape(
        layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_size=128, vocabulary=151936
    ),
}
_PRECISIONS = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}


def make_large_model(config: LargeModelConfig) -> Iterable[Section]:
    """Write the model folder, one tensor in memory at a time."""
    shape = SHAPES[config.shape]
    shape = shape if config.layers is None else replace(shape, layers=config.layers)
    model = random_llama(shape, _PRECISIONS[config.precision], config.seed)
    with atomic_directory(config.output, overwrite=config.overwrite, option="--output") as folder:
        save_model(model, folder, "model.onnx")
        (folder / GENAI_CONFIG).write_text(json.dumps(shape.genai_config(), indent=4) + "\n", encoding="utf-8")
    _LOGGER.info("base model: %s", config.output)
    return ()


if __name__ == "__main__":
    run_command(LargeModelConfig, make_large_model, "python -m scripts.make_large_model")
