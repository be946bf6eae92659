"""Make reports from runs: from a folder of quantized weights, or from the measured models of a sweep."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from export.card.record import command_line, read_origin
from stages.commands.options import CommandOptions
from stages.errors import OptionError
from stages.evaluation.bench.results import MeasuredModel, TextResults
from stages.model.sizes import SizePart
from stages.quantization.weights.byte_scales import stored_in_words
from stages.quantization.weights.store import REPORT_FOLDER, VERIFICATION, QuantizedStore
from stages.quantization.weights.summary import bits_per_weight
from stages.records.results import VerifyReport
from stages.records.sites import kind_of, layer_of
from stages.report.document import (
    KeptSite,
    Origin,
    Quantization,
    QuantizedEmbedding,
    QuantizedSite,
    Report,
    SweepPoint,
    SweepTable,
    read_report,
    write_report,
)
from stages.report.render import render
from stages.system.hardware import describe_machine
from stages.system.version import this_version

_LOGGER = logging.getLogger(__name__)
_VERIFICATION = TypeAdapter(VerifyReport)


def origin_of(command: str, options: CommandOptions, base: Path) -> Origin:
    """Return how a run is made that ends now.

    Args:
        command: what people type before its options.
        options: all its options.
        base: folder of the base model.
    """
    return Origin(
        command=command_line(command, options),
        version=this_version().number,
        made=_now(),
        base=base.absolute().name,
    )


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def origin_of_weights(store: QuantizedStore) -> Origin:
    """Return how weights were made, as far as it was kept among them."""
    kept = read_origin(store)
    return Origin(
        command="" if kept is None else kept.command,
        version="" if kept is None else kept.version.number,
        base_fingerprint=store.recipe.model_fingerprint,
        calibration="" if kept is None else kept.calibration,
    )


def write_quantization(store: QuantizedStore, sizes: tuple[SizePart, ...], *, title: str, base: Path) -> None:
    """Write the report inside the weights' folder; evaluations that were added to it stay.

    Args:
        store: a finished run's weights.
        sizes: what the base and the output hold.
        title: heading of the page.
        base: folder of the base model.

    Raises:
        UserError: the report can't be read or written.
    """
    folder = store.folder / REPORT_FOLDER
    report = replace(
        read_report(folder),
        title=title,
        machine=describe_machine(),
        origin=replace(origin_of_weights(store), made=_now(), base=base.absolute().name),
        quantization=quantization_of(store, sizes),
    )
    write_report(report, render, folder)


def quantization_of(store: QuantizedStore, sizes: tuple[SizePart, ...]) -> Quantization:
    """Return a report's part on one run of stages.quantize.

    Args:
        store: a finished run's weights.
        sizes: what the base and the output hold.

    Raises:
        OptionError: the search isn't finished.
    """
    if not store.is_complete():
        raise OptionError(f"{store.folder} isn't complete; run stages.quantize again to finish it.")
    recipe = store.recipe
    return Quantization(
        summary=recipe.summary,
        weight_form=recipe.weight_form.value,
        bits_per_weight=bits_per_weight(store),
        sites=_sites(store),
        kept=tuple(
            KeptSite(site=site, layer=layer_of(site), kind=kind_of(site), reason=reason) for site, reason in recipe.kept
        ),
        embeddings=tuple(
            QuantizedEmbedding(name=plan.table.weight, stored=plan.spec.description, bytes=plan.format_bytes)
            for plan in recipe.embeddings
        ),
        other_weights=tuple(part.description for part in recipe.unreached),
        sizes=sizes,
        verified=_read_verified(store.folder / VERIFICATION),
    )


def _sites(store: QuantizedStore) -> tuple[QuantizedSite, ...]:
    found = {report.site: report for report in store.reports()}
    return tuple(
        QuantizedSite(
            layer=layer_of(site.name),
            kind=kind_of(site.name),
            in_features=site.in_features,
            out_features=site.out_features,
            report=found[site.name],
            stored=stored_in_words(
                site, store.spec(index, site), store.recipe.weight_form, byte_scales=store.recipe.byte_scales
            ),
        )
        for index, group in enumerate(store.recipe.groups)
        for site in group.sites
    )


def _read_verified(path: Path) -> VerifyReport | None:
    """Return the checks of the export; None where none was run or, with a warning, where they can't be read."""
    try:
        return _VERIFICATION.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged or of another version"
        _LOGGER.warning("%s can't be read (%s), so the report holds no checks; export again.", path, reason)
        return None


def sweep_report(title: str, results: Sequence[TextResults], origin: Origin) -> Report:
    """Return the report on measured models, with one table a text.

    Args:
        title: heading of the page.
        results: the models, text by text.
        origin: how they were made.
    """
    tables = tuple(
        SweepTable(text=each.text, base=each.base, points=tuple(map(_point, each.models))) for each in results
    )
    return Report(title=title, machine=describe_machine(), origin=origin, sweep=tables)


def _point(model: MeasuredModel) -> SweepPoint:
    cost, search = model.cost, model.search
    return SweepPoint(
        name=model.name,
        command=model.command,
        bytes=model.bytes,
        bits_per_weight=None if search is None else search.bits_per_weight,
        search_seconds=None if search is None else search.seconds,
        total_seconds=None if cost is None else cost.seconds,
        peak_bytes=None if cost is None else cost.peak_bytes,
        held_out_loss=None if search is None else search.held_out_loss,
        accuracy=model.accuracy,
        loss=model.loss,
        on_front=model.unbeaten,
        note=model.remark,
    )
