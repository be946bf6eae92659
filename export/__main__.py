"""Write saved quantized weights into the base model again: ``python -m export``."""

from __future__ import annotations

from dataclasses import replace

from export.export_model import Destination, export_model
from export.tables import export_table
from stages.base_graph import load_graph
from stages.cli import run_command
from stages.config import ExportConfig
from stages.errors import CacheMismatch
from stages.fingerprint import fingerprint_model
from stages.model_directory import locate_model
from stages.quantized_store import open_store
from stages.records import WeightForm
from stages.screen import Screen


def export(config: ExportConfig, screen: Screen) -> None:
    """Export the weights that ``config`` describes and print what was written."""
    base = locate_model(config.onnx_path)
    store = open_store(config.weights_path)
    if config.weight_operator is not None:
        recipe = replace(store.recipe, weight_form=WeightForm(config.weight_operator))
        store = replace(store, recipe=recipe)
    destination = Destination.from_path(config.output_path, base, overwrite=config.overwrite)
    model = load_graph(base)
    if fingerprint_model(base, model) != store.recipe.model_fingerprint:
        raise CacheMismatch(
            f"The weights in {store.folder} were made from another model than {base.onnx_file}; pass the base model "
            "that stages.quantize read."
        )
    exported = export_model(base, store, destination, config.export_options, screen.console, model)
    screen.show("export", export_table(exported), exported)


if __name__ == "__main__":
    run_command(ExportConfig, export, "python -m export")
