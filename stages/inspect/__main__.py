"""Explain what lies in a folder: ``python -m stages.inspect MODEL_OR_CACHE_OR_WEIGHTS_OR_SWEEP``.

This folder has no __init__.py on purpose: a package of this name on the path would hide Python's own module
``inspect``; a folder without one never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.commands.evaluate_options import InspectConfig
from stages.commands.output import Section
from stages.commands.run import run_command
from stages.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN = 5


def command(config: InspectConfig) -> Iterator[Section]:
    """Explain what a folder or .onnx file holds.

    Raises:
        UserError: it doesn't exist, or this project doesn't know what it is.
    """
    record, table = _inspect(config.path.absolute(), every_runtime=config.printing.verbose)
    yield Section(name="inspection", table=table, record=record)


def _inspect(path: Path, *, every_runtime: bool) -> tuple[object, RenderableType | Callable[[str], RenderableType]]:
    """Return the record of a folder or .onnx file, and its table.

    Args:
        path: the folder or file.
        every_runtime: say of each runtime what it has against a model that was made for one of them.
    """
    from stages.calibration.cache import find_cache
    from stages.inspect.artifacts import is_sweep, report_cache, report_sweep
    from stages.inspect.tables import cache_table, sweep_table
    from stages.quantization.weights.store import RECIPE

    if not path.exists():
        raise UserError(f"{path} does not exist; pass a model, a calibration cache, quantized weights or a sweep.")
    if path.is_dir() and (cache := find_cache(path)) is not None:
        found = report_cache(cache)
        return found, partial(cache_table, found)
    if path.is_dir() and (path / RECIPE).is_file():
        return _inspect_weights(path)
    if path.is_dir() and is_sweep(path):
        measured = report_sweep(path)
        return measured, sweep_table(measured)
    return _inspect_model(path, every_runtime=every_runtime)


def _inspect_weights(path: Path) -> tuple[object, Callable[[str], RenderableType]]:
    from stages.inspect.artifacts import report_weights
    from stages.inspect.tables import weights_table
    from stages.quantization.weights.store import open_store
    from stages.quantization.weights.summary import quantization_table

    store = open_store(path)
    found = report_weights(store)
    details = quantization_table(store, store.seconds()) if found.finished else None
    return found, partial(weights_table, found, details)


def _inspect_model(path: Path, *, every_runtime: bool) -> tuple[object, Callable[[str], RenderableType]]:
    from stages.inspect.model import report_model
    from stages.inspect.tables import model_table
    from stages.model.directory import locate_model

    if path.is_dir() and not any([*path.glob("*.onnx"), *path.glob("*/*.onnx")]):
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:_SHOWN]) or "nothing"
        raise UserError(
            f"{path} has no .onnx file, calibration cache (manifest.json), quantized weights (recipe.json) or sweep "
            f"(*.run.json), but {held}; pass a folder that has one."
        )
    found = report_model(locate_model(path))
    return found, partial(model_table, found, every_runtime=every_runtime)


if __name__ == "__main__":
    run_command(InspectConfig, command, "python -m stages.inspect")
