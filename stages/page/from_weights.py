"""What a folder of quantized weights tells for a report: its recipe, the reports of its sites, verification.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from stages.errors import RecipeError
from stages.page.document import KeptSite, Quantization, QuantizedSite, Verified
from stages.quantized_store import VERIFICATION, QuantizedStore
from stages.records import ExportRecipe, SiteReport
from stages.report import bits_per_weight
from stages.site_names import kind_of, layer_of
from stages.size_breakdown import SizePart

_VERIFIED = TypeAdapter(Verified)


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


def _read_verified(path: Path) -> Verified | None:
    """None where the export wasn't verified, or by a version that wrote something else."""
    try:
        return _VERIFIED.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
