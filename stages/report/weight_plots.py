"""Plot what the weights became: bytes by kind, the format of every weight, and the error of every site's output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from statistics import mean

from stages.model.sizes import CATEGORIES, SizePart
from stages.quantization.weights.summary import ranges
from stages.records.results import SiteReport
from stages.records.sites import short_name
from stages.report.document import KeptSite, QuantizedSite
from stages.report.svg import Axis, Mark, Part, axis_over, bars, chart
from stages.report.values import UNKNOWN, format_in_words, megabytes, percent, span
from stages.report.view import Figure, LegendEntry, TableView, table

_KEPT = "not quantized"
_MOST_ROWS = 2000
"""Of the table of all sites: models with experts have many thousands."""
_ROUNDED = LegendEntry(text="rounded to nearest", shape="ring", css="c0")
_CHOSEN = LegendEntry(text="as chosen", shape="disc", css="c1")
_Pair = tuple[float, float]
"""Errors with rounding to nearest and as chosen."""


def size_figure(parts: Sequence[SizePart]) -> Figure | None:
    """Return the bars of the base's and the quantized model's bytes by kind; None where they aren't known."""
    if not parts:
        return None
    colours = {part.name: f"part c{1 + CATEGORIES.index(part.name)}" for part in parts}
    before, after = sum(part.before for part in parts), sum(part.after for part in parts)
    rows = []
    for model, sizes in (("base", [part.before for part in parts]), ("quantized", [part.after for part in parts])):
        ends = [size / 1e6 for size in accumulate(sizes, initial=0)]
        stretches = [
            Part(
                start=start,
                end=end,
                hint=f"{model}, {part.name}: {megabytes(size)} MB",
                css=colours[part.name],
                text=megabytes(size),
            )
            for part, size, (start, end) in zip(parts, sizes, pairwise(ends), strict=True)
        ]
        rows.append((f"{model}, {megabytes(sum(sizes))} MB", stretches))
    lines = [
        (part.name, megabytes(part.before), megabytes(part.after), percent(part.after / after if after else 0))
        for part in parts
    ]
    return Figure(
        name="sizes",
        heading="Size",
        text="Bytes of the .onnx file and its external data, in MB (millions of bytes). INT4 codes take half a byte a "
        "weight; scales and zero points come on top.",
        drawings=(bars("Size of both models", Axis(title="MB", low=0, high=max(before, after) / 1e6), rows),),
        legend=tuple(LegendEntry(text=name, shape="square", css=css) for name, css in colours.items()),
        folded=table(
            ("part", "base, MB", "quantized, MB", "share of the quantized"),
            [*lines, ("all", megabytes(before), megabytes(after), "")],
        ),
    )


def bits_figure(sites: Sequence[QuantizedSite], kept: Sequence[KeptSite]) -> Figure | None:
    """Return the map of formats in the layers, a row a kind of site; None where all of them are the same."""
    cells = [(site.report.site, site.layer, site.kind, site.report.format) for site in sites if site.layer is not None]
    cells += [(site.site, site.layer, site.kind, _KEPT) for site in kept if site.layer is not None]
    formats = sorted({form for *_, form in cells}, key=lambda form: (form == _KEPT, form))
    if len(formats) < 2:
        return None
    colours = {form: "part c0" if form == _KEPT else f"part c{1 + index % 9}" for index, form in enumerate(formats)}
    x = Axis(title="layer", low=-0.5, high=max(layer for _, layer, *_ in cells) + 0.5, whole=True)
    rows: dict[str, list[Part]] = {}
    for site, layer, kind, form in cells:
        text = "" if form == _KEPT else form[0]
        hint = f"{short_name(site)}: {form}"
        part = Part(start=layer - 0.5, end=layer + 0.5, hint=hint, css=colours[form], text=text)
        rows.setdefault(kind, []).append(part)
    words = {site.report.format: site.stored or format_in_words(site.report.format) for site in sites}
    return Figure(
        name="bits",
        heading="Bits map",
        text="The format of every MatMul's weight, layer by layer; the digit is the number of bits.",
        drawings=(bars("Format of every weight by layer", x, list(rows.items())),),
        legend=tuple(
            LegendEntry(text=f"{form}: {words[form]}" if form in words else form, shape="square", css=css)
            for form, css in colours.items()
        ),
    )


def site_figure(sites: Sequence[QuantizedSite]) -> Figure | None:
    """Return every site's format and output error, with a panel for each kind of site whose errors are known."""
    if not sites:
        return None
    panels: dict[str, list[tuple[QuantizedSite, _Pair]]] = {}
    for site in sites:
        # One point makes no panel: what lies outside the layers stands in the table.
        if site.layer is not None and (pair := _losses(site.report)) is not None:
            panels.setdefault(_kind(site), []).append((site, pair))
    shown = [each for panel in panels.values() for each in panel]
    whole = len(sites) <= _MOST_ROWS
    y = axis_over("error of the output", [loss for _, pair in shown for loss in pair], log=True, shares=True)
    return Figure(
        name="sites",
        heading="Layer by layer",
        text=_explain(shown) + ("" if whole else " Every MatMul's own numbers are in report.json."),
        drawings=tuple(_panel(kind, panel, y) for kind, panel in panels.items()),
        legend=(_ROUNDED, _CHOSEN) if panels else (),
        tables=(_grouped(sites),),
        folded=_table([_columns([site], short_name(site.report.site)) for site in sites]) if whole else None,
        folded_name=f"All {len(sites)} MatMuls",
        small=True,
    )


