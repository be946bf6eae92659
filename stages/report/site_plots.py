"""Plot each site's output error: with rounding to nearest, and with what the search chose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from stages.records.results import SiteReport
from stages.records.sites import short_name
from stages.report.document import QuantizedSite
from stages.report.svg import Axis, Mark, axis_over, chart
from stages.report.view import UNKNOWN, Figure, LegendEntry, TableView, number, percent, table

_ROUNDED = LegendEntry(text="rounded to nearest", shape="ring", css="c0")
_CHOSEN = LegendEntry(text="as chosen", shape="disc", css="c1")
_Pair = tuple[float, float]
"""Errors with rounding to nearest and as chosen."""


def site_figure(sites: Sequence[QuantizedSite]) -> Figure | None:
    """Return every site's choices and output error, with a panel for each kind of site whose errors are known."""
    if not sites:
        return None
    panels: dict[str, list[tuple[QuantizedSite, _Pair]]] = {}
    for site in sites:
        if (pair := _losses(site.report)) is not None:
            # Experts are many and share a panel.
            kind = site.kind if site.layer is None else re.sub(r"\d+", "*", site.kind)
            panels.setdefault(kind, []).append((site, pair))
    y = axis_over("", [loss for panel in panels.values() for _, pair in panel for loss in pair], log=True, percent=True)
    unseen = all(site.report.held_out_loss is not None for panel in panels.values() for site, _ in panel)
    where = "text that the search never saw" if unseen else "the calibration text"
    text = (
        f"Mean squared error of each site's output relative to the output, on {where}; logarithmic, the same scale in "
        "all panels."
    )
    return Figure(
        name="sites",
        heading="Site by site",
        text=text if panels else "Output errors were not measured.",
        drawings=tuple(_panel(panel, replace(y, title=kind)) for kind, panel in panels.items()),
        legend=(_ROUNDED, _CHOSEN) if panels else (),
        table=_table([site.report for site in sites]),
        small=True,
    )


def _losses(report: SiteReport) -> _Pair | None:
    """Return the errors on held-out text where they are known, else on the calibration text."""
    for rounded, chosen in ((report.held_out_loss_rtn, report.held_out_loss), (report.loss_rtn, report.loss)):
        if rounded is not None and chosen is not None:
            return rounded, chosen
    return None


def _panel(sites: Sequence[tuple[QuantizedSite, _Pair]], y: Axis) -> str:
    layers = [site.layer for site, _ in sites if site.layer is not None] or [0]
    title = "" if sites[0][0].layer is None else "layer"
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
    x = Axis(title=title, low=min(layers) - 0.5, high=max(layers) + 0.5, whole=True)
    return chart(x, y, marks, falls, small=True)


def _table(reports: Sequence[SiteReport]) -> TableView:
    """Return a row for each site, without the columns that are empty for all."""
    columns = {
        "site": [short_name(report.site) for report in reports],
        "format": [report.format for report in reports],
        "rounded": [percent(report.loss_rtn) for report in reports],
        "chosen": [percent(report.loss) for report in reports],
        "rounded, unseen text": [percent(report.held_out_loss_rtn) for report in reports],
        "chosen, unseen text": [percent(report.held_out_loss) for report in reports],
        "its block, before tuning": [percent(report.block_loss_start) for report in reports],
        "its block, tuned": [percent(report.block_loss) for report in reports],
        "input scale": [UNKNOWN if report.alpha is None else report.scale_family for report in reports],
        "exponent": [number(report.alpha, ".2f") for report in reports],
        "mean clip ratio": [number(report.mean_clip_ratio, ".4f") for report in reports],
    }
    shown = {heading: cells for heading, cells in columns.items() if any(cell != UNKNOWN for cell in cells)}
    return table(tuple(shown), list(zip(*shown.values(), strict=True)), texts=2)
