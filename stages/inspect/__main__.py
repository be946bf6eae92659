"""Explain what lies in a folder: ``python -m stages.inspect MODEL_OR_CACHE_OR_WEIGHTS_OR_SWEEP``.

This folder has no __init__.py on purpose: a package of this name on the path would hide Python's own module
``inspect``; a folder without one never does.
"""

from __future__ import annotations

from pathlib import Path

from stages.cli import run_command
from stages.config import InspectConfig
from stages.errors import UserError
from stages.inspection.model_report import report_model
from stages.inspection.own_folders import is_sweep, report_cache, report_sweep, report_weights
from stages.inspection.tables import cache_table, model_table, sweep_table, weights_table
from stages.model_directory import locate_model
from stages.observe.cache import find_cache
from stages.quantized_store import RECIPE, open_store
from stages.report import quantization_table
from stages.screen import Screen

_SECTION = "inspection"
_SHOWN = 5


def inspect(config: InspectConfig, screen: Screen) -> None:
    """Show what ``config.path`` is.

    Raises:
        UserError: it isn't there, or nothing that this project knows.
    """
    path = config.path.absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist; pass a model, a calibration cache, quantized weights or a sweep.")
    if path.is_dir() and (cache := find_cache(path)) is not None:
        found = report_cache(cache)
        screen.show(_SECTION, cache_table(found), found)
    elif path.is_dir() and (path / RECIPE).is_file():
        _show_weights(path, screen)
    elif path.is_dir() and is_sweep(path):
        measured = report_sweep(path)
        screen.show(_SECTION, sweep_table(measured), measured)
    else:
        _show_model(path, screen)


def _show_weights(path: Path, screen: Screen) -> None:
    store = open_store(path)
    found = report_weights(store)
    seconds = sum(site.seconds for site in found.sites)
    screen.show(_SECTION, weights_table(found, quantization_table(store, seconds) if found.finished else None), found)


def _show_model(path: Path, screen: Screen) -> None:
    if path.is_dir() and not any(path.glob("*.onnx")):
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:_SHOWN]) or "nothing"
        raise UserError(
            f"{path} holds {held}: no .onnx file, no calibration cache (manifest.json), no quantized weights "
            "(recipe.json) and no sweep (*.run.json); pass a folder that has one."
        )
    found = report_model(locate_model(path))
    screen.show(_SECTION, model_table(found), found)


if __name__ == "__main__":
    run_command(InspectConfig, inspect, "python -m stages.inspect")
