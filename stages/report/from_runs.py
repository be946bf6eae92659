"""What a folder of quantized weights tells for a report: its recipe, the reports of its sites, verification.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stages.errors import OptionError
from stages.evaluation.bench.results import Result, on_front
from stages.evaluation.bench.runs import EvaluationText, Record, Run, RunFolder
from stages.evaluation.bench.setup import results_of
from stages.model.sizes import SizePart
from stages.quantization.weights.store import REPORT_FOLDER, VERIFICATION, QuantizedStore
from stages.quantization.weights.summary import bits_per_weight
from stages.records.results import ExportRecipe, SiteReport, VerifyReport
from stages.records.sites import kind_of, layer_of
from stages.report.document import (
    Document,
    KeptSite,
    Quantization,
    QuantizedSite,
    SweepPoint,
    SweepTable,
    read_document,
    write_report,
)
from stages.report.render import render
from stages.system.hardware import describe_machine

_LOGGER = logging.getLogger(__name__)


_VERIFICATION = TypeAdapter(VerifyReport)


def quantization_of(store: QuantizedStore, sizes: tuple[SizePart, ...]) -> Quantization:
    """Return the report's part on one run of stages.quantize; ``sizes`` are those of the base and the output.

    Raises:
        OptionError: the search isn't finished.
    """
    if not store.is_complete():
        raise OptionError(f"{store.folder} isn't complete; run stages.quantize again to go on with it.")
    recipe = store.recipe
    return Quantization(
        summary=recipe.summary,
        weight_form=recipe.weight_form.value,
        bits_per_weight=bits_per_weight(store),
        sites=_sites(recipe, store.reports()),
        kept=tuple(
            KeptSite(site=site, layer=layer_of(site), kind=kind_of(site), reason=reason) for site, reason in recipe.kept
        ),
        other_weights=tuple(part.in_words for part in recipe.unreached),
        sizes=sizes,
        verified=_read_verified(store.folder / VERIFICATION),
    )


def _sites(recipe: ExportRecipe, reports: Sequence[SiteReport]) -> tuple[QuantizedSite, ...]:
    found = {report.site: report for report in reports}
    return tuple(
        QuantizedSite(
            layer=layer_of(site.name),
            kind=kind_of(site.name),
            in_features=site.in_features,
            out_features=site.out_features,
            report=found[site.name],
        )
        for group in recipe.groups
        for site in group.sites
    )


def _read_verified(path: Path) -> VerifyReport | None:
    """Return the checks of the export; None, with a warning, where they can't be read, and where none was run."""
    try:
        return _VERIFICATION.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged or of another version"
        _LOGGER.warning("%s can't be read (%s), so the report holds no checks; export again.", path, reason)
        return None


def write_quantization(store: QuantizedStore, sizes: tuple[SizePart, ...], *, title: str) -> None:
    """Write the report inside the weights' folder; what evaluations added to it stays.

    Args:
        store: a finished run's weights.
        sizes: what the base and the output hold.
        title: heading of the page.

    Raises:
        UserError: the report can't be read or written.
    """
    folder = store.folder / REPORT_FOLDER
    document = replace(
        read_document(folder), title=title, machine=describe_machine(), quantization=quantization_of(store, sizes)
    )
    write_report(document, render, folder)


def sweep_document(
    run_folder: RunFolder,
    runs: Sequence[Run],
    records: Mapping[str, Record],
    evaluation_texts: Sequence[EvaluationText],
    notes: Mapping[str, str],
) -> Document:
    """One table a text; one of held-out layer losses where there is no text. ``notes`` are remarks by run name."""
    commands = {run.name: run.shown_command for run in runs}
    tables = []
    for evaluation_text in evaluation_texts or (None,):
        results = results_of(runs, records, evaluation_text, notes)
        points = [
            _point(result, commands[result.name], on_front=best)
            for result, best in zip(results, on_front(results), strict=True)
        ]
        tables.append(
            SweepTable(
                text=None if evaluation_text is None else evaluation_text.text,
                base=None if evaluation_text is None else run_folder.base_row(evaluation_text),
                points=tuple(points),
            )
        )
    return Document(title=run_folder.folder.name, machine=describe_machine(), sweep=tuple(tables))


def _point(result: Result, command: str, *, on_front: bool) -> SweepPoint:
    cost, search = result.record.cost, result.record.search
    return SweepPoint(
        name=result.name,
        command=command,
        bytes=result.record.bytes,
        bits_per_weight=None if search is None else search.bits_per_weight,
        search_seconds=None if search is None else search.seconds,
        total_seconds=None if cost is None else cost.seconds,
        peak_bytes=None if cost is None else cost.peak_bytes,
        held_out_loss=None if search is None else search.held_out_loss,
        accuracy=result.accuracy,
        loss=result.loss,
        on_front=on_front,
        note=result.record.failure or result.note,
    )
