"""What a folder of quantized weights tells for a report: its recipe, the reports of its sites, verification.json."""

from __future__ import annotations

import logging
from pydantic import TypeAdapter
from stages.records.results import VerifyReport
from stages.errors import RecipeError
from stages.report.document import KeptSite
from stages.report.document import Quantization
from stages.quantization.weights.store import VERIFICATION
from stages.quantization.weights.store import QuantizedStore
from stages.quantization.weights.summary import bits_per_weight
from stages.records.sites import kind_of
from stages.records.sites import layer_of
from stages.model.sizes import SizePart
from collections.abc import Sequence
from stages.report.document import QuantizedSite
from stages.records.results import ExportRecipe
from stages.records.results import SiteReport
from pathlib import Path
from pydantic import ValidationError
from dataclasses import replace
from stages.system.hardware import describe_machine
from stages.report.document import read_document
from stages.report.document import write_report
from stages.report.render import render
from stages.quantization.weights.store import REPORT_FOLDER
from collections.abc import Mapping
from stages.evaluation.bench.runs import Bench
from stages.evaluation.bench.runs import Record
from stages.evaluation.bench.runs import Run
from stages.evaluation.bench.runs import Yardstick
from stages.evaluation.bench.results import on_front
from stages.evaluation.bench.setup import results_of
from stages.report.document import Document
from stages.report.document import SweepTable
from stages.evaluation.bench.results import Result
from stages.report.document import SweepPoint


_LOGGER = logging.getLogger(__name__)


_VERIFICATION = TypeAdapter(VerifyReport)


def quantization_of(store: QuantizedStore, sizes: tuple[SizePart, ...]) -> Quantization:
    """Return the report's part on one run of stages.quantize; ``sizes`` are those of the base and the output.

    Raises:
        RecipeError: the search isn't finished.
    """
    if not store.is_complete():
        raise RecipeError(f"{store.folder} isn't complete; run stages.quantize again to go on with it.")
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
    bench: Bench,
    runs: Sequence[Run],
    records: Mapping[str, Record],
    yardsticks: Sequence[Yardstick],
    notes: Mapping[str, str],
) -> Document:
    """One table a text; one of held-out layer losses where there is no text. ``notes`` are remarks by run name."""
    commands = {run.name: run.shown_command for run in runs}
    tables = []
    for yardstick in yardsticks or (None,):
        results = results_of(runs, records, yardstick, notes)
        points = [
            _point(result, commands[result.name], on_front=best)
            for result, best in zip(results, on_front(results), strict=True)
        ]
        tables.append(
            SweepTable(
                text=None if yardstick is None else yardstick.text,
                base=None if yardstick is None else bench.base_row(yardstick),
                points=tuple(points),
            )
        )
    return Document(title=bench.folder.name, machine=describe_machine(), sweep=tuple(tables))


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
