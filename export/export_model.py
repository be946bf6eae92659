"""Export: rewrite the base graph, write the output folder whole, and verify it before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from export.embedding import TableOutcome, table_outcomes
from export.fold import FoldOutcome
from export.rewrite import RewriteResult, rewrite
from export.save import (
    Destination,
    copy_side_files,
    data_name,
    patch_genai_config,
    save_model,
)
from export.verify import VerifyReport, save_report, verify
from stages.atomic import whole_directory
from stages.base_graph import external_files, load_graph
from stages.config import AccuracyLevel, ExportOptions
from stages.errors import UserError
from stages.model_directory import ModelDirectory
from stages.quantized_store import QuantizedStore
from stages.records import UnreachedWeights, WeightForm

__all__ = ["Destination", "ExportSummary", "export_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What was written, and what a person should know about it."""

    onnx_file: Path
    bytes_before: int
    """Base graph and its external data."""
    bytes_after: int
    folds: tuple[FoldOutcome, ...]
    kept: tuple[tuple[str, str], ...]
    """(site, why) for each site that stayed as it was."""
    report: VerifyReport | None
    """None where verification was off."""
    notes: tuple[str, ...] = ()
    tables: tuple[TableOutcome, ...] = ()
    unreached: tuple[UnreachedWeights, ...] = ()
    """Large weights that no MatMul or Gemm reads."""


def export_model(
    base: ModelDirectory, store: QuantizedStore, destination: Destination, options: ExportOptions, console: Console
) -> ExportSummary:
    """Write ``store``'s weights into a copy of the ``base`` model directory.

    Raises:
        GraphError: the base can't be read or converted, isn't the one of the weights, or the output failed a check.
        RecipeError: ``store`` isn't complete.
        UserError: the destination can't be used or written.
    """
    destination.require_apart_from(store.folder, "the quantized weights")
    model = load_graph(base)
    result = rewrite(model, store, options.accuracy_level)
    try:
        with whole_directory(destination.folder, overwrite=destination.overwrite, option=destination.option) as scratch:
            save_model(result.model, scratch, destination.onnx_name, console)
            copy_side_files(base, model, scratch, destination.onnx_name)
            notes = _configure(base, scratch, destination, _session_level(store, options))
            report = _verify(scratch / destination.onnx_name, result, base, options, console)
    except OSError as error:
        raise UserError(
            f"{destination.option} {destination.folder} can't be written ({error.strerror or error}); free space or "
            "choose another folder."
        ) from error
    if report is not None:
        save_report(report, store.folder)
    return ExportSummary(
        onnx_file=destination.onnx_file,
        bytes_before=_size(base.onnx_file, *external_files(model)),
        bytes_after=_size(destination.onnx_file, destination.folder / data_name(destination.onnx_name)),
        folds=result.folds,
        kept=store.recipe.kept,
        report=report,
        notes=(*_opset_note(result), *notes),
        tables=table_outcomes(result.model, result.tables),
        unreached=store.recipe.unreached,
    )


def _opset_note(result: RewriteResult) -> tuple[str, ...]:
    return () if result.opset is None else (str(result.opset),)


def _session_level(store: QuantizedStore, options: ExportOptions) -> AccuracyLevel | None:
    """MatMulNBits nodes carry the level themselves: the session's reaches only those that the runtime fuses."""
    return None if store.recipe.weight_form is WeightForm.MATMUL_NBITS else options.accuracy_level


def _configure(
    base: ModelDirectory, scratch: Path, destination: Destination, session_level: AccuracyLevel | None
) -> tuple[str, ...]:
    if base.has_genai_config:
        patch_genai_config(scratch, destination.onnx_name, session_level)
        return ()
    if session_level is None:
        return ()
    return ("the base has no genai_config.json: set the accuracy level in your own session options",)


def _verify(
    onnx_file: Path, result: RewriteResult, base: ModelDirectory, options: ExportOptions, console: Console
) -> VerifyReport | None:
    if options.verify == "off":
        return None
    return verify(onnx_file, result.sites, base, options.verify, console, result.tables)


def _size(*files: Path) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
