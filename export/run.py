"""Export a model: rewrite the base graph, write the output folder whole, and verify it before it gets its name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from pydantic import TypeAdapter

from export.card.record import ModelRecord, describe_base, kinds_of, read_origin, read_record, summarize_checks
from export.card.write import move_base_card, write_card
from export.fold import FoldOutcome
from export.forms.embedding import TableOutcome, table_outcomes
from export.rewrite import RewriteResult, rewrite
from export.save import OUTPUT_OPTION, Destination, copy_side_files, data_name, patch_genai_config, save_model
from export.verify.verify import save_report, verify
from export.verify.while_written import SiteChecks
from stages.commands.options import AccuracyLevel
from stages.commands.quantize_options import ExportOptions
from stages.errors import OptionError, UserError
from stages.evaluation.records import Evaluation, OutputEvaluation
from stages.model.directory import ModelDirectory
from stages.model.load import external_files, load_graph
from stages.model.patterns import PASSED_THROUGH, readers
from stages.quantization.targets.formats import FormatChoice
from stages.quantization.weights.store import QuantizedStore
from stages.quantization.weights.summary import SearchSummary
from stages.records.formats import WeightForm
from stages.records.results import ExportRecipe, VerifyReport
from stages.records.sites import UnquantizedWeights
from stages.runtime.session import ACCURACY_LEVEL
from stages.system.atomic import atomic_directory
from stages.system.version import this_version

_LOGGER = logging.getLogger(__name__)


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
    unreached: tuple[UnquantizedWeights, ...] = ()
    """Large weights that no MatMul or Gemm reads."""
    folder_bytes: int | None = None
    """All files of the output; None where an earlier version wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A quantized model on disk, and how it came about."""

    folder: Path
    """onnxruntime-genai loads it as it stands."""
    onnx_file: Path
    weights: Path
    """Folder of the quantized weights, for another ``export``."""
    choice: FormatChoice
    """What was decided for the target, and why."""
    search: SearchSummary
    export: ExportSummary
    evaluations: tuple[Evaluation, ...] = ()
    """Comparisons with the base, one for each text, where they were asked for."""
    outputs: tuple[OutputEvaluation, ...] = ()
    """Comparisons of what encoders give, one for each component, where they were asked for."""


def export_model(
    base: ModelDirectory,
    store: QuantizedStore,
    destination: Destination,
    options: ExportOptions,
    base_graph: ir.Model | None = None,
    *,
    command: str = "",
) -> ExportSummary:
    """Write ``store``'s weights into a copy of the ``base`` model directory.

    Args:
        base: the model that the weights were made from.
        store: the finished weights.
        destination: where the output goes.
        options: how its nodes are written and checked.
        base_graph: the base's graph as ``load_graph`` returns it, which stays as it is; None parses the file here.
        command: for the model card: what a person types to write ``store``'s weights; empty where the command that
            searched them is writing them.

    Raises:
        GraphError: the base can't be read or converted, isn't the one of the weights, or the output failed a check.
        OptionError: ``store`` isn't complete.
        UserError: the destination can't be used or written.
    """
    destination.require_apart_from(store.folder, "the quantized weights")
    options = _with_target_level(options, store.recipe)
    model = load_graph(base) if base_graph is None else base_graph
    result = rewrite(model, store, options.accuracy_level)
    try:
        with (
            atomic_directory(destination.folder, overwrite=destination.overwrite, option=OUTPUT_OPTION) as scratch,
            _checks(scratch / destination.onnx_name, result, options) as checks,
        ):
            save_model(result.model, scratch, destination.onnx_name, None if checks is None else checks.written)
            copy_side_files(base, model, scratch, destination.onnx_name)
            earlier = read_record(scratch)
            move_base_card(scratch, ours=earlier is not None)
            notes = _configure(base, scratch, destination, _session_options(store.recipe, options))
            report = None if checks is None else _verify(checks, result, base)
            notes = (*notes, *_kept_report(report, store.folder))
            bytes_before = _size(base.onnx_file, *external_files(model))
            bytes_after = _size(scratch / destination.onnx_name, scratch / data_name(destination.onnx_name))
            record = ModelRecord(
                name=destination.folder.name,
                onnx_file=destination.onnx_name,
                version=this_version(),
                export_command=command,
                origin=read_origin(store),
                algorithm=store.recipe.summary,
                weight_form=store.recipe.weight_form,
                accuracy_level=options.accuracy_level,
                base=describe_base(base, model, store.recipe.model_fingerprint, bytes_before, earlier),
                formats=tuple(kinds_of(store)),
                bytes=bytes_after,
                checks=None if report is None else summarize_checks(report, options.verify),
                parts=() if earlier is None else (*earlier.parts, replace(earlier, parts=())),
            )
            write_card(scratch, record)
            folder_bytes = _size(*scratch.rglob("*"))
    except OSError as error:
        raise UserError(
            f"{OUTPUT_OPTION} {destination.folder} can't be written ({error.strerror or error}); free space or "
            "choose another folder."
        ) from error
    if bytes_after > bytes_before:
        _LOGGER.warning(
            "the model is larger than its base (%s and %s bytes): small weights gain little from codes and scales.",
            f"{bytes_after:,}",
            f"{bytes_before:,}",
        )
    notes = (*notes, *_floats_beside_codes(result))
    return ExportSummary(
        onnx_file=destination.onnx_file,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        folds=result.folds,
        kept=store.recipe.kept,
        report=report,
        notes=notes if result.opset is None else (str(result.opset), *notes),
        tables=table_outcomes(result.model, result.tables),
        unreached=store.recipe.unreached,
        folder_bytes=folder_bytes,
    )


def _floats_beside_codes(result: RewriteResult) -> Iterator[str]:
    """Yield a note for each floating-point weight that stays although its sites have codes: something reads it too.

    Lookups of an embedding are told by the tables of embeddings and of what is kept.
    """
    graph = result.model.graph
    for name in dict.fromkeys(site.source.site.weight for site in result.sites):
        value = graph.initializers.get(name)
        if value is None or value.const_value is None:
            continue
        kinds = dict.fromkeys(node.op_type for node, _ in readers(value, PASSED_THROUGH) if node.op_type != "Gather")
        why = ["it is an output of the graph"] * value.is_graph_output() + [f"{kind} reads it too" for kind in kinds]
        if why:
            yield f"'{name}' stays beside its codes, {value.const_value.nbytes / 1e6:,.1f} MB: {' and '.join(why)}"


def _kept_report(report: VerifyReport | None, folder: Path) -> tuple[str, ...]:
    """Keep the figures beside the weights; return a note where that can't be, for the model itself is whole."""
    if report is None:
        return ()
    try:
        save_report(report, folder)
    except OSError as error:
        return (f"verification.json can't be written to {folder} ({error.strerror})",)
    return ()


