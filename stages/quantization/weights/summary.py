"""The table that a search ends with: the error of each kind of site, and the sites with the largest errors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

from stages.commands.tables import Column, DataTable
from stages.quantization.weights.store import QuantizedStore
from stages.records.quantities import counted, duration
from stages.records.results import SiteReport
from stages.records.sites import expert_of, kind_of, layer_of, short_name

_WORST = 3
_NAMED = 12
"""Layers whose unseen experts are named in the box; report.jsonl has all."""
_Rows = dict[tuple[str, str], list[SiteReport]]
"""The sites of each (kind, format)."""
_COLUMNS = (
    Column(heading="weights"),
    Column(heading="format", is_number=True, leaves=3),
    Column(heading="MB", is_number=True),
    Column(heading="error by rounding", is_number=True, leaves=4),
    Column(heading="error as stored", is_number=True),
    Column(heading="on unseen text", is_number=True),
    Column(heading="with input scale", is_number=True, leaves=2),
    Column(heading="range kept", is_number=True, leaves=1),
)
_LABEL = re.compile(r"(\d)(?:b(\d+)|ch)(z?)")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTokens:
    """How many calibration tokens the experts of a model saw."""

    least: int
    median: float
    most: int
    unseen: tuple[str, ...]
    """A layer and its experts that none reached, for each that has such: layers.3/moe 1-2, 7."""

    @property
    def spread(self) -> str:
        """Return the numbers in words."""
        return f"least {self.least:,}, median {self.median:,.0f}, most {self.most:,}"

    def named(self, layers: int) -> str:
        """Name the experts that no token reached, of so many layers; and how many more there are."""
        left = len(self.unseen) - layers
        more = f" and of {counted(left, 'more layer')}" if left > 0 else ""
        return f"{'; '.join(self.unseen[:layers])}{more}"


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


def quantization_table(store: QuantizedStore, seconds: float) -> DataTable:
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
    kinds = _by_kind_and_format(reports)
    rows = [_row(f"{len(members)} x {kind}", members) for (kind, _), members in kinds.items()]
    measured = [report for report in reports if report.held_out_loss is not None]
    worst: list[tuple[str, ...]] = []
    if measured and len(reports) > len(rows):
        furthest = sorted(measured, key=lambda report: -(report.held_out_loss or 0))[:_WORST]
        worst = [(), *(_row(short_name(report.site), [report]) for report in furthest)]
    return DataTable(
        title=f"{store.recipe.summary}: {counted(len(reports), 'site')}, {bits:.3f} bits a weight, {duration(seconds)}",
        columns=_COLUMNS,
        rows=(*rows, *worst),
        notes=(
            *_legend(reports, has_worst=bool(worst)),
            *_layers_by_format(kinds),
            *_tuned_blocks(reports),
            *_tokens_of_experts(reports),
            *(f"{count} x {note}" for note, count in notes.items()),
        ),
    )


def _legend(reports: Sequence[SiteReport], *, has_worst: bool) -> Iterator[str]:
    """Say in words what the columns hold that have values."""
    yield format_legend(report.format for report in reports)
    if any(report.loss is not None for report in reports):
        yield "Error: mean squared error of the output, relative to the output; the search never saw the unseen text."
    if any(report.scale_family != "identity" for report in reports):
        yield (
            "With input scale: weights that AWQ scales by their input's magnitude (in^0.5: to the power 0.5; "
            "in/weight^0.5: relative to the weight's)."
        )
    if any(report.mean_clip_ratio is not None for report in reports):
        yield "Range kept: part of each block's largest magnitude that its codes reach, on average."
    if has_worst:
        yield "Below the line: the largest errors on unseen text."


def format_legend(labels: Iterable[str]) -> str:
    """Say in words what the labels of formats mean: 4b32 is INT4 with a scale for 32 inputs."""
    found = {label: match for label in labels if (match := _LABEL.fullmatch(label))}
    words = [
        f"{label} is INT{match[1]}, a scale {'and a zero point ' if match[3] else ''}for "
        f"{f'{match[2]} inputs' if match[2] else 'each output channel'}"
        for label, match in found.items()
    ]
    return f"Format: {'; '.join(words)}." if words else ""


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
        layers = {layer for member in members if (layer := layer_of(member.site)) is not None}
        if formats[kind] > 1 and layers:
            kinds[form, ranges(sorted(layers))].append(kind)
    return [f"{form}: {', '.join(names)} of layers {layers}" for (form, layers), names in kinds.items()]


def expert_tokens(reports: Sequence[SiteReport]) -> ExpertTokens | None:
    """Return how many calibration tokens the experts saw; None where none were calibrated."""
    tokens = sorted(report.tokens for report in reports if report.tokens is not None)
    if not tokens:
        return None
    unseen: dict[str, set[int]] = defaultdict(set)
    for report in reports:
        if report.tokens == 0 and (place := expert_of(report.site)) is not None:
            unseen[place[0]].add(place[1])
    return ExpertTokens(
        least=tokens[0],
        median=median(tokens),
        most=tokens[-1],
        unseen=tuple(f"{layer} {ranges(sorted(experts))}" for layer, experts in unseen.items()),
    )


def _tokens_of_experts(reports: Sequence[SiteReport]) -> Iterator[str]:
    """Say how many calibration tokens the experts saw; no line where none were calibrated."""
    found = expert_tokens(reports)
    if found is None:
        return
    yield (
        f"calibration tokens that routers sent to an expert: {found.spread}; each was also searched on some of its "
        "whole layer, which count the more the fewer it saw"
    )
    if found.unseen:
        yield f"experts that no calibration token reached: {found.named(_NAMED)}; calibrate on more text"


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
        f"tuning: {improved} of {counted(len(pairs), 'layer')} improved; error of a layer's output on held-out text "
        f"{before:.3%} -> {behind:.3%}"
    ]


def bits_per_weight(store: QuantizedStore) -> float:
    """Return the bits a weight that the quantized sites take, scales and zero points included."""
    weights = {site.name: site.in_features * site.out_features for group in store.recipe.groups for site in group.sites}
    reports = store.reports()
    return 8 * sum(report.bytes for report in reports) / sum(weights[report.site] for report in reports)


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with runs drawn together: 0-2, 5, 7-8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _row(name: str, members: list[SiteReport]) -> tuple[str, ...]:
    return (
        name,
        members[0].format,
        f"{sum(member.bytes for member in members) / 1e6:.1f}",
        _mean([member.loss_rtn for member in members], ".3%"),
        _mean([member.loss for member in members], ".3%"),
        _mean([member.held_out_loss for member in members], ".3%"),
        _families(members),
        _mean([member.mean_clip_ratio for member in members], ".2f"),
    )


def _mean(values: list[float | None], number_format: str) -> str:
    known = [value for value in values if value is not None]
    return format(mean(known), number_format) if known else "-"


def _families(members: list[SiteReport]) -> str:
    """Describe the input scale of one site; of many, count how many have one."""
    scaled = [member for member in members if member.scale_family != "identity"]
    if not scaled:
        return "-"
    if len(members) > 1:
        return f"{len(scaled)} of {len(members)}"
    name = "in/weight" if scaled[0].scale_family == "duo" else "in"
    return name if scaled[0].alpha is None else f"{name}^{scaled[0].alpha:.2g}"
