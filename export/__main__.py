"""Write saved quantized weights into the base model again, without a search: ``python -m export``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.commands.output import Section
from stages.commands.quantize_options import ExportConfig
from stages.commands.run import run_command
from stages.errors import CacheMismatch

if TYPE_CHECKING:
    from export.run import ExportSummary


def command(config: ExportConfig) -> Iterator[Section]:
    """Export, and yield what was written."""
    from export.summary import export_table

    exported = export(config)
    yield Section(name="export", table=export_table(exported), record=exported)


def export(config: ExportConfig) -> ExportSummary:
    """Write saved quantized weights into the base graph again, without searching.

    Raises:
        UserError: the weights are incomplete or another model's, or the output exists or fails a check.
    """
    from export.card.record import command_line
    from export.run import export_model
    from export.save import Destination
    from stages.model.directory import locate_model
    from stages.model.load import fingerprint_model, load_graph
    from stages.quantization.weights.store import open_store
    from stages.records.formats import WeightForm
    from stages.system.lock import exclusive

    base = locate_model(config.onnx_path, config.component)
    store = open_store(config.weights_path)
    if config.weight_operator is not None:
        recipe = replace(store.recipe, weight_form=WeightForm(config.weight_operator))
        store = replace(store, recipe=recipe)
    destination = Destination.from_path(config.output_path, base, overwrite=config.overwrite)
    model = load_graph(base)
    if fingerprint_model(base, model) != store.recipe.model_fingerprint:
        raise CacheMismatch(
            f"The weights in {store.folder} were made from another model than {base.onnx_file}; pass the base model "
            "that stages.quantize read, and the same --component."
        )
    command = command_line("genai-quant export", config)
    with exclusive(destination.folder, option="--output_path"):
        return export_model(base, store, destination, config.export_options, model, command=command)


if __name__ == "__main__":
    run_command(ExportConfig, command, "python -m export")