def _with_target_level(options: ExportOptions, recipe: ExportRecipe) -> ExportOptions:
    """Return ``options`` with the accuracy level that the weights' target runs fast, where none was asked for."""
    chosen = dict(recipe.session_options).get(ACCURACY_LEVEL)
    if options.accuracy_level is not None or chosen is None:
        return options
    try:
        return replace(options, accuracy_level=TypeAdapter(AccuracyLevel).validate_python(int(chosen)))
    except ValueError as error:  # pydantic's own is one
        raise OptionError(
            f"recipe.json asks for the accuracy level '{chosen}', which is not 0 to 4; run stages.quantize again."
        ) from error


def _session_options(recipe: ExportRecipe, options: ExportOptions) -> dict[str, str]:
    """Return what the target needs, and the accuracy level where no MatMulNBits node carries it."""
    needed = {key: value for key, value in recipe.session_options if key != ACCURACY_LEVEL}
    if options.accuracy_level is None or recipe.weight_form is WeightForm.MATMUL_NBITS:
        return needed
    return needed | {ACCURACY_LEVEL: str(options.accuracy_level)}


def _configure(
    base: ModelDirectory, scratch: Path, destination: Destination, session_options: Mapping[str, str]
) -> tuple[str, ...]:
    if base.has_genai_config:
        patch_genai_config(scratch, destination.onnx_name, session_options, base.component)
        return ()
    return tuple(
        f"the base has no genai_config.json: set {key} to {value} in your own session options"
        for key, value in session_options.items()
    )


def _checks(
    onnx_file: Path, result: RewriteResult, options: ExportOptions
) -> AbstractContextManager[SiteChecks | None]:
    """Return the checks of what is written into the MatMuls; None where there shall be none."""
    return nullcontext() if options.verify == "off" else SiteChecks(onnx_file, result.sites, options.verify)


def _verify(checks: SiteChecks, result: RewriteResult, base: ModelDirectory) -> VerifyReport:
    report = verify(checks, base, result.tables, result.experts, result.computed)
    for skipped in report.skipped:
        _LOGGER.warning("not checked: %s", skipped)
    return report


def _size(*files: Path) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
