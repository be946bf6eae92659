"""Make an ORT-GenAI base model: ``python -m scripts.build_base_model --output models/smollm2-135m-fp32``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from scripts.builder_input import as_builder_input
from scripts.checkpoints import (
    Checkpoint,
    FolderCheckpoint,
    GgufCheckpoint,
    HubCheckpoint,
    PackagedCheckpoint,
    dequantize_gguf,
    find_checkpoint,
)
from scripts.options import BuildConfig
from scripts.packaged_gguf import join_parts
from stages.atomic import whole_directory
from stages.cli import run_command
from stages.errors import UserError

_BUILDER = "onnxruntime_genai.models.builder"


def build(config: BuildConfig, console: Console) -> None:
    """Find the checkpoint, dequantize it where it is GGUF, and run the model builder on it."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise UserError('Building needs the package onnxruntime-genai: pip install -e ".[genai]"')
    checkpoint = find_checkpoint(config.source)
    with (
        whole_directory(config.output, overwrite=config.overwrite, option="--output") as output,
        tempfile.TemporaryDirectory(dir=config.output.absolute().parent, prefix=".build-") as scratch,
    ):
        model = _builder_arguments(checkpoint, Path(scratch), config, console)
        with console.status("onnxruntime-genai builds the graph"):
            _run_builder(model, output, Path(scratch) / "cache", config, console)
    console.print(f"base model: {config.output}", highlight=False)


def _builder_arguments(checkpoint: Checkpoint, scratch: Path, config: BuildConfig, console: Console) -> list[str]:
    """The builder's arguments that name the checkpoint."""
    match checkpoint:
        case HubCheckpoint(name=name):
            return ["-m", name]
        case FolderCheckpoint(folder=folder):
            pass
        case GgufCheckpoint(file=file):
            folder = _dequantized(file, scratch, config, console)
        case PackagedCheckpoint(source=source):
            file = scratch / f"{source}.gguf"
            join_parts(source, file)
            folder = _dequantized(file, scratch, config, console)
    return ["-i", str(as_builder_input(folder, scratch / "readable"))]


def _dequantized(file: Path, scratch: Path, config: BuildConfig, console: Console) -> Path:
    console.print(f"dequantizing {file.name}", highlight=False)
    folder = scratch / "checkpoint"
    dequantize_gguf(file, folder, keep_grid=config.keep_grid)
    return folder


def _run_builder(model: list[str], output: Path, cache: Path, config: BuildConfig, console: Console) -> None:
    command = [sys.executable, "-m", _BUILDER, *model, "-o", str(output), "-c", str(cache)]
    command += ["-p", config.precision, "-e", config.execution_provider]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        console.print(done.stdout, highlight=False, markup=False)
        raise UserError(
            f"onnxruntime-genai's builder failed on --source {config.source} with --precision {config.precision} and "
            f"--execution_provider {config.execution_provider}; its output is above."
        )


if __name__ == "__main__":
    run_command(BuildConfig, build, "python -m scripts.build_base_model")
