"""Measure an export and a copy of as many bytes, both to the same disk and both flushed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from export.run import export_model
from export.save import Destination
from scripts.benchmarks.figures import WriteFigure
from stages.commands.quantize_options import ExportOptions
from stages.model.directory import locate_model
from stages.quantization.weights.store import open_store

_CHUNK = 1 << 24


def measure_writing(base: Path, weights: Path, scratch: Path) -> WriteFigure:
    """Write a model without verification, then copy its data file.

    Args:
        base: the model that the weights were made from.
        weights: the folder of its quantized weights.
        scratch: an empty folder on the disk that is measured.

    Raises:
        UserError: what ``python -m export`` raises.
    """
    directory, output = locate_model(base), scratch / "exported"
    options = ExportOptions(accuracy_level=None, verify="off")
    destination = Destination.from_path(output, directory, overwrite=True)
    started = time.perf_counter()
    export_model(directory, open_store(weights), destination, options)
    export_seconds = time.perf_counter() - started
    data = max(output.iterdir(), key=lambda file: file.stat().st_size)
    size = data.stat().st_size
    started = time.perf_counter()
    copy_file(data, scratch / "copied")
    copy_seconds = time.perf_counter() - started
    shutil.rmtree(output)
    (scratch / "copied").unlink()
    return WriteFigure(bytes=size, export_seconds=export_seconds, copy_seconds=copy_seconds)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, and flush them to the disk."""
    # Chunk by chunk: shutil.copyfile lets some file systems share the blocks, which copies nothing.
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(_CHUNK):
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
