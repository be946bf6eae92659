"""The table that a search ends with: the error of each kind of site, and the sites with the largest errors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rich import box
from rich.table import Table

from stages.quantization.weights.store import QuantizedStore
from stages.records.results import SiteReport
from stages.records.sites import kind_of, layer_of, short_name

_WORST = 3
_Rows = dict[tuple[str, str], list[SiteReport]]
"""The sites of each (kind, format)."""
_COLUMNS = ("sites", "format", "MB", "rounded", "chosen", "unseen", "a^r/duo/none", "clip")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSummary:
    """What a search chose, site by site: the table's numbers for programs."""

    recipe: str
    """The algorithm and its options, as a summary."""
    bits_per_weight: float
    seconds: float
    sites: tuple[SiteReport, ...]
    kept: tuple[tuple[str, str], ...]
    """(site, reason) for each site that isn't quantized."""


def search_summary(store: QuantizedStore, seconds: float) -> SearchSummary:
    """Return the summary of a finished search.

    Args:
        store: the finished weights.
        seconds: how long the search took.
    """
    return SearchSummary(
        recipe=store.recipe.summary,
        bits_per_weight=bits_per_weight(store),
        seconds=seconds,
        sites=tuple(store.reports()),
        kept=store.recipe.kept,
    )


def loss_so_far(reports: Sequence[SiteReport]) -> str:
    """Describe the mean error of the sites so far and that of rounding to nearest; empty where none was searched."""
    pairs = [(each.loss, each.loss_rtn) for each in reports if each.loss is not None and each.loss_rtn is not None]
    if not pairs:
        return ""
    ours, rounded = (mean(losses) for losses in zip(*pairs, strict=True))
    return f"error {ours:.3%}, by rounding {rounded:.3%}"


def quantization_table(store: QuantizedStore, seconds: float) -> Table:
    """Build the table: a row for each kind of site (one name in all layers) and format, then the sites that lost most.

    Errors are mean squared output errors relative to the output: of rounding to nearest, of what was chosen, and of
    that on held-out text.

    Args:
        store: the finished weights.
        seconds: how long the search took.
    """
    reports = store.reports()
    notes = Counter(report.note for report in reports if report.note)
    bits = bits_per_weight(store)
    table = Table(
        title=f"{store.recipe.summary}: {len(reports)} sites, {bits:.3f} bits a weight, {seconds:.1f} s",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == _COLUMNS[0] else "right", no_wrap=True)
    rows = _by_kind_and_format(reports)
    for (kind, _), members in rows.items():
        table.add_row(*_row(f"{len(members)} x {kind}", members))
    counted = (f"{count} x {note}" for note, count in notes.items())
    table.caption = "\n".join([*_layers_by_format(rows), *_tuned_blocks(reports), *counted])
    measured = [report for report in reports if report.held_out_loss is not None]
    if measured and len(reports) > len(rows):
        table.add_section()
        for report in sorted(measured, key=lambda report: -(report.held_out_loss or 0))[:_WORST]:
            table.add_row(*_row(short_name(report.site), [report]))
    return table


def _by_kind_and_format(reports: Sequence[SiteReport]) -> _Rows:
    """Put sites of one kind and format together, the formats of a kind next to each other."""
    kinds: dict[str, dict[str, list[SiteReport]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        kinds[kind_of(report.site)][report.format].append(report)
    return {(kind, form): members for kind, formats in kinds.items() for form, members in formats.items()}


def _layers_by_format(rows: _Rows) -> list[str]:
    """List which layers have which format, for kinds stored in several; kinds with the same layers share a line."""
    formats = Counter(kind for kind, _ in rows)
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (kind, form), members in rows.items():
        layers = [layer for member in members if (layer := layer_of(member.site)) is not None]
        if formats[kind] > 1 and layers:
            kinds[form, ranges(sorted(layers))].append(kind)
    return [f"{form}: {', '.join(names)} of layers {layers}" for (form, layers), names in kinds.items()]


def _tuned_blocks(reports: Sequence[SiteReport]) -> list[str]:
    """Describe in one line what tuning did to the blocks' outputs; no line where nothing was tuned."""
    pairs = {
        layer: (report.block_loss_start, report.block_loss)
        for report in reports
        if report.block_loss_start is not None
        and report.block_loss is not None
        and (layer := layer_of(report.site)) is not None
    }
    if not pairs:
        return []
    before, behind = (mean(losses) for losses in zip(*pairs.values(), strict=True))
    improved = sum(kept < start for start, kept in pairs.values())
    return [
        f"tuning: {improved} of {len(pairs)} layers improved; error of a layer's output on held-out text "
        f"{before:.3%} -> {behind:.3%}"
    ]


def bits_per_weight(store: QuantizedStore) -> float:
    """Return the bits a weight that the quantized sites take, scales and zero points included."""
    weights = {site.name: site.in_features * site.out_features for group in store.recipe.groups for site in group.sites}
    reports = store.reports()
    return 8 * sum(report.bytes for report in reports) / sum(weights[report.site] for report in reports)


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with runs drawn together: 0-2,5,7-8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _row(name: str, members: list[SiteReport]) -> list[str]:
    return [
        name,
        members[0].format,
        f"{sum(member.bytes for member in members) / 1e6:.1f}",
        _mean([member.loss_rtn for member in members], ".3%"),
        _mean([member.loss for member in members], ".3%"),
        _mean([member.held_out_loss for member in members], ".3%"),
        _families(members),
        _mean([member.mean_clip_ratio for member in members], ".2f"),
    ]


def _mean(values: list[float | None], number_format: str) -> str:
    known = [value for value in values if value is not None]
    return format(mean(known), number_format) if known else "-"


def _families(members: list[SiteReport]) -> str:
    """Describe the scale of one site by family and alpha; of many, count how many took a^r, duo and none."""
    if len(members) == 1:
        alpha, family = members[0].alpha, members[0].scale_family.replace("activation", "a^r")
        return family if alpha is None else f"{family} {alpha:.2g}"
    counts = Counter(member.scale_family for member in members)
    return "/".join(str(counts[family]) for family in ("activation", "duo", "identity"))
