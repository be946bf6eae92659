"""Make an ORT-GenAI base model: ``genai-quant base-model SOURCE OUTPUT``."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Group
from rich.text import Text

from export.card.record import MODEL_CARD, licence_of
from genai_quant.base_models.checkpoints import (
    FolderCheckpoint,
    GgufCheckpoint,
    HubCheckpoint,
    PackagedCheckpoint,
    as_builder_input,
    dequantize_gguf,
    download,
    find_checkpoint,
)
from genai_quant.base_models.options import BaseModelConfig, BuilderProvider, Precision
from genai_quant.base_models.packaged_gguf import PACKAGED, gguf_file
from stages.commands.output import Section
from stages.commands.progress import status
from stages.errors import UserError
from stages.model.directory import locate_model
from stages.model.sizes import model_bytes
from stages.system.atomic import atomic_directory
from stages.system.lock import exclusive

_LOGGER = logging.getLogger(__name__)
_BUILDER = "onnxruntime_genai.models.builder"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What was built."""

    folder: Path
    source: str
    precision: Precision
    execution_provider: BuilderProvider
    bytes: int
    """Of the graph and its weights."""
    weights: str
    """How they differ from the model's own; often empty."""


def build(config: BaseModelConfig) -> Iterator[Section]:
    """Find the checkpoint, dequantize it where it is GGUF, and run the model builder on it."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise UserError(
            "A base model is built by the package onnxruntime-genai, which isn't installed: "
            'pip install "genai-quant[genai]"'
        )
    with (
        exclusive(config.output, option="OUTPUT"),
        atomic_directory(config.output, overwrite=config.overwrite, option="OUTPUT") as output,
        tempfile.TemporaryDirectory(dir=config.output.absolute().parent, prefix=".build-") as scratch,
    ):
        checkpoint, weights = checkpoint_folder(config.source, Path(scratch), keep_grid=config.keep_grid)
        folder = as_builder_input(checkpoint, Path(scratch) / "readable")
        with status("onnxruntime-genai builds the graph"):
            _run_builder(folder, output, Path(scratch) / "cache", config)
        write_card(folder, output, config.source, weights)
    built = BaseModel(
        folder=config.output,
        source=config.source,
        precision=config.built_precision,
        execution_provider=config.execution_provider,
        bytes=model_bytes(locate_model(config.output)),
        weights=weights,
    )
    yield Section(name="base_model", table=_lines(built), record=built)
    if built.precision != "int4":
        _LOGGER.info("next: stages.quantize %s OUTPUT --evaluate", config.output)


def write_card(checkpoint: Path, output: Path, source: str, weights: str) -> None:
    """Write a model card that names the hub's model and its licence, from where the quantized model's card has them.

    Args:
        checkpoint: what the builder read.
        output: the base model.
        source: as it was typed.
        weights: how they differ from the model's own; may be empty.
    """
    found = find_checkpoint(source)
    name = found.name if isinstance(found, HubCheckpoint) else PACKAGED[source].hub_name if source in PACKAGED else ""
    head = ({"base_model": name} if name else {}) | licence_of(checkpoint / MODEL_CARD)
    if head or weights:
        yaml_head = f"---\n{yaml.safe_dump(head)}---\n\n" if head else ""
        changed = f"\nWeights: {weights}.\n" if weights else ""
        text = f"{yaml_head}Built by genai-quant base-model from {source}.\n{changed}"
        (output / MODEL_CARD).write_text(text, encoding="utf-8")


def _lines(built: BaseModel) -> Group:
    size = f"{built.bytes / 1e6:.1f} MB"
    line = f"base model: {built.folder} ({built.precision} for {built.execution_provider}, {size})"
    weights = [Text(f"weights: {built.weights}")] if built.weights else []
    return Group(Text(line, no_wrap=True), *weights)


def checkpoint_folder(source: str, scratch: Path, *, keep_grid: bool) -> tuple[Path, str]:
    """Return a Hugging Face folder of the checkpoint, and how its weights differ from the model's own, in words.

    Args:
        source: SOURCE.
        scratch: where the folder is made if the checkpoint is in another form.
        keep_grid: leave a GGUF's weights on their 4-bit grid.

    Raises:
        UserError: the checkpoint can't be found or read, or its weights can't be moved off their grid.
    """
    match find_checkpoint(source):
        case HubCheckpoint(name=name):
            return download(name), ""
        case FolderCheckpoint(folder=folder):
            return folder, ""
        case GgufCheckpoint(file=file):
            return _dequantized(file, scratch, keep_grid=keep_grid)
        case PackagedCheckpoint(source=packaged):
            return _dequantized(gguf_file(packaged, scratch), scratch, keep_grid=keep_grid)


def _dequantized(file: Path, scratch: Path, *, keep_grid: bool) -> tuple[Path, str]:
    folder = scratch / "checkpoint"
    with status(f"dequantizing {file.name}"):
        return folder, dequantize_gguf(file, folder, keep_grid=keep_grid)


def _run_builder(folder: Path, output: Path, cache: Path, config: BaseModelConfig) -> None:
    # -P: a file torch.py in the current folder is not PyTorch.
    command = [sys.executable, "-P", "-m", _BUILDER, "-i", str(folder), "-o", str(output), "-c", str(cache)]
    command += ["-p", config.built_precision, "-e", config.execution_provider]
    command += ["--extra_options", *config.extra_options] if config.extra_options else []
    # The builder names a commit as its own: that of any repository around its package, such as the user's project.
    environment = os.environ | {"GIT_DIR": os.devnull}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        _LOGGER.warning("output of onnxruntime-genai's builder:\n%s", done.stdout)
        raise UserError(
            f"onnxruntime-genai's builder failed on SOURCE {config.source} with --precision {config.built_precision} "
            f"and --execution_provider {config.execution_provider}; its output is above."
        )