def _explain(shown: Sequence[tuple[QuantizedSite, _Pair]]) -> str:
    if not shown:
        return "Errors of the outputs were not measured: plain rounding needs no text."
    unseen = all(site.report.held_out_loss is not None for site, _ in shown)
    where = "text that the search never saw" if unseen else "the calibration text"
    left = mean(chosen / rounded for _, (rounded, chosen) in shown if rounded)
    return (
        f"Mean squared error of each MatMul's output relative to the output, on {where}; lower is better, and the "
        f"scale is logarithmic. On average the search leaves {percent(left)} of the error of rounding to nearest. "
        "Input scale: what the weights are multiplied with before rounding, a power (the exponent) of the mean input "
        "(activation), the same divided by one of the weights (duo), or none. Clip ratio: the part of the largest "
        "weight that the codes reach."
    )


def _kind(site: QuantizedSite) -> str:
    """Return the site's kind; experts are many and share one."""
    return site.kind if site.layer is None else re.sub(r"\d+", "*", site.kind)


def _losses(report: SiteReport) -> _Pair | None:
    """Return the errors on held-out text where they are known, else on the calibration text."""
    for rounded, chosen in ((report.held_out_loss_rtn, report.held_out_loss), (report.loss_rtn, report.loss)):
        if rounded is not None and chosen is not None:
            return rounded, chosen
    return None


def _panel(kind: str, sites: Sequence[tuple[QuantizedSite, _Pair]], y: Axis) -> str:
    layers = [site.layer or 0 for site, _ in sites]
    marks = [
        Mark(
            x=site.layer or 0,
            y=loss,
            hint=f"{short_name(site.report.site)}, {style.text}: {percent(loss)}",
            shape=style.shape,
            css=style.css,
        )
        for site, pair in sites
        for style, loss in zip((_ROUNDED, _CHOSEN), pair, strict=True)
    ]
    falls = [("stem", [(site.layer or 0, loss) for loss in pair]) for site, pair in sites]
    x = Axis(title="layer", low=min(layers) - 0.5, high=max(layers) + 0.5, whole=True)
    return chart(kind, x, y, marks, falls, small=True)


def _grouped(sites: Sequence[QuantizedSite]) -> TableView:
    """Return a row for the sites of one kind and format."""
    groups: dict[tuple[str, str], list[QuantizedSite]] = {}
    for site in sites:
        groups.setdefault((_kind(site), site.report.format), []).append(site)
    rows = [_columns(members, f"{len(members)} x {kind}") for (kind, _), members in groups.items()]
    if all(row["chosen, unseen text"] != UNKNOWN for row in rows):
        rows = [row | dict.fromkeys(("rounded", "chosen"), UNKNOWN) for row in rows]
    return _table(rows)


def _columns(sites: Sequence[QuantizedSite], name: str) -> dict[str, str]:
    """Return the cells of a row by heading, with the range of each number over ``sites``."""
    reports = [site.report for site in sites]
    layers = sorted({site.layer for site in sites if site.layer is not None})
    families = Counter(report.scale_family for report in reports if report.alpha is not None)
    return {
        "MatMuls": name,
        "layers": ranges(layers) or UNKNOWN,
        "tokens": span([report.tokens for report in reports], "{:,}".format),
        "format": sites[0].stored or format_in_words(sites[0].report.format),
        "MB": megabytes(sum(report.bytes for report in reports)),
        "rounded": span([report.loss_rtn for report in reports], percent),
        "chosen": span([report.loss for report in reports], percent),
        "rounded, unseen text": span([report.held_out_loss_rtn for report in reports], percent),
        "chosen, unseen text": span([report.held_out_loss for report in reports], percent),
        "its block, before tuning": span([report.block_loss_start for report in reports], percent),
        "its block, tuned": span([report.block_loss for report in reports], percent),
        "input scale": ", ".join(families) or UNKNOWN,
        "exponent": span([report.alpha for report in reports], "{:.2f}".format),
        "clip ratio": span([report.mean_clip_ratio for report in reports], "{:.3f}".format),
    }


def _table(rows: Sequence[dict[str, str]]) -> TableView:
    """Return the rows without the columns that are empty in all of them."""
    shown = [heading for heading in rows[0] if any(row[heading] != UNKNOWN for row in rows)]
    return table(shown, [[row[heading] for heading in shown] for row in rows], texts=2 + ("layers" in shown))
