"""What a folder of quantized weights tells for a report: its recipe, the reports of its sites, verification.json."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stages.errors import RecipeError
from stages.machine import describe_machine
from stages.page.document import KeptSite, Quantization, QuantizedSite, read_document, write_report
from stages.page.render import render
from stages.quantized_store import REPORT_FOLDER, VERIFICATION, QuantizedStore
from stages.records import ExportRecipe, SiteReport, VerifyReport
from stages.report import bits_per_weight
from stages.site_names import kind_of, layer_of
from stages.size_breakdown import SizePart

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
