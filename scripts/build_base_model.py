"""Make an ORT-GenAI base model: ``python -m scripts.build_base_model --output models/smollm2-135m-fp32``."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from scripts.base_models.checkpoints import (
    Checkpoint,
    FolderCheckpoint,
    GgufCheckpoint,
    HubCheckpoint,
    PackagedCheckpoint,
    as_builder_input,
    dequantize_gguf,
    find_checkpoint,
)
from scripts.base_models.packaged_gguf import join_parts
from scripts.options import BuildConfig
from stages.commands.output import Section
from stages.commands.progress import status
from stages.commands.run import run_command
from stages.errors import UserError
from stages.system.atomic import atomic_directory

_LOGGER = logging.getLogger(__name__)
_BUILDER = "onnxruntime_genai.models.builder"


def build(config: BuildConfig) -> Iterable[Section]:
    """Find the checkpoint, dequantize it where it is GGUF, and run the model builder on it."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise UserError('Building needs the package onnxruntime-genai: pip install -e ".[genai]"')
    checkpoint = find_checkpoint(config.source)
    with (
        atomic_directory(config.output, overwrite=config.overwrite, option="--output") as output,
        tempfile.TemporaryDirectory(dir=config.output.absolute().parent, prefix=".build-") as scratch,
    ):
        model = _builder_arguments(checkpoint, Path(scratch), config)
        with status("onnxruntime-genai builds the graph"):
            _run_builder(model, output, Path(scratch) / "cache", config)
    _LOGGER.info("base model: %s", config.output)
    return ()


def _builder_arguments(checkpoint: Checkpoint, scratch: Path, config: BuildConfig) -> list[str]:
    """Return the builder's arguments that name the checkpoint."""
    match checkpoint:
        case HubCheckpoint(name=name):
            return ["-m", name]
        case FolderCheckpoint(folder=folder):
            pass
        case GgufCheckpoint(file=file):
            folder = _dequantized(file, scratch, config)
        case PackagedCheckpoint(source=source):
            file = scratch / f"{source}.gguf"
            join_parts(source, file)
            folder = _dequantized(file, scratch, config)
    return ["-i", str(as_builder_input(folder, scratch / "readable"))]


def _dequantized(file: Path, scratch: Path, config: BuildConfig) -> Path:
    _LOGGER.info("dequantizing %s", file.name)
    folder = scratch / "checkpoint"
    dequantize_gguf(file, folder, keep_grid=config.keep_grid)
    return folder


def _run_builder(model: list[str], output: Path, cache: Path, config: BuildConfig) -> None:
    command = [sys.executable, "-m", _BUILDER, *model, "-o", str(output), "-c", str(cache)]
    command += ["-p", config.precision, "-e", config.execution_provider]
    command += ["--extra_options", *config.extra_options] if config.extra_options else []
    # The builder names a commit as its own: that of any repository around its package, such as the user's project.
    environment = os.environ | {"GIT_DIR": os.devnull}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        _LOGGER.warning("output of onnxruntime-genai's builder:\n%s", done.stdout)
        raise UserError(
            f"onnxruntime-genai's builder failed on --source {config.source} with --precision {config.precision} and "
            f"--execution_provider {config.execution_provider}; its output is above."
        )


if __name__ == "__main__":
    run_command(BuildConfig, build, "python -m scripts.build_base_model")
